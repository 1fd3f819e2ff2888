"""The 8-bit dynamic codes of bitsandbytes, which double quantization stores scales in.

8-Bit Approximations for Parallelism in Deep Learning, https://arxiv.org/abs/1511.04561, section 2:
the exponent takes as many bits as it needs and the fraction what is left.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256  # values that share one absmax
STEPS = 65535  # of the table that bitsandbytes looks codes up in


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """Return torch.linspace in float32: from both ends to the middle, products unrounded."""
    low, high = np.float32(first), np.float32(last)
    step = np.float64(np.float32((high - low) / np.float32(count - 1)))
    index = np.arange(count)
    ahead = np.float64(low) + step * index
    back = np.float64(high) - step * (count - 1 - index)
    return np.where(index < count // 2, ahead, back).astype(np.float32)


@functools.cache
def values(signed: bool = True) -> np.ndarray:
    """Return the 256 float32 values of the codes, ascending (`create_dynamic_map`)."""
    data = []
    for i in range(7):
        bounds = _linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        means = np.float32(10.0 ** (i - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        data += [means, -means] if signed else [means]
    table = np.sort(np.concatenate([*data, np.asarray([0, 1], np.float32)]).astype(np.float32))
    assert table.shape == (256,)
    return table


@functools.cache
def _nearest(signed: bool = True) -> np.ndarray:
    """Return uint8 [65536]: the code nearest to i / 65535 * 2 - 1."""
    points = (np.arange(STEPS + 1, dtype=np.float32) / np.float32(STEPS)) * 2 - np.float32(1)
    table = values(signed).astype(np.float64)
    above = np.searchsorted(table, points).clip(1, 255)
    low, high = points - table[above - 1], table[above] - points
    return np.where(low <= high, above - 1, above).astype(np.uint8)


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes uint8 [n], absmax float32 [ceil(n / 256)]) of float32 [n], signed.

    Equal to bitsandbytes' on the CPU: codes are not the nearest but come from a table of 65,536
    steps between -1 and 1.
    """
    blocks = np.pad(x, (0, -len(x) % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.clip(blocks * (np.float32(1) / absmax)[:, None], -1, 1)
    index = np.floor(
        (scaled + np.float32(1)) * np.float32(0.5) * np.float32(STEPS) + np.float32(0.5)
    )
    index = np.where(np.isnan(index), 0, index).astype(np.int64)
    return _nearest(True)[index].reshape(-1)[: len(x)], absmax


def quantize_on_device(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what `quantize` does, for an array under `jit`."""
    blocks = jnp.pad(x, (0, -len(x) % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = jnp.clip(blocks * (1 / absmax)[:, None], -1, 1)
    index = jnp.floor((scaled + 1) * jnp.float32(0.5) * jnp.float32(STEPS) + jnp.float32(0.5))
    index = jnp.where(jnp.isnan(index), 0, index).astype(jnp.int32)
    return jnp.asarray(_nearest(True))[index].reshape(-1)[: len(x)], absmax
