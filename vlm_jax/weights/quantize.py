"""Quantization to 4 bits, equal to bitsandbytes' on the CPU, on the device under `jit`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.weights import dynamic8
from vlm_jax.weights.fourbit import BLOCKS, FourBit
from vlm_jax.weights.packing import Flat, host_device, leaf_of

SMALLEST = np.float32(1e-38)  # bitsandbytes' lower bound of a scale that it divides by
# Scales that XLA computes with exactly: it flushes subnormal numbers, 1 / scale among them.
ORDINARY = (np.float32(1e-30), np.float32(1e37))
KINDS = ("float32", "bfloat16", "float16", "float64")  # dtypes that are quantized
CHUNK = 1 << 22  # values that the exact path takes at a time


def quantize(
    format: type[FourBit], kernel: Any, block: int = 64, double: bool = True, name: str = "a kernel"
) -> FourBit:
    """Return a kernel [in, out], or [L, in, out], in 4-bit codes.

    numpy arrays, and JAX's on the CPU, are quantized to bitsandbytes' very bits. Under `jit` and on
    accelerators it happens on the device; there subnormal numbers count as zero and nothing is
    refused. Raises `UserError` for inf or NaN, a block size that bitsandbytes does not know, and
    anything but a matrix of floats, naming `name`.
    """
    if isinstance(kernel, FourBit):
        raise UserError(f"{name} is quantized already, as {kernel.NAME}; dequantize it first.")
    if not isinstance(kernel, np.ndarray | jax.Array) or kernel.ndim not in (2, 3):
        raise UserError(
            f"{name} is a {type(kernel).__name__} of shape {list(np.shape(kernel))}; only matrices "
            f"are quantized, as numpy or JAX arrays [in, out] or [layers, in, out]."
        )
    check(kernel.shape[-2:], block, kernel.dtype, name)
    if kernel.ndim == 3:
        layers = enumerate(kernel)
        return jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(quantize(format, x, block, double, f"{name}, layer {i},") for i, x in layers),
        )
    if isinstance(kernel, jax.core.Tracer) or (
        isinstance(kernel, jax.Array) and any(d.platform != "cpu" for d in kernel.devices())
    ):
        return _quantize_on_device(format, kernel, block, double)
    weight = np.ascontiguousarray(np.asarray(kernel).T)
    flat = encode(format, weight, block, double, name)
    return leaf_of(flat, format, block, kind(kernel.dtype), weight.shape)


def requantized(like: FourBit, kernel: jax.Array, name: str) -> FourBit:
    """Return a dense kernel [in, out] in the format and layout of a 4-bit one."""
    leaf = quantize(type(like), kernel, like.block, like.double, name)
    leaf = leaf.to_words() if like.in_words else leaf
    return dataclasses.replace(leaf, dtype=like.dtype, used=like.used)


def lying_as(leaf: FourBit, like: FourBit) -> FourBit:
    """Return a 4-bit leaf on the devices where another one lies."""
    if isinstance(like.codes, jax.core.Tracer) or not isinstance(like.codes, jax.Array):
        return leaf
    return jax.device_put(leaf, jax.tree.map(lambda x: x.sharding, like))


def check(shape: tuple[int, ...], block: int, dtype: Any, name: str) -> None:
    """Raise `UserError` for what cannot be quantized."""
    type_name = jnp.dtype(dtype).name
    for wrong, message in (
        (
            block not in BLOCKS,
            f"is to be quantized in blocks of {block}, which bitsandbytes does not support. Use "
            f"one of {', '.join(map(str, BLOCKS))}; 64 is the usual one.",
        ),
        (
            len(shape) != 2 or 0 in shape,
            f"has the shape {list(shape)}; only matrices are quantized.",
        ),
        (
            type_name not in KINDS,
            f"is of type {type_name}; only floats are quantized ({', '.join(KINDS)}). Convert it "
            f"to one of them first.",
        ),
    ):
        if wrong:
            raise UserError(f"{name} {message}")


def kind(dtype: Any) -> str:
    """Return the dtype that codes made of a checked one stand for: bitsandbytes has no float64."""
    return "float32" if jnp.dtype(dtype) == np.float64 else jnp.dtype(dtype).name


def encode(format: type[FourBit], weight: np.ndarray, block: int, double: bool, name: str) -> Flat:
    """Return bitsandbytes' arrays of a weight [out, in]; see `quantize` for errors."""
    codes, absmax = _encode_exactly(format, weight, block, name)
    if not double:
        return Flat(codes, absmax, None, None)
    # bitsandbytes' offset is torch's mean in float32, whose last bit moves with its threads.
    offset = np.asarray(absmax.mean(dtype=np.float64), np.float32)
    codes8, nested = quantize_scales(absmax - offset)
    return Flat(codes, codes8, nested, offset)


def quantize_scales(x: Any) -> tuple[Any, Any]:
    """Return (codes uint8 [n], absmax float32 [ceil(n / 256)]) of scales float32 [n]."""
    pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
    blocks = pad(x, (0, -len(x) % dynamic8.BLOCK)).reshape(-1, dynamic8.BLOCK)
    codes, absmax = dynamic8.quantize(blocks, 1, signed=True)
    return codes.reshape(-1)[: len(x)], absmax.reshape(-1)


