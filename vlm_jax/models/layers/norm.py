"""LayerNorm and RMSNorm, computed in float32: the mean of squares overflows or rounds in bf16."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.models.layers.linear import along_last, parameter


class RMSNorm(nn.Module):
    """RMSNorm, https://arxiv.org/abs/1910.07467: [..., D] to [..., D].

    offset: added to the scale as it is stored, as Gemma's 1. wide: multiplied in float32 too, then
    cast, not cast first. learned: whether there is a scale.
    """

    epsilon: float
    dtype: Any
    offset: float = 0.0
    wide: bool = False
    learned: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        if not self.learned:
            return normed.astype(self.dtype)
        start = nn.initializers.constant(1.0 - self.offset)
        scale = parameter(self, "scale", start, (x.shape[-1],))
        if not self.wide:
            normed = normed.astype(self.dtype)
        scale = along_last(scale.astype(normed.dtype), x)
        return (normed * (scale + self.offset if self.offset else scale)).astype(self.dtype)


class LayerNorm(nn.Module):
    """LayerNorm, https://arxiv.org/abs/1607.06450: [..., D] to [..., D]."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


def layer_norm(x: jax.Array, scale: Any, bias: Any, epsilon: float) -> jax.Array:
    """Return float32 [..., D] of x [..., D], scale and bias [D]."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    scale, bias = (along_last(v.astype(jnp.float32), x) for v in (scale, bias))
    return normed * scale + bias
