"""Weights of 16 bits that learn: an update is rounded up or down by chance, right on average.

A bfloat16 has 8 bits: rounded to the nearest, an update below 1/512 of its weight would be lost
each time. With chance in proportion to what is cut off, the mean of many updates is kept.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.trees import flatten, map_leaves

ROUNDING = 0x726F  # sets this key apart from dropout's and noise's of the same step


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Return float32 `x` as bfloat16: one of its two neighbours, whose expectation is x.

    Random bits are added to the 16 that bfloat16 has not, then those are cut off; so what is a
    bfloat16 stays as it is. Numbers that are not finite are converted as always.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = ((bits + drawn) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def stored(masters: Any, like: Any, rng: jax.Array, step: jax.Array) -> Any:
    """Return float32 weights in the dtypes of `like`; by chance that follows from rng and step."""
    key = jax.random.fold_in(jax.random.fold_in(rng, step), ROUNDING)
    kinds = {path: leaf.dtype for path, leaf in flatten(like).items()}

    def one(path: str, leaf: jax.Array) -> jax.Array:
        if kinds[path] == leaf.dtype:
            return leaf
        return stochastic_round(leaf, jax.random.fold_in(key, zlib.crc32(path.encode())))

    return map_leaves(one, masters)
