"""Storage of AdamW's moments: float32 or bitsandbytes' 8-bit blocks, on the device or paged.

A store sees a leaf through a view, an array of the same numbers in which its blocks are an axis.
What is kept of a view may be cut into equal pages, updated one after the other: then it can lie in
host memory, and what an update needs besides is as large as a page. A checkpoint saved in pages
resumes a run without them, and the other way.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from vlm_jax.errors import UserError
from vlm_jax.sharding import make_mesh
from vlm_jax.weights.blocks import Blocks
from vlm_jax.weights.dynamic8 import BLOCK, dequantize, quantize

Space = jax.memory.Space
HOST = "pinned_host"
SMALLEST_8BIT = 4096  # a tensor of fewer elements keeps float32 moments, as in bitsandbytes
SMALLEST_PAGED = 100_000  # a leaf of fewer elements stays on the device, as in bitsandbytes
SMALLEST_PAGE = 2**14
LARGEST_PAGE = 2**24  # elements; a step holds a handful of arrays of one page on the device

# (gradient, mean, square) -> (update, mean, square), elementwise, on arrays of one shape.
Rule = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment8:
    """An 8-bit moment. codes: uint8, of the view's shape. absmax: float32, one a block."""

    codes: jax.Array
    absmax: jax.Array


@dataclasses.dataclass(frozen=True)
class Store:
    """How the moments of a leaf of some shape are kept.

    blocks: of moments of a code of eight bits an element and a float32 number a block; None: they
    are arrays of the leaf's shape and dtype.
    """

    shape: tuple[int, ...]
    blocks: Blocks | None = None

    @property
    def origin(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the view, the leaf's axes it is cut from; none for a block's axis."""
        return self.blocks.origin if self.blocks else tuple((i,) for i in range(len(self.shape)))

    def view(self, x: jax.Array) -> jax.Array:
        """Return an array of the leaf's shape as the view that moments are kept in."""
        return x if self.blocks is None else self.blocks.view(x.astype(jnp.float32))

    def restore(self, view: jax.Array) -> jax.Array:
        """Return the array of the leaf's shape of a view."""
        return view if self.blocks is None else self.blocks.restore(view)

    def save(self, moment: jax.Array, kind: str) -> Any:
        """Return what is kept of a view."""
        return (
            moment
            if self.blocks is None
            else Moment8(*quantize(moment, self.blocks.axis, signed=kind == "mean"))
        )

    def load(self, kept: Any, kind: str) -> jax.Array:
        """Return the view of what is kept."""
        return (
            kept
            if self.blocks is None
            else dequantize(kept.codes, kept.absmax, signed=kind == "mean")
        )


@dataclasses.dataclass(frozen=True)
class Pages:
    """The cut of an array into `count` pages, of which the p-th has every count-th index from p.

    So a page of an array whose rows are sharded has rows of every shard: paging moves nothing
    between devices. [.., d, ..] becomes [count, .., d/count, ..].
    memory: the kind of memory they lie in; None: the device's own.
    """

    count: int
    axis: int
    memory: str | None = None

    def split_axis(self, x: jax.Array) -> jax.Array:
        """Return an array with its pages along the axis after `axis`: a reshape alone."""
        before, (length, *after) = x.shape[: self.axis], x.shape[self.axis :]
        return x.reshape(*before, length // self.count, self.count, *after)

    def merge_axis(self, x: jax.Array) -> jax.Array:
        """Return the array of which `split_axis` made x."""
        before, (part, count, *after) = x.shape[: self.axis], x.shape[self.axis :]
        return x.reshape(*before, part * count, *after)

    def to_pages(self, x: jax.Array) -> jax.Array:
        """Return an array as pages, which come first: each lies in one piece."""
        return jnp.moveaxis(self.split_axis(x), self.axis + 1, 0)

    def from_pages(self, pages: jax.Array) -> jax.Array:
        """Return the array of its pages."""
        return self.merge_axis(jnp.moveaxis(pages, 0, self.axis + 1))


def store_of(path: str, shape: tuple[int, ...], eight_bit: bool) -> Store:
    """Return how the moments of the leaf at `path` are kept."""
    blocks = Blocks.of(path, shape, BLOCK)
    return Store(
        tuple(shape), blocks if eight_bit and blocks.tensor_size >= SMALLEST_8BIT else None
    )


def pages_of(store: Store, shape: tuple[int, ...], paged: bool) -> Pages | None:
    """Return how the moments of a leaf are paged, or None where they are kept as one.

    A page is a layer of a stack, else part of an axis of the view. Eight-bit moments of large
    leaves are in pages even on the device: as float32 and as indices of a table they take several
    times their room, and so they do one page at a time.
    """
    if math.prod(shape) < SMALLEST_PAGED or not (paged or store.blocks):
        return None
    memory = HOST if paged else None
    if len(shape) >= 3 and shape[0] > 1:
        return Pages(shape[0], 0, memory)
    view = jax.eval_shape(store.view, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    # Small leaves have few pages, as each page has its latency.
    size = math.prod(view)
    least = max(2, min(16, size >> 20), -(-size // LARGEST_PAGE))
    cuts = [
        (count, axis)
        for axis, length in enumerate(view)
        for count in range(1, min(length, size // SMALLEST_PAGE) + 1)
        if length % count == 0 and store.origin[axis]  # never a block's axis
    ]
    return Pages(*min((cut for cut in cuts if cut[0] >= least), default=max(cuts)), memory)


def fresh(store: Store, pages: Pages | None, leaf: Any, kind: str) -> Any:
    """Return a moment before the first step: zeros, sharded as the leaf is.

    Of a `jax.ShapeDtypeStruct` it returns such structs, so that a state can be planned. Raises
    `UserError` where pages have no host memory to lie in.
    """

    def kept(x: jax.Array) -> Any:
        kept = store.save(store.view(x), kind)
        return kept if pages is None else jax.tree.map(pages.to_pages, kept)

    shapes = jax.eval_shape(kept, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    origin = store.origin if pages is None else ((), *store.origin)
    memory = None if pages is None else pages.memory
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    # A leaf that may lie anywhere has moments that may, or a step would compile twice.
    if memory is None and isinstance(leaf, jax.Array) and sharding and not leaf.committed:
        sharding = None

    def zeros(shape: jax.ShapeDtypeStruct) -> Any:
        where = None if sharding is None else placed(sharding, shape.shape, origin, memory)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
        if memory is None or where is None:  # inside a jitted init, arrays have no sharding yet
            array = jnp.zeros(shape.shape, shape.dtype, device=where)
            return array if memory is None else jax.device_put(array, Space.Host)
        part = where.shard_shape(shape.shape)  # made on the host: the device may have no room
        return jax.make_array_from_callback(
            shape.shape, where, lambda _: np.zeros(part, shape.dtype)
        )

    return jax.tree.map(zeros, shapes)


def placed(sharding: Any, shape: tuple[int, ...], origin: Any, memory: str | None) -> Any:
    """Return where an array of a leaf's moments lies, given where the leaf does."""
    # A plan for devices that nothing describes has an abstract mesh, which reaches no memory.
    if memory is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        device = min(sharding.device_set, key=lambda device: device.id)
        if memory not in memory_kinds(device):
            raise UserError(
                f"The device '{device}' has no '{memory}' memory for the moments of a paged "
                f"optimizer to lie in; it has {', '.join(memory_kinds(device))}. Take "
                f"training.optim='adamw' or 'adamw_8bit'."
            )
    if isinstance(sharding, SingleDeviceSharding):
        if memory is None:
            return sharding
        # JAX forgets the memory of an array that lies on one device without a mesh.
        sharding = NamedSharding(make_mesh(devices=[device]), PartitionSpec())
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"Expected a leaf on a mesh or on one device, not {sharding}.")
    spec = (*sharding.spec, *(None,) * len(shape))
    names = []
    for size, axes in zip(shape, origin, strict=True):
        listed = [(n,) if isinstance(n, str) else n for n in (spec[axis] for axis in axes) if n]
        name = tuple(part for parts in listed for part in parts)
        whole = size % math.prod(sharding.mesh.shape[part] for part in name) == 0
        names.append((name if len(name) > 1 else name[0]) if name and whole else None)
    return NamedSharding(
        sharding.mesh, PartitionSpec(*names), memory_kind=memory or sharding.memory_kind
    )


def memory_kinds(device: jax.Device) -> list[str]:
    """Return the kinds of memory that a device reaches."""
    return [memory.kind for memory in device.addressable_memories()]


def advance(
    store: Store,
    pages: Pages | None,
    rule: Rule,
    gradient: jax.Array,
    mean: Any,
    square: Any,
    sharding: Any = None,
) -> tuple[jax.Array, Any, Any]:
    """Return (update, mean, square): what `rule` makes of a gradient and of the moments kept.

    sharding: of the leaf, where it is on a mesh.
    """

    def one(gradient: jax.Array, mean: Any, square: Any) -> tuple[jax.Array, Any, Any]:
        before = gradient, mean, square
        update, *new = rule(gradient, store.load(mean, "mean"), store.load(square, "square"))
        kept = update, store.save(new[0], "mean"), store.save(new[1], "square")
        return jax.tree.map(lambda new, old: new.astype(old.dtype), kept, before)

    view = store.view(gradient)
    if pages is None:
        update, mean, square = one(view, mean, square)
        return store.restore(update), mean, square

    def move(tree: Any, space: Any) -> Any:
        return tree if pages.memory is None else jax.device_put(tree, space)

    def beside(tree: Any) -> Any:
        # As the page's moments are stored: where blocks do not divide over the mesh, the compiler
        # would choose another sharding, and change it on the host, through which chips are slow.
        if pages.memory is None or not isinstance(sharding, NamedSharding):
            return tree
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(
                x, placed(sharding, x.shape, store.origin, None)
            ),
            tree,
        )

    def turn(page: jax.Array, arrays: Any) -> Any:
        # Everything is read from and written to where it lies: the update takes the gradient's
        # place, and of what lies on the host no second copy is made there.
        gradients, *kept = arrays
        part = jax.lax.dynamic_index_in_dim(gradients, page, pages.axis + 1, keepdims=False)
        here = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, page, 0, False), kept)
        update, *new = one(part, *beside(move(here, Space.Device)))
        gradients = jax.lax.dynamic_update_index_in_dim(gradients, update, page, pages.axis + 1)
        kept = jax.tree.map(
            lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, page, 0),
            kept,
            move(beside(new), Space.Host),
        )
        return gradients, *kept

    arrays = pages.split_axis(view), mean, square
    updates, mean, square = jax.lax.fori_loop(0, pages.count, turn, arrays)
    return store.restore(pages.merge_axis(updates)), mean, square


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
    pages = pages_of(Store(whole), whole, paged=True)
    if pages is None or (
        paged != jax.eval_shape(pages.to_pages, jax.ShapeDtypeStruct(whole, moment.dtype)).shape
    ):
        return None
    paging = moment.shape == paged
    axes = Store(whole).origin
    origin = tuple((axis + 1,) for (axis,) in axes) if paging else ((), *axes)
    there = placed(moment.sharding, shape, origin, None)

    def turn(x: jax.Array) -> jax.Array:
        change = pages.to_pages if paging else pages.from_pages
        if moment.sharding.memory_kind != HOST:
            return change(x)
        return jax.device_put(change(jax.device_put(x, Space.Device)), Space.Host)

    return (
        jax.ShapeDtypeStruct(shape, moment.dtype, sharding=there),
        jax.jit(turn, out_shardings=moment.sharding),
    )
