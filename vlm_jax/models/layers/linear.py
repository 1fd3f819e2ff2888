"""Linear layers that carry LoRA where the tree has it: nothing else multiplies by a weight.

LoRA: https://arxiv.org/abs/2106.09685, section 4.1: y = x W + alpha/r (x A) B.
DoRA: https://arxiv.org/abs/2402.09353, section 4: of the sum, the norms of columns are learned too.
Letters: R rank.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.layers.dropout import STREAM, dropped, seed_of
from vlm_jax.models.layers.lora_dot import lora_dot, product_with_transpose
from vlm_jax.models.layers.partition import places_are_spread
from vlm_jax.models.layers.remat import LOW
from vlm_jax.weights import dense, is_quantized

LORA_LEAVES = ("lora_A", "lora_B", "lora_magnitude", "lora_scale", "start_A", "start_B")


def is_lora(path: str) -> bool:
    """Return whether a leaf is LoRA's: matrices, DoRA's norms, scales, where they started."""
    return path.rsplit("/", 1)[-1] in LORA_LEAVES


@dataclasses.dataclass(frozen=True)
class LoRAScale:
    """What the forward pass needs to know of an adapter beside its matrices.

    rng: what makes dropout's masks, a key of `dropout.KEEP`.
    """

    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    rng: str = "hashed"

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
    if is_quantized(kernel):
        return _quantized_matmul(x, kernel)
    if places_are_spread():
        return x @ dense(kernel, x.dtype)
    rows = x.reshape(-1, x.shape[-1]) @ dense(kernel, x.dtype)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _quantized_matmul(x: jax.Array, kernel: Any) -> jax.Array:
    """Return x [..., in] @ kernel; the backward pass decodes again, and keeps no dense weight.

    Nothing contracts over rows here, so they need no flattening, which costs a TPU copies.
    """
    return x @ dense(kernel, x.dtype)


_quantized_matmul.defvjp(
    lambda x, kernel: (x @ dense(kernel, x.dtype), kernel),
    lambda kernel, dy: (product_with_transpose(dy, dense(kernel, dy.dtype)), None),
)


def fresh_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a new float32 A [..., in, R]: kaiming-uniform with a = sqrt(5), within 1/sqrt(in)."""
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def lora_update(x_lora: jax.Array, a: Any, b: Any, scale: Any) -> jax.Array:
    """Return scale (x_lora @ a) @ b, in x_lora's dtype: [..., in] to [..., out].

    scale: a number, or an array of none.
    """
    dtype = x_lora.dtype
    low = matmul(x_lora, dense(a, dtype)) * jnp.asarray(scale, dtype)
    return matmul(checkpoint_name(low, LOW), dense(b, dtype))


def lora_matmul(
    x: jax.Array, kernel: Any, a: Any, b: Any, scale: Any, x_lora: Any, start: Any = None
) -> jax.Array:
    """Return x @ kernel + scale (x_lora @ a) @ b, in x's dtype.

    x, x_lora: [..., in], the latter after dropout. kernel: [in, out] leaf. a: [in, R]. b: [R, out].
    start: see `kernel_product`. Where there is none, and dropout is hashed, `lora_dot` is the same.
    """
    return kernel_product(x, kernel, scale, start) + lora_update(x_lora, a, b, scale)


def kernel_product(
    x: jax.Array, kernel: Any, scale: Any, start: tuple[Any, Any] | None = None
) -> jax.Array:
    """Return x @ (kernel - scale A0 @ B0), in x's dtype.

    start: (A0, B0), what matrices took of the kernel at their start (see lora_init.py), or None. It
    is the frozen weight's part, on which dropout does not act.
    """
    y = matmul(x, kernel)
    return y if start is None else y - lora_update(x, *start, scale)


