"""LoRA's product with a derivative of its own: x W + s (drop(x) A) B.

Beside its inputs it keeps drop(x) A alone, R numbers a row. The mask is hashed again in the
backward pass, and a 4-bit W decoded again. Sums over rows are float32. Letters: R rank.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.layers.dropout import hashed_keep
from vlm_jax.models.layers.partition import places_are_spread, platform
from vlm_jax.models.layers.remat import LOW
from vlm_jax.weights import dense, is_quantized


def lora_dot(
    x: jax.Array,
    kernel: Any,
    a: Any,
    b: Any,
    scale: Any,
    rate: float = 0.0,
    seed: jax.Array | None = None,
) -> jax.Array:
    """Return x @ kernel + scale (drop(x) @ a) @ b, in x's dtype: [..., in] to [..., out].

    Differentiable in x, a, b and a dense kernel, which are cast to x's dtype.

    Args:
        kernel: [in, out], dense or in 4 bits.
        a, b: [in, R] and [R, out].
        scale: a scalar.
        rate: of dropout.
        seed: uint32 [2], which decides what is dropped; not needed at a rate of 0.
    """
    # Dropout's 1 / (1 - rate) goes with the scale, in float32: both act on R numbers a row.
    scale = jnp.asarray(scale, jnp.float32) / (1.0 - rate)
    return _lora_dot(rate, x, kernel, a, b, scale, seed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lora_dot(
    rate: float, x: jax.Array, kernel: Any, a: Any, b: Any, scale: jax.Array, seed: Any
) -> jax.Array:
    return _forward(rate, x, kernel, a, b, scale, seed)[0]


def _forward(rate, x, kernel, a, b, scale, seed):
    dtype = x.dtype
    low = product(as_rows(_dropped(x, rate, seed)), dense(a, dtype), jnp.float32) * scale
    low = checkpoint_name(low.astype(dtype), LOW)
    y = product(as_rows(x), dense(kernel, dtype)) + product(low, dense(b, dtype))
    return y.reshape(*x.shape[:-1], y.shape[-1]), (x, low, kernel, a, b, scale, seed)


def _backward(rate, kept, dy):
    x, low, kernel, a, b, scale, seed = kept
    dtype, dy = x.dtype, as_rows(dy)
    dlow = (product_with_transpose(dy, dense(b, dtype), jnp.float32) * scale).astype(dtype)
    thin = product_with_transpose(dlow, dense(a, dtype)).reshape(x.shape)
    thin = _dropped(thin, rate, seed)
    if rate > 0 and platform() == "tpu":
        thin = jax.lax.optimization_barrier(thin)  # else its mask is hashed in the large product
    dx = product_with_transpose(dy, dense(kernel, dtype)).reshape(x.shape) + thin
    da = summed_over_rows(as_rows(_dropped(x, rate, seed)), dlow, a.dtype)
    db = summed_over_rows(low, dy, b.dtype)
    # XLA drops the product where the kernel is frozen.
    dkernel = None if is_quantized(kernel) else summed_over_rows(as_rows(x), dy, kernel.dtype)
    return dx, dkernel, da, db, None, None


_lora_dot.defvjp(_forward, _backward)


def _dropped(x: jax.Array, rate: float, seed: Any) -> jax.Array:
    """Return x with zeros where it is dropped, what is kept not scaled."""
    return (
        x if rate == 0 else jnp.where(hashed_keep(seed, x.shape, rate), x, jnp.zeros((), x.dtype))
    )


def as_rows(x: jax.Array) -> jax.Array:
    """Return [rows, D] of [..., D]; where a row's places lie on several devices, x as it is.

    A weight's gradient is then one product of matrices: over several axes it takes a CPU 1.4 times
    as long. Places that are spread must not be merged with rows, see `places_are_spread`.
    """
    return x if places_are_spread() else x.reshape(-1, x.shape[-1])


def product(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """Return x [..., in] @ weight [in, out], in `dtype` or x's own."""
    axes = ((x.ndim - 1,), (0,)), ((), ())
    return jax.lax.dot_general(x, weight, axes, preferred_element_type=dtype)


def product_with_transpose(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """Return x [..., out] @ the transpose of weight [in, out], of which no copy is made."""
    axes = ((x.ndim - 1,), (1,)), ((), ())
    return jax.lax.dot_general(x, weight, axes, preferred_element_type=dtype)


def summed_over_rows(x: jax.Array, dy: jax.Array, dtype: Any) -> jax.Array:
    """Return a weight's gradient [in, out] of x [..., in] and dy [..., out], summed in float32."""
    rows = tuple(range(x.ndim - 1))
    axes = (rows, rows), ((), ())
    return jax.lax.dot_general(x, dy, axes, preferred_element_type=jnp.float32).astype(dtype)
