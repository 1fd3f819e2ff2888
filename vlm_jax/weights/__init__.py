"""How a weight is stored is a property of its leaf; `dense` alone turns a leaf into an array."""

from typing import Any

import jax
import jax.numpy as jnp


def dense(leaf: Any, dtype: Any) -> jax.Array:
    """Return a leaf as a dense array of `dtype`, whatever its storage format."""
    return jnp.asarray(leaf, dtype)
