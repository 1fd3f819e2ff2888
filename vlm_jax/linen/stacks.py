"""Along which axis of its parameters a foreign module's layers are stacked, as traces tell."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from vlm_jax.trees import flatten, unflatten

PROBE = "vlm_jax_probe"  # a leaf that is there for one trace
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers that an nn.scan or nn.vmap slices. root: the path of the module that is lifted.

    axis: of its parameters, counted from behind where it is negative. count: how many layers.
    """

    root: str
    axis: int
    count: int

    def lay(self, leaf: jax.Array) -> jax.Array:
        """Return [layers, ...] as the scan or vmap takes it."""
        return jnp.moveaxis(leaf, 0, self.axis)

    def takes(self, rank: int) -> bool:
        """Return whether a layer's leaf of `rank` axes can be stacked along this one."""
        return -rank - 1 <= self.axis <= rank


def unboxed(leaf: Any) -> Any:
    """Return a leaf without the box that `nn.with_partitioning` puts it in."""
    return meta.unbox(leaf)


def joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def lies_in(path: str, root: str) -> bool:
    """Return whether a path is the root's or below it."""
    return not root or path == root or path.startswith(f"{root}/")


def without(shape: Shape, axis: int) -> Shape | None:
    """Return a shape without one of its axes; None where it has no such axis."""
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def shapes_inside(path: str, module: nn.Module, flat: Mapping[str, Any]) -> list[tuple]:
    """Return, of each parameter of a module at work, (its shape there, its shape as stored)."""
    pairs = []
    for name, leaf in flatten(module.variables.get("params", {})).items():
        stored = flat.get(joined(path, name))
        if stored is None:  # a module of its own inside a layer: a 4-bit layer makes one
            return []
        pairs.append((tuple(unboxed(leaf).shape), tuple(unboxed(stored).shape)))
    return pairs


def axes_lost(pairs: list[tuple]) -> int:
    """Return how many axes a module's parameters lost on their way in: one in a stack."""
    return max((0, *(len(stored) - len(inner) for inner, stored in pairs)))


def stack_of(
    root: str, pairs: list[tuple], flat: Mapping[str, Any], trace: Callable[[Any], Any]
) -> Stack | None:
    """Return the stack that a module is, whose parameters came in as `pairs` say, or None.

    Where their shapes fit several axes, each is tried: a probe that has the stack's length along
    this axis alone lies beside the parameters, and `trace`, a call on shapes, fails for all but the
    one that is sliced. The probe has so many axes that one counted from behind is none of those
    counted from the front.
    """
    most = max(len(inner) for inner, _ in pairs)
    axes = [
        axis
        for axis in (*range(most + 1), *range(-1, -most - 2, -1))
        if all(without(stored, axis) == inner for inner, stored in pairs)
    ]
    for axis in axes:
        count = pairs[0][1][axis]
        if len(axes) > 1:
            shape = [2 if count == 1 else 1] * (2 * most + 2)
            shape[axis] = count
            probe = {joined(root, PROBE): jax.ShapeDtypeStruct(tuple(shape), jnp.float32)}
            try:
                trace(unflatten({**flat, **probe}))
            except Exception:  # whatever JAX raises for lengths that differ
                continue
        return Stack(root, axis, count)
    return None
