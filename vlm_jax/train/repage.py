"""Moments of a checkpoint that was saved in pages, for a run without them, and back."""

from collections.abc import Callable
from typing import Any

import jax

from vlm_jax.train.moments import HOST, Plain, Space, pages_of, placed


def kept_otherwise(
    moment: Any, shape: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, Callable[[jax.Array], jax.Array]] | None:
    """Return (a struct of `moment` as a checkpoint holds it, what makes an array of it `moment`).

    shape: in the checkpoint. None where it is not that of the moment's pages if it is whole here,
    or of the whole one if it is in pages here; 8-bit moments of large leaves have one shape both
    ways. The struct lies in the memory and on the shards of `moment`, so that neither reading nor
    turning makes a whole copy anywhere.
    """
    whole, paged = sorted((tuple(moment.shape), tuple(shape)), key=len)
    pages = pages_of(Plain(whole), whole, paged=True)
    if pages is None or (
        paged != jax.eval_shape(pages.split, jax.ShapeDtypeStruct(whole, moment.dtype)).shape
    ):
        return None
    to_pages = moment.shape == paged
    axes = Plain(whole).origin
    origin = tuple((axis + 1,) for (axis,) in axes) if to_pages else ((), *axes)
    there = placed(moment.sharding, shape, origin, None)

    def turn(x: jax.Array) -> jax.Array:
        change = pages.split if to_pages else pages.unite
        if moment.sharding.memory_kind != HOST:
            return change(x)
        return jax.device_put(change(jax.device_put(x, Space.Device)), Space.Host)

    struct = jax.ShapeDtypeStruct(shape, moment.dtype, sharding=there)
    return struct, jax.jit(turn, out_shardings=moment.sharding)