def weight_update(a: Any, b: Any, scale: Any) -> jax.Array:
    """Return float32 scale a @ b [..., in, out]: what LoRA adds to a kernel."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def column_norms(kernel: Any, a: Any, b: Any, scale: Any) -> jax.Array:
    """Return float32 [..., out], the norms of the columns of kernel + scale a @ b."""
    return jnp.linalg.norm(dense(kernel, jnp.float32) + weight_update(a, b, scale), axis=-2)


def dora_matmul(
    x: jax.Array,
    kernel: Any,
    a: Any,
    b: Any,
    scale: Any,
    x_lora: Any,
    start: tuple[Any, Any] | None,
    magnitude: Any,
) -> jax.Array:
    """Return x @ (kernel + scale a @ b) with columns of norm `magnitude` [out], in x's dtype.

    As PEFT has it: dropout acts on all that the adapter changes, x_lora @ (this - kernel), and the
    norms of the columns count as constants in the backward pass (section 4.3 of the paper).
    """
    whole: tuple[Any, Any] = (a, b) if start is None else less_start(a, b, *start)
    norms_O = jax.lax.stop_gradient(column_norms(kernel, *whole, scale))
    ratio_O = jnp.asarray(magnitude, jnp.float32) / norms_O
    if not isinstance(scale, float):  # of a layer: 0 where it has no matrices, and so no norms
        ratio_O = jnp.where(scale == 0, 1, ratio_O)
    ratio = along_last(ratio_O.astype(x.dtype), x)
    update = lora_update(x_lora, a, b, scale)
    y = kernel_product(x, kernel, scale, start)
    if x_lora is x:
        return ratio * (y + update)
    return y + (ratio - 1) * kernel_product(x_lora, kernel, scale, start) + ratio * update


def factors_of(module: nn.Module, lora: LoRAScale | None) -> tuple[Any, Any, Any]:
    """Return (A, B, what their product is multiplied by: the leaf `lora_scale`, or the model's)."""
    if lora is None:
        raise ValueError(f"{module.path} has LoRA leaves, but the model was built without.")
    leaves = module.variables["params"]
    a, b = leaves["lora_A"], leaves["lora_B"]
    if "lora_scale" not in leaves:
        return a, b, lora.scale(a.shape[-1])
    # A number of the adapter's, whatever a training table says of "lora_.*".
    return a, b, jax.lax.stop_gradient(leaves["lora_scale"])


def less_start(a: Any, b: Any, start_a: Any, start_b: Any) -> tuple[jax.Array, jax.Array]:
    """Return factors of a @ b - start_a @ start_b: what an adapter that took it has changed."""
    return jnp.concatenate([a, start_a], axis=-1), jnp.concatenate([b, -start_b], axis=-2)


class Linear(nn.Module):
    """[..., in] to [..., features]; kernel [in, out], lora_A [in, R], lora_B [R, out].

    With lora_magnitude [out] too it is DoRA's. lora_scale [] is this layer's own scale.
    start_A and start_B, shaped as A and B, are what these took of the kernel (see lora_init.py).
    """

    features: int
    use_bias: bool
    dtype: Any
    lora: LoRAScale | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.normal(0.02), shape)
        x = x.astype(self.dtype)
        leaves = self.variables["params"]
        if "lora_A" in leaves:
            y = self._adapted(x, kernel, leaves)
        else:
            y = matmul(x, kernel)
        if "added" in leaves:  # outputs of new tokens: see added_tokens.py
            y = jnp.concatenate([y, matmul(x, dense(leaves["added"], self.dtype))], axis=-1)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            y = y + along_last(bias.astype(self.dtype), y)
        return y

    def _adapted(self, x: jax.Array, kernel: Any, leaves: Any) -> jax.Array:
        """Return x times the kernel with what LoRA or DoRA change of it."""
        a, b, scale = factors_of(self, self.lora)
        assert self.lora is not None
        rate = self.lora.dropout if self.has_rng(STREAM) else 0.0
        plain = "start_A" not in leaves and "lora_magnitude" not in leaves
        if plain and (rate == 0 or self.lora.rng == "hashed"):
            return lora_dot(x, kernel, a, b, scale, rate, seed_of(self) if rate else None)
        x_lora = dropped(self, x, rate, self.lora.rng)
        start = (leaves["start_A"], leaves["start_B"]) if "start_A" in leaves else None
        factors = (kernel, a, b, scale, x_lora, start)
        if "lora_magnitude" in leaves:
            return dora_matmul(x, *factors, leaves["lora_magnitude"])
        return lora_matmul(x, *factors)


class Embed(nn.Module):
    """int [B, T] to [B, T, D]; embedding [V, D]; `attend` is the tied head.

    Rows of new tokens, where there are any, are a leaf of their own (see added_tokens.py). The
    LoRA factors, lora_A [V, R] and lora_B [R, D], have no dropout and leave the tied head alone, as
    in PEFT.
    """

    vocabulary: int
    features: int
    dtype: Any
    lora: LoRAScale | None = None

    def setup(self) -> None:
        init, shape = nn.initializers.normal(0.02), (self.vocabulary, self.features)
        self.embedding = parameter(self, "embedding", init, shape)
        leaves = self.variables["params"]
        self.added = leaves.get("added")
        self.low = factors_of(self, self.lora) if "lora_A" in leaves else None

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = dense(self.embedding, self.dtype)[tokens_BT]
        if self.low is not None:
            a, b, scale = self.low
            low_BTR = dense(a, self.dtype)[tokens_BT] * jnp.asarray(scale, self.dtype)
            x_BTD = x_BTD + matmul(low_BTR, dense(b, self.dtype))
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