def _bounds(format: type[FourBit]) -> tuple[np.ndarray, np.ndarray]:
    """Return (the codes by ascending value, the values between neighbours)."""
    table = np.asarray(format.VALUES, np.float32)
    order = np.argsort(table, kind="stable").astype(np.uint8)
    return order, (table[order[:-1]] + table[order[1:]]) / np.float32(2)


def _code(format: type[FourBit], x: Any) -> Any:
    """Return uint8 codes of x in [-1, 1]: the nearest value, a tie to the lower one."""
    order, bounds = _bounds(format)
    above = sum((x > bound).astype(np.uint8) for bound in bounds)
    if (order == np.arange(16)).all():
        return above
    return jnp.asarray(order)[above] if isinstance(x, jax.Array) else order[above]


def _encode(format: type[FourBit], weight: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Return (codes uint8 [n], absmax float32 [ceil(n / block)]) of a weight, flattened."""
    x = weight.astype(jnp.float32).reshape(-1)
    whole = x.size // block * block
    blocks = x[:whole].reshape(-1, block)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    inverse = jnp.where(absmax > 0, 1 / absmax, 0)
    scaled = jnp.clip(blocks * inverse[:, None], -1, 1).reshape(-1)
    if whole < x.size:  # a shorter last block divides
        last = jnp.maximum(jnp.max(jnp.abs(x[whole:])), jnp.finfo(jnp.float32).tiny)
        scaled = jnp.concatenate([scaled, jnp.clip(x[whole:] / last, -1, 1)])
        absmax = jnp.concatenate([absmax, last[None]])
    return _code(format, scaled), absmax


@functools.partial(jax.jit, static_argnums=(0, 2))
def _encode_compiled(
    format: type[FourBit], weight: jax.Array, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `_encode`'s arrays, and bool [whole blocks]: those that flushing may have changed.

    FP4 has zeros of both signs, so that a subnormal value, flushed, takes another code.
    """
    codes, absmax = _encode(format, weight, block)
    whole = codes.size // block
    if 0 not in _bounds(format)[1]:
        return codes, absmax, jnp.zeros(whole, bool)

    def pattern(x: jax.Array) -> jax.Array:  # whole numbers are compared without flushing
        return jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)

    x = pattern(weight.astype(jnp.float32).reshape(-1)[: whole * block].reshape(whole, block))
    least = pattern(4 * jnp.finfo(jnp.float32).tiny * jnp.maximum(absmax[:whole], 1))
    return codes, absmax, jnp.any((x > 0) & (x < least[:, None]), axis=1)


def _encode_exactly(
    format: type[FourBit], weight: np.ndarray, block: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return `_encode`'s arrays; blocks whose scale is not ordinary are made again in numpy."""
    with jax.default_device(host_device()):
        codes, absmax, flushed = map(np.asarray, _encode_compiled(format, weight, block))
    low, high = ORDINARY
    ordinary = np.logical_and(absmax >= low, absmax <= high)
    ordinary[: flushed.size] &= ~flushed
    if codes.size % block:  # a shorter last block is always made again
        ordinary[-1] = False
    places = np.flatnonzero(~ordinary)
    if not places.size:
        return codes, absmax
    codes, absmax = codes.copy(), absmax.copy()
    for some in np.array_split(places, -(-places.size * block // CHUNK)):
        where = some[:, None] * block + np.arange(block)
        inside = where < codes.size
        values = weight.reshape(-1)[np.minimum(where, codes.size - 1)]
        x = np.where(inside, values.astype(np.float32), 0)
        if not np.isfinite(x).all():
            raise UserError(
                f"{name} holds inf or NaN, for which there is no 4-bit code. The checkpoint is "
                f"damaged, or its training diverged: repair it, or keep this tensor as it is by "
                f"the quantization table."
            )
        largest = np.abs(x).max(1)
        safe = np.maximum(largest, SMALLEST)[:, None]
        shorter = np.logical_not(inside.all(axis=1))
        scaled = np.where(shorter[:, None], x / safe, x * (np.float32(1) / safe))
        codes[where[inside]] = _code(format, np.clip(scaled, -1, 1))[inside]
        absmax[some] = np.where(shorter, safe[:, 0], largest)
    return codes, absmax


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _quantize_on_device(format: type[FourBit], kernel: jax.Array, block: int, double: bool):
    inputs, outputs = kernel.shape
    codes, absmax = _encode(format, kernel.T, block)
    nested = offset = None
    if double:
        offset = jnp.mean(absmax)
        absmax, nested = quantize_scales(absmax - offset)
    if inputs % block == 0:
        absmax = absmax.reshape(outputs, inputs // block).T
    codes = codes.reshape(outputs, inputs).T.astype(jnp.uint4)
    return format(codes, absmax, nested, offset, block=block, dtype=kind(kernel.dtype))
