"""4-bit leaves from and to bitsandbytes' arrays: axis order, packed bytes, flat scales."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.weights import words
from vlm_jax.weights.fourbit import FourBit


class Arrays(NamedTuple):
    """The arrays of one 4-bit weight on the host; nested and offset: of double quantization."""

    codes: np.ndarray
    absmax: np.ndarray
    nested: np.ndarray | None
    offset: np.ndarray | None


class Flat(Arrays):
    """A weight [out, in] as bitsandbytes has it, flattened by rows, before packing.

    codes: uint8 [out * in], one a byte. absmax: float32, or uint8 codes [blocks]. nested: float32
    and offset: float32 [] of double quantization, or None.
    """


class Packed(Arrays):
    """One layer of a leaf on the host, in the order of our memory.

    codes: uint8 [in, out / 2], the code of the even column in the low bits, or [in, out], one a
    byte, where `out` is odd; or int32 [in / 8, out], in words. The rest as in `FourBit`.
    """


def host_device() -> Any:
    """Return the device that the host computes on."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # started for an accelerator alone
        return jax.local_devices()[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _columns(codes: jax.Array, shape: tuple[int, ...], in_words: bool) -> jax.Array:
    inputs, outputs = shape
    codes = codes.reshape(outputs, inputs).T
    if in_words:
        return words.to_words(codes)
    return codes if outputs % 2 else codes[:, ::2] | (codes[:, 1::2] << 4)


def pack(flat: Flat, shape: tuple[int, ...], block: int, in_words: bool = False) -> Packed:
    """Return the arrays of one layer whose kernel has this shape, [in, out]."""
    inputs, outputs = shape
    with jax.default_device(host_device()):
        codes = np.asarray(_columns(flat.codes, shape, in_words))
    absmax, nested = flat.absmax, flat.nested
    if inputs % block == 0:
        absmax = np.ascontiguousarray(absmax.reshape(outputs, inputs // block).T)
    if in_words and nested is not None:
        nested = words.by_column(nested, inputs // block, outputs)
    return Packed(codes, absmax, nested, flat.offset)


def leaf_of(
    flat: Flat, format: type[FourBit], block: int, dtype: str, shape: tuple[int, ...]
) -> FourBit:
    """Return the leaf of a weight [out, in]; dtype: what its codes stand for."""
    packed = jax.tree.map(jnp.asarray, pack(flat, shape[::-1], block))
    codes = unpack_codes(packed.codes, shape[0])
    return format(codes, packed.absmax, packed.nested, packed.offset, block, dtype)


def unpack_codes(codes: jax.Array, outputs: int) -> jax.Array:
    """Return uint4 [..., in, out] of `Packed.codes`."""
    if codes.shape[-1] == outputs:
        return codes.astype(jnp.uint4)
    return jax.lax.bitcast_convert_type(codes, jnp.uint4).reshape(*codes.shape[:-1], outputs)


def storable(leaf: FourBit) -> FourBit:
    """Return a leaf whose codes are bytes, `Packed.codes`: orbax cannot write 4-bit integers.

    Codes in words are unpacked first, so that what is stored does not depend on the platform.
    """
    leaf = leaf.from_words()
    codes, (*leading, outputs) = leaf.codes, leaf.shape
    if outputs % 2:
        return dataclasses.replace(leaf, codes=codes.astype(jnp.uint8))
    pairs = codes.reshape(*leading, outputs // 2, 2)
    return dataclasses.replace(leaf, codes=jax.lax.bitcast_convert_type(pairs, jnp.uint8))


def restored(leaf: FourBit, outputs: int) -> FourBit:
    """Return the leaf that `storable` was given; outputs: of its kernel [in, out]."""
    return dataclasses.replace(leaf, codes=unpack_codes(leaf.codes, outputs))


def flatten_layer(leaf: FourBit, layer: int | None = None) -> Flat:
    """Return bitsandbytes' arrays of a leaf, or of one layer of it, on the host."""
    one = jax.device_get(leaf.layer(layer)).from_words()
    codes, absmax, nested, offset = one.codes, one.absmax, one.nested, one.offset
    if leaf.aligned:
        absmax = absmax.T
    return Flat(codes.astype(np.uint8).T.reshape(-1), absmax.reshape(-1), nested, offset)


def to_bytes(codes: np.ndarray, padding: int) -> np.ndarray:
    """Return uint8 [ceil(n / 2), 1]: bitsandbytes' bytes, the first code in the high bits."""
    if codes.size % 2:
        codes = np.append(codes, np.uint8(padding))
    pairs = codes.reshape(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def from_bytes(data: np.ndarray, count: int) -> np.ndarray:
    """Return the uint8 [count] codes in bitsandbytes' bytes."""
    data = data.reshape(-1)
    return np.stack([data >> 4, data & 15], axis=-1).reshape(-1)[:count]
