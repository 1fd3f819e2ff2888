"""The one seam for sharding in model code: activations stay with their rows and tokens.

Without it the compiler may follow a kernel's shards instead, and move activations layer by layer
where it should move weights. Weights are gathered layer by layer.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.trees import flatten, map_leaves
from vlm_jax.weights import is_quantized

_rows: ContextVar[NamedSharding | None] = ContextVar("rows", default=None)
_params: ContextVar[tuple[Mapping[str, Any], ...]] = ContextVar("params", default=())
FREE = PartitionSpec.UNCONSTRAINED


@contextlib.contextmanager
def rows_over(sharding: NamedSharding, *params: Mapping[str, Any]) -> Iterator[None]:
    """Keep activations of whatever is traced inside on the devices of their rows and tokens.

    sharding: of a batch's tokens [rows, tokens], each axis over mesh axes. params: trees of arrays,
    or their shapes, of whose leaves `gathered_layer` learns how they are stored.
    """
    tokens = _rows.set(sharding), _params.set(params)
    try:
        yield
    finally:
        _rows.reset(tokens[0])
        _params.reset(tokens[1])


def _axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the mesh axes that rows and tokens are spread over, without those of one device."""
    sharding = _rows.get()
    if sharding is None:
        return (), ()
    both = [(one,) if isinstance(one, str) else one or () for one in (*sharding.spec, None)]
    rows, tokens = (tuple(n for n in one if sharding.mesh.shape[n] > 1) for one in both[:2])
    return rows, tokens


def mesh() -> Any:
    """Return the `Mesh` that rows are spread over; None outside `rows_over`."""
    sharding = _rows.get()
    return None if sharding is None else sharding.mesh


def platform() -> str:
    """Return "tpu", "gpu" or "cpu": of the devices that rows are spread over, or JAX's default."""
    over = mesh()
    if isinstance(over, Mesh):
        return over.devices.flat[0].platform
    return jax.default_backend()


def parts() -> tuple[int, int]:
    """Return over how many devices rows and a row's tokens are spread; 1 outside `rows_over`."""
    rows, tokens = (math.prod(mesh().shape[name] for name in names) for names in _axes())
    return rows, tokens


def axes_of(rows: int, places: int) -> tuple[Any, Any]:
    """Return the mesh axes that so many rows, and places of a row, are spread over; None: none.

    Places are tokens or patches. Where their number does not divide, more rows do, as the images of
    a batch; where those do not either, each device of a row has all its places.
    """
    (over_rows, over_places), sizes = _axes(), parts()
    if places % sizes[1] == 0:
        return over_rows or None, over_places or None
    return (over_rows if rows % math.prod(sizes) else (*over_rows, *over_places)) or None, None


def constrain_rows(x: Any) -> Any:
    """Return x [rows, places, ...] spread by `axes_of` them; as it is outside `rows_over`."""
    if mesh() is None:
        return x
    over = axes_of(x.shape[0], x.shape[1] if x.ndim > 1 else 1)
    spec = PartitionSpec(*over[: x.ndim], *[None] * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), spec))


def places_are_spread() -> bool:
    """Return whether the tokens of a row lie on several devices: then rows must not be merged with
    them, since no sharding describes the merged axis, and each device would get all of it."""
    return bool(_axes()[1])


def gather_places(x: Any) -> Any:
    """Return x [rows, places, ...] with its sequence axis all-gathered: keys and values, which
    every query of the row attends to. As it is where places are not spread."""
    if not places_are_spread():
        return x
    spec = PartitionSpec(FREE, None, *[FREE] * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), spec))


def weights_are_spread() -> bool:
    """Return whether several devices share one copy of the weights: see `gathered_layer`."""
    return mesh() is not None and mesh().shape["fsdp"] > 1


def gathered_layer(prefix: str, layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return one layer's leaves, of a stack at `prefix` in the tree, whole where fsdp spread them.

    What the tensor axis spreads stays so. Their gradients are summed onto the shards. Otherwise the
    compiler passes shards of a kernel on from device to device between partial products, which
    costs a TPU more than a product of the whole. 4-bit leaves gather their codes where they are
    decoded.
    """
    if not weights_are_spread():
        return layer
    stored = {path: leaf for tree in _params.get() for path, leaf in flatten(tree).items()}

    def whole(path: str, leaf: Any) -> Any:
        where = getattr(stored.get(f"{prefix}/{path}"), "sharding", None)
        if is_quantized(leaf) or not isinstance(where, NamedSharding) or "fsdp" not in where.spec:
            return leaf
        return _whole(leaf, NamedSharding(mesh(), PartitionSpec(*where.spec[1:])))

    return map_leaves(whole, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(leaf: jax.Array, stored: NamedSharding) -> jax.Array:
    """Return a leaf gathered over fsdp; its gradient lies as it is stored."""
    spec = PartitionSpec(*(None if name == "fsdp" else name for name in stored.spec))
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(stored.mesh, spec))


_whole.defvjp(
    lambda leaf, stored: (_whole(leaf, stored), None),
    # Whole first: a product that gives shards would pass their sums on from device to device. The
    # compiler makes one reduce-scatter of both.
    lambda stored, _, gradient: (
        jax.lax.with_sharding_constraint(_whole(gradient, stored), stored),
    ),
)
