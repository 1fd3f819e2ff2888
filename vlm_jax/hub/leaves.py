"""Leaves of the tree from tensors on disk, one at a time: quantized, stacked, placed.

Of a dense leaf each process reads and holds the block that its own devices get.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.errors import UserError
from vlm_jax.files.limits import all_finite, check_finite
from vlm_jax.hub.tensors import Block, Entry, read_tensor
from vlm_jax.names import Place, to_tree
from vlm_jax.quantization import Storage
from vlm_jax.sharding import put
from vlm_jax.weights import FourBit, bnb
from vlm_jax.weights.packing import Packed, pack, unpack_codes
from vlm_jax.weights.quantize import check, encode, kind

ALIGNMENT = 64  # bytes, of memory that XLA takes over
PART = 1 << 20  # bytes that are read at once, and are still in a core's cache when they are used


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One weight of a checkpoint, whose shape on disk its place says.

    beside: {suffix: entry} of the further tensors of a 4-bit weight; {} for a dense one.
    """

    name: str
    entry: Entry
    place: Place
    beside: Mapping[str, Entry]

    def fill(self, held: np.ndarray, path: str, block: Block) -> None:
        """Write a block of the weight, as it lies in the tree without its layers, to `held`.

        By rows on disk that stay in a core's cache until they are transposed and looked at.
        Raises `UserError` for values that are not finite, or not so in the dtype of `held`.
        """
        shape = self.place.shape
        if not shape or len(shape) != len(block):  # of a convolution the kernel is a matrix here
            self._write(held, to_tree(path, read_tensor(self.entry))[block])
            return
        if path.endswith("/kernel"):
            held, block = held.T, block[::-1]
        first, last, _ = block[0].indices(shape[0])
        rows = max(1, PART // max(1, math.prod(shape[1:]) * self.entry.read_as.itemsize))
        for start in range(first, last, rows):
            some = slice(start, min(start + rows, last))
            read = read_tensor(self.entry, (some, *block[1:]))
            self._write(held[start - first : some.stop - first], read)

    def _write(self, held: np.ndarray, read: np.ndarray) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            values = read.astype(held.dtype, copy=False)
        if not all_finite(values):
            check_finite(read_tensor(self.entry), self.name, self.entry.path)
            raise UserError(
                f"The tensor '{self.name}' in '{self.entry.path}' holds values that "
                f"{held.dtype.name} cannot hold: they would be infinite. Load it in bfloat16 or "
                f"float32."
            )
        held[...] = values


def block_here(shape: tuple[int, ...], sharding: Any) -> Block:
    """Return the smallest block of an array that holds the shards of this process's devices."""
    if sharding is None:
        return tuple(slice(0, size) for size in shape)
    ranges = [
        [one.indices(n)[:2] for one, n in zip(index, shape, strict=True)]
        for index in sharding.addressable_devices_indices_map(shape).values()
    ]
    return tuple(
        slice(min(first for first, _ in axis), max(last for _, last in axis))
        for axis in zip(*ranges, strict=True)
    )


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Return an array without values whose memory the CPU's device takes over uncopied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    space = np.empty(size + ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    return space[start : start + size].view(dtype).reshape(shape)


def _put_block(held: np.ndarray, block: Block, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """Return an array of which this process holds a block, on its shards."""
    if held.shape == shape:
        return put(held, sharding)

    def shard(index: Any) -> np.ndarray:
        ranges = [one.indices(n)[:2] for one, n in zip(index, shape, strict=True)]
        starts = (one.start for one in block)
        return held[tuple(slice(a - s, b - s) for (a, b), s in zip(ranges, starts, strict=True))]

    return jax.make_array_from_callback(shape, sharding, shard)


def _place(leaf: FourBit, arrays: Packed, sharding: Any) -> FourBit:
    """Return a 4-bit leaf on its devices; leaf: it as shapes. arrays: with layers first."""
    where: dict[str, Any] = dict.fromkeys(arrays._fields) if sharding is None else vars(sharding)
    placed: dict[str, Any] = {
        part: None if array is None else _put(array, where[part])
        for part, array in arrays._asdict().items()
    }
    in_words = where.get("in_words", False)
    if not in_words:
        unpack = jax.jit(unpack_codes, static_argnums=1, out_shardings=where["codes"])
        placed["codes"] = unpack(placed["codes"], leaf.shape[-1])
    return dataclasses.replace(leaf, used=where.get("used"), in_words=in_words, **placed)


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    """Return the array on its shards; bytes of two codes may divide less far than the codes."""
    if sharding is not None:
        try:
            sharding.shard_shape(array.shape)
        except ValueError:
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return put(array, sharding)


def read_leaf(
    path: str,
    shape: tuple[int, ...],
    tensors: Sequence[Tensor],
    storage: Storage | None,
    dtype: Any,
    sharding_of: Callable[[Any], Any],
    threads: Executor,
) -> tuple[Any, str | None]:
    """Return a leaf made of its layers' tensors, and the dtype that quantized codes stand for.

    storage: how to quantize it, or None: dense in `dtype`, or with the codes that it has on disk.
    sharding_of: gives the shardings of the leaf as shapes, or None for the default device.
    threads: read and copy the layers of a dense leaf, for which they release the interpreter's
    lock. Raises `UserError` for what does not fit, and where layers of one leaf are stored
    differently.
    """
    four = [bool(tensor.beside) for tensor in tensors]
    if not any(four) and storage is None:
        sharding = sharding_of(jax.ShapeDtypeStruct(shape, dtype))
        block = block_here(shape, sharding)
        held = _aligned([one.stop - one.start for one in block], dtype)

        def read(tensor: Tensor) -> None:
            if tensor.place.layer is None:
                tensor.fill(held, path, block)
            else:  # layers are never spread
                tensor.fill(held[tensor.place.layer, ...], path, block[1:])

        list(threads.map(read, tensors))  # raises what a thread raised
        return _put_block(held, block, shape, sharding), None
    if any(four) and not all(four):
        raise _mixed(path, tensors[four.index(True)], "4-bit", tensors[four.index(False)], "dense")
    if not path.endswith("/kernel"):
        raise UserError(
            f"The tensor '{tensors[0].name}' is in 4 bits, but it is not a linear layer's."
        )
    arrays: list[Any] = []
    for tensor in tensors:
        stored = _read_4bit(tensor) if storage is None else _quantized(tensor, storage)
        if not arrays:
            first, lead = stored, shape[:-2]
            kind = Storage(first.format, first.flat.nested is not None, first.block)
            leaf = kind.abstract(shape, first.dtype)
            sharding = sharding_of(leaf)
            in_words = sharding is not None and sharding.in_words
        layer = pack(stored.flat, (shape[-2], shape[-1]), stored.block, in_words)
        if not arrays:
            arrays = [None if a is None else np.empty((*lead, *a.shape), a.dtype) for a in layer]
        elif stored.kind != first.kind:
            raise _mixed(path, tensors[0], str(first.kind), tensor, str(stored.kind))
        for stack, part in zip(arrays, layer, strict=True):
            if stack is not None:
                stack[tensor.place.index] = part
    return _place(leaf, Packed(*arrays), sharding), first.dtype


def _quantized(tensor: Tensor, storage: Storage) -> bnb.Stored:
    weight, name = read_tensor(tensor.entry), f"The tensor '{tensor.name}'"
    check_finite(weight, tensor.name, tensor.entry.path)
    check(weight.shape, storage.block, weight.dtype, name)
    return bnb.Stored(
        encode(storage.format, weight, storage.block, storage.double, name),
        storage.format,
        storage.block,
        kind(weight.dtype),
        weight.shape,
    )


def _read_4bit(tensor: Tensor) -> bnb.Stored:
    parts = {
        suffix: read_tensor(entry) for suffix, entry in {"": tensor.entry, **tensor.beside}.items()
    }
    return bnb.from_tensors(parts, tensor.place.shape, tensor.name)


def _mixed(path: str, one: Tensor, kind: str, other: Tensor, other_kind: str) -> UserError:
    return UserError(
        f"'{one.name}' is stored as {kind} and '{other.name}' as {other_kind}, but the layers of "
        f"'{path}' are stacked and must be stored alike. Use the checkpoint in 16 bits and "
        f"quantize it while loading."
    )
