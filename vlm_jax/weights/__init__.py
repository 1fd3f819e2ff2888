"""Storage formats of weights: a property of the leaf; `dense` alone turns a leaf into an array."""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.weights.fourbit import FourBit
from vlm_jax.weights.fp4 import FP4
from vlm_jax.weights.nf4 import NF4

# A 4-bit format is one file and one line here.
FORMATS: dict[str, type[FourBit]] = {"nf4": NF4, "fp4": FP4}

__all__ = ["FORMATS", "FP4", "NF4", "FourBit", "dense", "is_quantized"]


def is_quantized(leaf: Any) -> bool:
    """Return whether a leaf is stored in another format than an array."""
    return isinstance(leaf, FourBit)


def dense(leaf: Any, dtype: Any) -> jax.Array:
    """Return a leaf as a dense array of `dtype`, whatever its storage format."""
    return leaf.dense(dtype) if isinstance(leaf, FourBit) else jnp.asarray(leaf, dtype)
