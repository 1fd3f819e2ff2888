"""Linear layers that carry LoRA where the tree has it: nothing else multiplies by a weight.

LoRA: https://arxiv.org/abs/2106.09685, section 4.1: y = x W + alpha/r (x A) B.
Letters: R rank.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.weights import dense, is_quantized


@dataclasses.dataclass(frozen=True)
class LoRAScale:
    """What the forward pass needs to know of an adapter beside its matrices."""

    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    def scale(self, rank: int) -> float:
        """alpha/r, or alpha/sqrt(r) for rank-stabilised LoRA (https://arxiv.org/abs/2312.03732)."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Any:
    """Return the leaf `name` as it is stored, or initialise a float32 one of this shape.

    Linen's own `self.param` refuses a leaf that is not an array of the initialiser's shape, such
    as a quantized one.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Return [D] with leading axes of 1, so that it meets x of [..., D] rank for rank."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def matmul(x: jax.Array, kernel: Any) -> jax.Array:
    """Return x [..., in] @ kernel [in, out], a leaf, in x's dtype, contracted as plain matrices.

    The gradient of a kernel is then one product over all rows. Of x with several leading axes JAX
    makes one over those axes instead, for which XLA on the CPU transposes the large operands: a
    LoRA step took 1.4 to 1.5 times as long. A quantized kernel is a constant: it has no gradient.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _quantized_matmul(rows, kernel) if is_quantized(kernel) else rows @ dense(kernel, x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _quantized_matmul(x: jax.Array, kernel: Any) -> jax.Array:
    """Return x [rows, in] @ kernel; the backward pass decodes again, so no dense weight is kept."""
    return x @ dense(kernel, x.dtype)


_quantized_matmul.defvjp(
    lambda x, kernel: (_quantized_matmul(x, kernel), kernel),
    lambda kernel, dy: (dy @ dense(kernel, dy.dtype).T, None),
)


def lora_matmul(
    x: jax.Array, kernel: Any, a: Any, b: Any, scale: float, x_lora: jax.Array | None = None
) -> jax.Array:
    """Return x @ kernel + scale (x_lora @ a) @ b, in x's dtype.

    x, x_lora: [..., in], the latter after dropout, None where there is none. kernel: [in, out]
    leaf. a: [in, R]. b: [R, out]. The one place where a frozen weight meets an adapter.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows_lora = None if x_lora is None else x_lora.reshape(rows.shape)
    y = _adapted(rows, rows_lora, kernel, dense(a, x.dtype), dense(b, x.dtype), scale)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _adapted(x, x_lora, kernel, a, b, scale):
    return _adapted_forward(x, x_lora, kernel, a, b, scale)[0]


# The adapter is an extension of the contraction: y = [x, low] @ [[W], [B]] with low = s x A. A
# thin second product would read and write [rows, out] again, in each of the three passes.
def _adapted_forward(x, x_lora, kernel, a, b, scale):
    low = ((x if x_lora is None else x_lora) @ a) * jnp.asarray(scale, x.dtype)
    weight = jnp.concatenate([dense(kernel, x.dtype), b], axis=0)
    y = jnp.concatenate([x, low], axis=1) @ weight
    return y, (x, x_lora, low, kernel, a, b)


def _adapted_backward(scale, residuals, dy):
    x, x_lora, low, kernel, a, b = residuals
    inputs, outputs = kernel.shape
    weight, s = dense(kernel, dy.dtype), jnp.asarray(scale, dy.dtype)
    dx_lora = None
    if x_lora is None and inputs > outputs:
        dlow = (dy @ b.T) * s
        dx = jnp.concatenate([dy, dlow], axis=1) @ jnp.concatenate([weight, a], axis=1).T
    else:
        both = dy @ jnp.concatenate([weight, b], axis=0).T
        dx, dlow = both[:, :inputs], both[:, inputs:] * s
        through = dlow @ a.T
        dx, dx_lora = (dx + through, None) if x_lora is None else (dx, through)
    # Where the kernel is frozen, nothing asks for its gradient and the compiler drops it.
    dkernel = None if is_quantized(kernel) else (x.T @ dy).astype(kernel.dtype)
    da = (x if x_lora is None else x_lora).T @ dlow
    return dx, dx_lora, dkernel, da, low.T @ dy


_adapted.defvjp(_adapted_forward, _adapted_backward)


class Linear(nn.Module):
    """[..., in] to [..., features]; kernel [in, out], lora_A [in, R], lora_B [R, out]."""

    features: int
    use_bias: bool
    dtype: Any
    lora: LoRAScale | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        kernel = parameter(self, "kernel", init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        if self.has_variable("params", "lora_A"):
            if self.lora is None:
                raise ValueError(f"{self.path} has LoRA leaves, but the model was built without.")
            a: Any = self.get_variable("params", "lora_A")
            b: Any = self.get_variable("params", "lora_B")
            x_lora = None
            if self.lora.dropout > 0 and self.has_rng("dropout"):
                keep = 1.0 - self.lora.dropout
                mask = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
                x_lora = jnp.where(mask, x / keep, 0).astype(x.dtype)
            y = lora_matmul(x, kernel, a, b, self.lora.scale(a.shape[-1]), x_lora)
        else:
            y = matmul(x, kernel)
        if self.has_variable("params", "added"):  # outputs of new tokens: see vocabulary.py
            added = dense(self.get_variable("params", "added"), self.dtype)
            y = jnp.concatenate([y, matmul(x, added)], axis=-1)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            y = y + along_last(bias.astype(self.dtype), y)
        return y


class Embed(nn.Module):
    """int [B, T] to [B, T, D]; embedding [V, D]; `attend` is the tied head.

    Rows of new tokens, where there are any, are a leaf of their own (see vocabulary.py).
    """

    vocabulary: int
    features: int
    dtype: Any

    def setup(self) -> None:
        shape = (self.vocabulary, self.features)
        self.embedding = parameter(self, "embedding", nn.initializers.normal(0.02), shape)
        has_added = self.has_variable("params", "added")
        self.added = self.get_variable("params", "added") if has_added else None

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = dense(self.embedding, self.dtype)[tokens_BT]
        if self.added is not None:
            new_BT = tokens_BT - self.vocabulary  # out-of-range indices are clamped either way
            added_BTD = dense(self.added, self.dtype)[jnp.maximum(new_BT, 0)]
            x_BTD = jnp.where((new_BT >= 0)[:, :, None], added_BTD, x_BTD)
        return x_BTD

    def attend(self, x: jax.Array) -> jax.Array:
        logits = matmul(x, dense(self.embedding, self.dtype).T)
        if self.added is not None:
            logits = jnp.concatenate([logits, matmul(x, dense(self.added, self.dtype).T)], axis=-1)
        return logits
