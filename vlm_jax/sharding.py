"""Meshes and shardings of parameters and batches: one table a family.

Logical axes of a matrix: "embed" is the model width, "wide" whatever fans out of it (heads, the
MLP's hidden width), "vocab" the vocabulary. Rows of a batch spread over data x fsdp, the tokens of
a row over context.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.errors import UserError
from vlm_jax.model import TOKEN_LEAVES, Model
from vlm_jax.models import decoder_config
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.trees import flatten, map_leaves, match, unflatten
from vlm_jax.weights import FourBit, words
from vlm_jax.weights.fourbit import in_words

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")
# Logical axis -> mesh axis.
RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    "wide": "tensor",
    "vocab": "tensor",
    None: None,
}
# Bottlenecks are narrow: only the side of the block's width is worth spreading.
ADAPTER_AXES = [
    (r".*/adapter_down/kernel", ("embed", None)),
    (r".*/adapter_up/kernel", (None, "embed")),
    (r".*/adapter_(down|up|norm_before)/(bias|scale)", (None,)),
]


# The least share of the parameters that an axis which is to spread them has to divide.
LEAST_SPREAD = 0.5


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None, context: int = 1
) -> Mesh:
    """Return a mesh over `devices`; one size may be -1, meaning the rest.

    Axes are of type Auto: the compiler spreads shardings from parameters and batch. Nothing else
    in this library makes a mesh.

    Args:
        data: copies of the model.
        fsdp: devices that share one copy of the parameters, gathered where they are used.
        tensor: devices that share heads and hidden widths.
        devices: default: all.
        context: devices that share the tokens of each row, with keys and values all-gathered, for
            rows too long for one device.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(len(devices), data, fsdp, tensor, context)
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )


def mesh_sizes(devices: int, data: int, fsdp: int, tensor: int, context: int = 1) -> dict[str, int]:
    """Return the size of each axis of a mesh over so many devices, which need not be here.

    Raises `UserError` where the sizes, of which one may be -1, do not multiply to that.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or known < 1 or devices % known or (not free and known != devices):
        raise UserError(
            f"A mesh of {sizes} does not cover {devices} devices. The sizes must multiply to "
            f"the number of devices; one of them may be -1."
        )
    return {**sizes, **dict.fromkeys(free, devices // known)}


def _logical_axes(model: Model, flat: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    """Return each leaf's logical axes; LoRA's follow from the kernel they stand beside."""

    def kernel_of(path: str) -> str:
        if not is_lora(path):
            return path
        module = path.rsplit("/", 1)[0]  # whose kernel may be in another part of the tree
        return f"{module}/{'embedding' if module == model.config.embedding else 'kernel'}"

    table = [*ADAPTER_AXES, *model.config.AXES, *decoder_config.AXES]
    found = match(table, map(kernel_of, flat), "sharding table", unused="allow")
    axes = {}
    for path in flat:
        own = found[kernel_of(path)]
        first, second = (*own[:1], None), (None, *own[1:])
        beside = {
            **{"lora_A": first, "start_A": first, "lora_B": second, "start_B": second},
            **{"lora_magnitude": own[1:], "lora_scale": ()},
        }
        axes[path] = beside.get(path.rsplit("/", 1)[-1], own)
    return axes


def param_shardings(model: Model, params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return a tree of `NamedSharding` for a tree of arrays or shapes; a quantized leaf of them.

    A leading layer axis is never sharded. A dimension that its mesh axis does not divide is
    replicated on that axis. A leaf that no row of the family's table matches raises.
    """
    flat = flatten(params)
    return unflatten(
        {
            path: leaf_sharding(flat[path], axes, mesh)
            for path, axes in _logical_axes(model, flat).items()
        }
    )


def spread(model: Model, params: Mapping[str, Any], axis: str, size: int) -> tuple[float, str]:
    """Return which share of the parameters an axis of such a size divides, and the largest other.

    Of those that the family's table spreads over this axis, which is fsdp or tensor; params: of a
    whole model, arrays or shapes. The other is a leaf's path, "" where there is none.
    """
    flat = flatten(params)
    sizes: dict[str, int] = {}
    others: dict[str, int] = {}
    for path, names in _logical_axes(model, flat).items():
        shape = flat[path].shape
        lengths = dict(zip((RULES[name] for name in names[::-1]), shape[::-1], strict=False))
        if axis in lengths:
            sizes[path] = math.prod(shape)
            if lengths[axis] % size:
                others[path] = sizes[path]
    total = sum(sizes.values())
    share = (total - sum(others.values())) / max(1, total)
    return share, max(others, key=others.__getitem__, default="")


