"""bitsandbytes' dynamic 8-bit format: a code of 256 values times each block's maximum.

Double quantization stores scales so, 8-bit AdamW its moments.

The code spends its bits on an exponent as well as on a fraction, so that values from 1 down to
1e-7 keep a digit or two: "8-bit Optimizers via Block-wise Quantization", section 2.2,
https://arxiv.org/abs/2110.02861.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

BLOCK = 256  # elements that share one absmax, in double quantization and in 8-bit moments
STEPS = 65535  # codes are looked up by round((x + 1) / 2 * STEPS) for x in [-1, 1]


def _linspace(count: int) -> np.ndarray:
    """Return torch.linspace(0.1, 1, count): from both ends to the middle, rounded once."""
    first, last = np.float64(np.float32(0.1)), np.float64(1.0)
    step = np.float64(np.float32(np.float32(0.9) / np.float32(count - 1)))
    index = np.arange(count)
    upward, downward = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, upward, downward).astype(np.float32)


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """Return the 256 float32 values of the code, ascending: bitsandbytes' `create_dynamic_map`.

    Seven decades, of which the i-th from below has 2^i values (unsigned: twice as many), at the
    means of a linear grid; with their negatives if signed; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        grid = _linspace(2**i + 1 if signed else 2 ** (i + 1) + 1)
        means = (10.0 ** (i - 6) * ((grid[:-1] + grid[1:]) / np.float32(2))).astype(np.float32)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    values += [0.0] * (256 - len(values))
    return np.sort(np.array(values, np.float32))


@functools.cache
def code_table(signed: bool) -> np.ndarray:
    """Return uint8 [65536]: the code nearest to each value of the grid that codes are looked up by.

    What lies between two values of the grid takes the code of the nearer: now and then not the
    nearest code, as in bitsandbytes.
    """
    grid = np.arange(STEPS + 1, dtype=np.float32) / np.float32(STEPS) * 2 - 1
    values = dynamic_map(signed)
    right = np.clip(np.searchsorted(values, grid), 1, 255)
    left = right - 1
    return np.where(grid - values[left] <= values[right] - grid, left, right).astype(np.uint8)


def quantize(x: Any, axis: int, signed: bool) -> tuple[Any, Any]:
    """Return (codes, absmax) of a float32 array of NumPy or JAX whose `axis` is one block.

    codes: uint8, of x's shape. absmax: float32, the same with `axis` of length 1. A block of
    zeros has the code 0. XLA takes denormal numbers for zeros on the CPU, NumPy does not.
    """
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    absmax = xp.max(xp.abs(x), axis=axis, keepdims=True)
    some = absmax > 0
    scaled = xp.clip(x * (1 / xp.where(some, absmax, 1)), -1, 1)
    index = xp.floor((scaled + 1) * np.float32(0.5) * np.float32(STEPS) + np.float32(0.5))
    index = xp.where(some, index, 0).astype(np.int32)
    return xp.take(xp.asarray(code_table(signed)), index, mode="clip"), absmax


def dequantize(codes: Any, absmax: Any, signed: bool) -> Any:
    """Return the float32 array of codes, absmax having length 1 along the block's axis."""
    xp: Any = np if isinstance(codes, np.ndarray) else jnp
    return xp.take(xp.asarray(dynamic_map(signed)), codes.astype(np.int32), mode="clip") * absmax
