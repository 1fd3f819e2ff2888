"""Trees away from their start, drawn with numpy: jax.random compiles a program for every shape."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vlm_jax.trees import flatten, unflatten


def shaken(
    params: Any,
    chosen: Callable[[str], bool] = lambda path: True,
    scale: float = 0.1,
    seed: int = 1,
) -> Any:
    """Return the tree with normal noise of a scale added to the leaves whose path is chosen."""
    rng, flat = np.random.default_rng(seed), flatten(params)
    for path, leaf in flat.items():
        if chosen(path):
            flat[path] = leaf + scale * rng.standard_normal(leaf.shape, np.float32)
    return unflatten(flat)
