"""Pallas kernels for TPUs: 4-bit codes and 8-bit scales decoded by look-ups inside registers.

A look-up of eight values along sublanes, or of 128 along lanes, is one instruction, where XLA's
gather takes elements one by one, and its tree of selects fifteen instructions.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlm_jax.weights.words import BLOCK, CODES, LANES

ROWS = (512, 256, 128, 64)  # of a tile: the first that divides the kernel's
COLUMNS = (1024, 512, 256, 128)
SUBLANES = 8
HIGH_HALF = np.int32(-(1 << 16))


def tile(inputs: int, outputs: int) -> tuple[int, int]:
    """Return the tile [rows, columns] that a kernel [in, out] is decoded by."""
    return (
        next(rows for rows in ROWS if inputs % rows == 0),
        next(columns for columns in COLUMNS if outputs % columns == 0),
    )


def _take(table: Sequence[float], index: jax.Array) -> jax.Array:
    """Return float32 `table[index]` of eight values; index: [8, columns]."""
    rows = [jnp.full(index.shape[1:], value, jnp.float32) for value in table]
    return jnp.take_along_axis(jnp.stack(rows), index, axis=0, mode="promise_in_bounds")


def _value(words: jax.Array, nibble: int, values: Sequence[float]) -> jax.Array:
    """Return the float32 values of one nibble of words [8, columns]."""
    index = (words >> (4 * nibble)) & 7
    upper = (words & np.uint32(8 << (4 * nibble)).astype(np.int32)) != 0
    return jnp.where(upper, _take(values[8:], index), _take(values[:8], index))


def _rounded_pairs(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Return bfloat16 [16, columns] of its even and odd rows, float32 [8, columns].

    Rounded to nearest, ties to even, by integers: then interpreted and compiled kernels give the
    same bits. Holds for all numbers and infinity, and for the NaN of 0 times it.
    """

    def upper_half(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        return bits + 0x7FFF + ((bits >> 16) & 1)

    low, high = upper_half(even) >> 16, upper_half(odd) & HIGH_HALF
    return pltpu.bitcast((low & 0xFFFF) | high, jnp.bfloat16)


def _interleaved(even: jax.Array, odd: jax.Array, half: int) -> jax.Array:
    """Return a half of the sixteen rows whose even and odd ones are given, [8, columns] each."""
    row = jax.lax.broadcasted_iota(jnp.int32, even.shape, 0)
    index = (row >> 1) + half * (SUBLANES // 2)
    even, odd = (
        jnp.take_along_axis(rows, index, axis=0, mode="promise_in_bounds") for rows in (even, odd)
    )
    return jnp.where((row & 1) == 0, even, odd)


def _decode_kernel(values: Sequence[float], words: Any, scales: Any, out: Any) -> None:
    """words: [rows / 8, columns]. scales: the eight rows among which the tile's are."""
    blocks = words.shape[0] // SUBLANES
    first = 0 if blocks == SUBLANES else jax.lax.rem(pl.program_id(0) * blocks, SUBLANES)
    for block in range(blocks):
        word = words[SUBLANES * block : SUBLANES * (block + 1), :]
        scale = jnp.broadcast_to(scales[pl.ds(first + block, 1), :], word.shape)
        for pair in range(CODES // 2):
            even, odd = (_value(word, 2 * pair + i, values) * scale for i in (0, 1))
            start = BLOCK * block + 2 * SUBLANES * pair
            if out.dtype == jnp.bfloat16:
                out[start : start + 2 * SUBLANES, :] = _rounded_pairs(even, odd)
            else:
                out[start : start + SUBLANES, :] = _interleaved(even, odd, 0)
                out[start + SUBLANES : start + 2 * SUBLANES, :] = _interleaved(even, odd, 1)


def decode(
    words: jax.Array,
    scales: jax.Array,
    values: tuple[float, ...],
    dtype: Any,
    interpret: bool = False,
) -> jax.Array:
    """Return the kernel [in, out]: float32 code times float32 scale.

    words: int32 [in / 8, out]. scales: float32 [in / 64, out]. values: of the 16 codes.
    dtype: float32, or bfloat16, to which it is rounded once.
    """
    inputs, outputs = words.shape[0] * CODES, words.shape[1]
    rows, columns = tile(inputs, outputs)

    def eight(i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.div(i * (rows // BLOCK), SUBLANES), j

    return pl.pallas_call(
        functools.partial(_decode_kernel, values),
        grid=(inputs // rows, outputs // columns),
        in_specs=[
            pl.BlockSpec((rows // CODES, columns), lambda i, j: (i, j)),
            pl.BlockSpec((SUBLANES, columns), eight),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((inputs, outputs), dtype),
        interpret=interpret,
        name="nf4_decode" if dtype == jnp.bfloat16 else "nf4_decode_float32",
    )(words, scales)


def _look_up_kernel(table: Any, codes: Any, out: Any) -> None:
    """table: [2, 128], the lower and the upper half of the values."""
    shape = (codes.shape[0], LANES)
    low, high = (jnp.broadcast_to(table[half : half + 1, :], shape) for half in (0, 1))
    for start in range(0, codes.shape[1], LANES):
        code = codes[:, start : start + LANES]
        found = [
            jnp.take_along_axis(half, code & (LANES - 1), axis=1, mode="promise_in_bounds")
            for half in (low, high)
        ]
        out[:, start : start + LANES] = jnp.where(code >= LANES, found[1], found[0])


def look_up(codes: jax.Array, values: jax.Array, interpret: bool = False) -> jax.Array:
    """Return float32 `values[codes]` of 8-bit codes [blocks, out] and 256 values."""
    blocks, outputs = codes.shape
    padded = jnp.pad(codes.astype(jnp.int32), ((0, -blocks % SUBLANES), (0, 0)))
    columns = next(columns for columns in COLUMNS[1:] if outputs % columns == 0)
    spec = pl.BlockSpec((padded.shape[0], columns), lambda j: (0, j))
    found = pl.pallas_call(
        _look_up_kernel,
        grid=(outputs // columns,),
        in_specs=[pl.BlockSpec((2, LANES), lambda j: (0, 0)), spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        interpret=interpret,
        name="nf4_scales",
    )(values.reshape(2, LANES), padded)
    return found[:blocks]
