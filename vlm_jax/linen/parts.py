"""Descriptions of a Linen module's parts: layers, called modules, stacks of layers."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from vlm_jax.trees import flatten, unflatten

PROBE = "vlm_jax_probe"  # a leaf that is there for one trace
Shape = tuple[int, ...]
unboxed = meta.unbox  # a leaf without the box that `nn.with_partitioning` puts it in


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers that an nn.scan or nn.vmap slices. root: the path of the module that is lifted.

    axis: of its parameters, counted from behind where it is negative. count: how many layers.
    """

    root: str
    axis: int
    count: int

    def takes(self, rank: int) -> bool:
        """Return whether a layer's leaf of `rank` axes can be stacked along this one."""
        return -rank - 1 <= self.axis <= rank


def laid(stack: Stack | None, leaves: Any) -> Any:
    """Return leaves [layers, ...] as the scan or vmap takes them; of no stack as they are."""
    return (
        leaves
        if stack is None
        else jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, stack.axis), leaves)
    )


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
    inside = flatten(module.variables.get("params", {}), joined(path, ""))
    if not inside.keys() <= flat.keys():  # a module inside a layer: a 4-bit layer makes one
        return []
    return [(tuple(unboxed(x).shape), tuple(unboxed(flat[p]).shape)) for p, x in inside.items()]


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


def as_weight(matrix: jax.Array, shape: Shape, order: Shape) -> jax.Array:
    """Return a matrix [.., in, out] as the weight [.., *shape], whose axes lie in it in `order`."""
    lead = matrix.shape[:-2]
    back = (len(lead) + order.index(axis) for axis in range(len(order)))
    weight = matrix.reshape(*lead, *(shape[axis] for axis in order))
    return weight.transpose((*range(len(lead)), *back))


WEIGHTS = ("kernel", "embedding")  # the leaves that make their module a layer


@dataclasses.dataclass(frozen=True)
class Part:
    """What every description of a module has. path: of the module, joined by "/"."""

    path: str

    @property
    def name(self) -> str:
        return self.path.replace("/", ".")


@dataclasses.dataclass(frozen=True)
class Layer(Part):
    """A layer whose weight is one matrix [in, out], or one a layer of a stack.

    weight: the leaf's name. shape: one layer's own weight's.
    inputs, outputs: its axes that make `in` and `out`. stack: what slices the leaf, or None.
    attended: an embedding that is a head too, by `attend`. takes_dropout: whether a "dropout" rng
    that `apply` is given reaches the layer, as far as a trace saw it.
    """

    weight: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: Stack | None = None
    attended: bool = False
    takes_dropout: bool = True

    @property
    def names(self) -> dict[str, int | None]:
        """{dotted name: number in a stack}: that of a stack's layer has it behind the stack's."""
        if self.stack is None:
            return {self.name: None}
        head = self.stack.root.replace("/", ".")
        return {
            f"{head}.{i}{self.name.removeprefix(head)}".strip("."): i
            for i in range(self.stack.count)
        }

    @property
    def leaf(self) -> str:
        return joined(self.path, self.weight)

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axis of a stack's matrices."""
        return () if self.stack is None else (self.stack.count,)

    @property
    def size(self) -> tuple[int, int]:
        """in and out."""
        inputs, outputs = ([self.shape[i] for i in axes] for axes in (self.inputs, self.outputs))
        return math.prod(inputs), math.prod(outputs)

    def matrices(self, rank: int) -> dict[str, Shape]:
        """Return {path: shape} of its LoRA's A and B."""
        (inside, outside), base = self.size, joined(self.path, "lora_")
        return {
            f"{base}A": (*self.layers, inside, rank),
            f"{base}B": (*self.layers, rank, outside),
        }

    def matrix(self, weight: jax.Array) -> jax.Array:
        """Return a weight as [in, out] or [layers, in, out]."""
        lead = len(self.layers)
        order = (*range(lead), *(lead + i for i in (*self.inputs, *self.outputs)))
        weight = weight if self.stack is None else jnp.moveaxis(weight, self.stack.axis, 0)
        return weight.transpose(order).reshape(*self.layers, *self.size)

    def unmatrix(self, matrix: jax.Array) -> jax.Array:
        """Return the weight that `matrix` was given."""
        return laid(self.stack, as_weight(matrix, self.shape, (*self.inputs, *self.outputs)))


@dataclasses.dataclass(frozen=True)
class Other(Part):
    """A module that has a kernel, but is no layer that can be adapted: why.

    unknown: it may be one, but no trace reached it.
    """

    why: str
    unknown: bool = False


@dataclasses.dataclass(frozen=True)
class Site(Part):
    """A module whose `__call__` was met.

    kind: its class. x, y: the shapes of its first argument and of what it gives, or, where that is
    no array of floating-point numbers, what it is instead. depth: how many axes its parameters lost
    on their way in. stack: what slices them, or None. takes_dropout: as a layer's.
    """

    kind: str
    x: tuple[int, ...] | str
    y: tuple[int, ...] | str
    depth: int
    takes_dropout: bool
    stack: Stack | None = None

    def beside(self, other: "Site") -> "Site":
        """Return the same module of two calls: a side whose width differs has none."""
        several = "arrays of several widths"
        return dataclasses.replace(
            self,
            x=self.x if self.x[-1:] == other.x[-1:] else several,
            y=self.y if self.y[-1:] == other.y[-1:] else several,
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """What a module has, by path. layers: all that have a kernel or embedding.

    sites: every module; None: no call that was traced reached it.
    """

    layers: dict[str, Layer | Other]
    sites: dict[str, Site | None]


def shape_of(value: Any) -> tuple[int, ...] | str:
    """Return the shape of an array of floating-point numbers, or what a value is instead."""
    if not isinstance(value, jax.Array | np.ndarray):
        return type(value).__name__
    if not jnp.issubdtype(value.dtype, jnp.floating) or not value.shape:
        return f"{value.dtype}{list(value.shape)}"
    return tuple(value.shape)


def first_argument(function: Any, args: tuple, kwargs: dict) -> Any:
    """Return what a method was given first, by position or by name; function: bound."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    return args[0] if args else next(iter(given.values()), None)


def owners(flat: Mapping[str, Any]) -> dict[str, str]:
    """Return {module path: its weight's name} of all modules that have a kernel or embedding."""
    split = {path: path.rpartition("/") for path in flat}
    return {
        module: name
        for path, (module, _, name) in split.items()
        if name in WEIGHTS and len(unboxed(flat[path]).shape) > 1
    }