def check_spread(model: Model, params: Mapping[str, Any], mesh: Mesh) -> None:
    """Raise `UserError` where an axis that is to spread parameters leaves most of them whole."""
    for axis in ("fsdp", "tensor"):
        share, other = spread(model, params, axis, mesh.shape[axis])
        if mesh.shape[axis] > 1 and share < LEAST_SPREAD:
            raise UserError(
                f"mesh.{axis} is {mesh.shape[axis]}, which divides {share:.0%} of this model's "
                f"parameters: each device would hold the others whole, as '{other}', "
                f"{list(flatten(params)[other].shape)}. Take a divisor of its sizes, as 2, 4 or 8, "
                f"and mesh.data for the rest."
            )


def leaf_sharding(leaf: Any, axes: tuple[str | None, ...], mesh: Mesh) -> Any:
    """Return a `NamedSharding` by a leaf's logical axes, or for a quantized leaf a leaf of them.

    Scales lie as their codes do, where they divide; otherwise they are replicated on that axis,
    as nested scales and scales of blocks that run over columns always are.
    """

    def place(shape: tuple[int, ...], names: tuple[str | None, ...]) -> NamedSharding:
        """Spread the last dimensions over these mesh axes, where they divide."""
        names = (None,) * (len(shape) - len(names)) + names
        return NamedSharding(
            mesh,
            PartitionSpec(
                *(
                    name if name is not None and size % mesh.shape[name] == 0 else None
                    for size, name in zip(shape, names, strict=True)
                )
            ),
        )

    names = tuple(RULES[axis] for axis in axes)
    if not isinstance(leaf, FourBit):
        return place(leaf.shape, names)
    replicated = NamedSharding(mesh, PartitionSpec()) if leaf.double else None
    # While it is decoded, a kernel is split by the tensor axis alone.
    kept = tuple(None if name == "fsdp" else name for name in names)
    axes_of_scales = 2 if leaf.aligned else 1
    used = (
        place(leaf.codes.shape[-2:], kept),
        place(leaf.absmax.shape[-axes_of_scales:], kept if leaf.aligned else ()),
    )
    return dataclasses.replace(
        leaf,
        codes=place(leaf.codes.shape, names),
        absmax=place(leaf.absmax.shape, names if leaf.aligned else ()),
        nested=replicated,
        offset=replicated,
        used=used if mesh.size > 1 else None,
    )


def laid_out(model: Model, params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return the tree, of arrays or shapes, whose 4-bit kernels lie as the mesh decodes them best.

    In words on TPUs (see `weights.words`), where each axis of the mesh cuts words, and what it
    leaves of a kernel fits the layout too; else as they are.
    """
    if platform(mesh) != "tpu":
        return dict(params)
    flat = flatten(params)
    axes = _logical_axes(model, flat)
    return unflatten(
        {
            path: in_words(leaf) if _takes_words(leaf, axes[path], mesh) else leaf
            for path, leaf in flat.items()
        }
    )


def platform(mesh: Any) -> str | None:
    """Return the platform of a mesh's devices; None where it has none, as an abstract one."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None


def _takes_words(leaf: Any, axes: tuple[str | None, ...], mesh: Mesh) -> bool:
    """Return whether each shard of a leaf, as it lies and as it is decoded, may be words."""
    if not isinstance(leaf, FourBit) or leaf.in_words:
        return False
    sizes = []
    for size, axis in zip(leaf.shape[-2:], axes[-2:], strict=True):
        name = RULES[axis]
        parts = 1 if name is None or size % mesh.shape[name] else mesh.shape[name]
        sizes.append((size // parts, size if name == "fsdp" else size // parts))
    (stored, inputs), (_, outputs) = sizes
    return stored % words.CODES == 0 and words.fits(inputs, outputs, leaf.block)


def used_on_mesh(params: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree, of arrays or shapes, whose quantized leaves know how they are used there.

    shardings: a tree whose quantized leaves know it.
    """
    where = flatten(shardings)
    return map_leaves(
        lambda path, leaf: (
            dataclasses.replace(leaf, used=where[path].used) if isinstance(leaf, FourBit) else leaf
        ),
        params,
    )


def gathered(model: Model, params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return the tree, inside a program, with each leaf whole where fsdp had spread it.

    For what a loop uses again and again: the compiler would gather it in each turn.
    """

    def whole(array: Any, sharding: NamedSharding) -> Any:
        names = (None if name == "fsdp" else name for name in sharding.spec)
        where = NamedSharding(mesh, PartitionSpec(*names))
        return jax.lax.with_sharding_constraint(array, where)

    shardings = used_on_mesh(param_shardings(model, params, mesh), params)
    return jax.tree.map(whole, dict(params), shardings)


def shard_params(model: Model, params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return the tree with every leaf placed on its shards, in the layout of its devices."""
    params = laid_out(model, params, mesh)
    shardings = param_shardings(model, params, mesh)
    return jax.tree.map(put, used_on_mesh(params, shardings), shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Return the tree with every leaf replicated."""
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def put(leaf: Any, sharding: Any) -> jax.Array:
    """Return an array on its shards; sharding: a mesh's, one device's, or None for the default.

    On a mesh of several processes each gives the whole array, equal in all, and keeps the shards
    of its devices: nothing is sent, and nothing compared, as `jax.device_put` would.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        move = jax.jit(lambda x: x, out_shardings=sharding)
        return leaf if leaf.sharding == sharding else move(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(leaf)
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=impl)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def mesh_under(tree: Any) -> Mesh | None:
    """Return the mesh of `make_mesh` that a tree's arrays lie on; None where there is none."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
    mesh = next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)
    return mesh if mesh is not None and mesh.axis_names == AXES else None


def row_parts(mesh: Mesh) -> int:
    """Return over how many parts a batch's rows are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): which of `count` equal shares of a batch's rows this process gives.

    Rows lie over data x fsdp in the mesh's order; a process gives those of its devices, in that
    order. Processes whose devices hold the same rows, as where the tensor or context axis runs
    across them, give the same share. Raises `UserError` where two processes share some rows and not
    others.
    """
    return share_of(jax.process_index(), _holders(mesh))


def _holders(mesh: Mesh) -> list[list[int]]:
    """Return the processes that hold each of the data * fsdp parts of a batch's rows."""
    parts = mesh.devices.reshape(-1, mesh.shape["tensor"] * mesh.shape["context"])
    return [[device.process_index for device in part] for part in parts]


def share_of(process: int, holders: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return `row_share` of a process. holders: of each part of the rows, the devices' processes.

    [[0, 0], [0, 0], [1, 1], [1, 1]] gives process 1 share (1, 2); [[0, 1], [0, 1]] gives both
    (0, 1).
    """
    parts = {
        owner: [part for part, owners in enumerate(holders) if owner in owners]
        for owner in set(itertools.chain(*holders))
    }
    shares = sorted({tuple(found) for found in parts.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(holders):
        described = "; ".join(f"process {p}: {found}" for p, found in sorted(parts.items()))
        raise UserError(
            f"With this mesh processes hold some rows of a batch together and others alone "
            f"(parts of data x fsdp: {described}), so that no process knows its rows. Choose "
            f"mesh.data and mesh.fsdp such that mesh.tensor x mesh.context divides the devices of "
            f"one process, or is a multiple of them."
        )
    return shares.index(tuple(parts[process])), len(shares)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Return the sharding of each leaf of a `Batch`: rows over data x fsdp, tokens over context.

    Patches are replicated on the devices of their row. Of any other tree only rows are spread.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        tokens = isinstance(batch, Batch) and path[0].name in TOKEN_LEAVES
        rest = [None] * (leaf.ndim - 2) + ["context"] if tokens else []
        return NamedSharding(mesh, PartitionSpec(BATCH, *rest))

    return jax.tree_util.tree_map_with_path(place, batch)


def check_lengths(mesh: Mesh, lengths: Iterable[int]) -> None:
    """Raise `UserError` where rows of so many tokens do not spread over mesh.context."""
    for length in lengths:
        if length % mesh.shape["context"]:
            raise UserError(
                f"Rows of {length} tokens do not spread over mesh.context = "
                f"{mesh.shape['context']} devices: set data.max_seq_length to a multiple of it, or "
                f"mesh.context to what divides it."
            )


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Return the batch on the mesh, see `batch_shardings`.

    Each process gives its share of the rows, see `row_share`, with all their tokens.
    """
    holders = _holders(mesh)
    mine = [part for part, owners in enumerate(holders) if jax.process_index() in owners]
    count = len(holders) // len(mine)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        own = np.asarray(leaf)
        rows = len(own) // len(mine)  # of a part

        def shard(where: Any) -> np.ndarray:
            begin = mine.index((where[0].start or 0) // rows) * rows if rows else 0
            return own[(slice(begin, begin + rows), *where[1:])]

        return jax.make_array_from_callback((count * len(own), *own.shape[1:]), sharding, shard)

    return jax.tree.map(place, batch, batch_shardings(batch, mesh))
