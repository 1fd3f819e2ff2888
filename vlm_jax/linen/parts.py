"""The parts of a Linen module, described: layers that are matrices, modules as they are called."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.linen.stacks import Stack, unboxed

WEIGHTS = ("kernel", "embedding")  # the leaves that make their module a layer


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose weight is one matrix [in, out], or one a layer of a stack.

    path: of the module, joined by "/". weight: the leaf's name. shape: one layer's own weight's.
    inputs, outputs: its axes that make `in` and `out`. stack: what slices the leaf, or None.
    attended: an embedding that is a head too, by `attend`. hears: whether a "dropout" rng that
    `apply` is given reaches the layer, as far as a trace saw it.
    """

    path: str
    weight: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: Stack | None = None
    attended: bool = False
    hears: bool = True

    @property
    def name(self) -> str:
        return self.path.replace("/", ".")

    @property
    def leaf(self) -> str:
        return f"{self.path}/{self.weight}" if self.path else self.weight

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axis of a stack's matrices."""
        return () if self.stack is None else (self.stack.count,)

    @property
    def size(self) -> tuple[int, int]:
        """in and out."""
        inside, outside = (
            math.prod(self.shape[i] for i in axes) for axes in (self.inputs, self.outputs)
        )
        return inside, outside

    def matrix(self, weight: jax.Array) -> jax.Array:
        """Return a weight as [in, out] or [layers, in, out]."""
        if self.stack is not None:
            weight = jnp.moveaxis(weight, self.stack.axis, 0)
        lead = len(self.layers)
        order = (*range(lead), *(lead + i for i in (*self.inputs, *self.outputs)))
        return weight.transpose(order).reshape(*self.layers, *self.size)

    def unmatrix(self, matrix: jax.Array) -> jax.Array:
        """Return the weight that `matrix` was given."""
        lead, order = len(self.layers), (*self.inputs, *self.outputs)
        weight = matrix.reshape(*self.layers, *(self.shape[i] for i in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        weight = weight.transpose((*range(lead), *(lead + i for i in back)))
        return weight if self.stack is None else self.stack.lay(weight)


@dataclasses.dataclass(frozen=True)
class Other:
    """A module that has a kernel, but is no layer that can be adapted: why.

    unknown: it may be one, but no trace reached it.
    """

    path: str
    why: str
    unknown: bool = False

    @property
    def name(self) -> str:
        return self.path.replace("/", ".")


@dataclasses.dataclass(frozen=True)
class Site:
    """A module whose `__call__` was met.

    path: joined by "/". kind: its class. x, y: the shapes of its first argument and of what it
    gives, or, where that is no array of floating-point numbers, what it is instead. depth: how many
    axes its parameters lost on their way in. stack: what slices them, or None. hears: as a layer's.
    """

    path: str
    kind: str
    x: tuple[int, ...] | str
    y: tuple[int, ...] | str
    depth: int
    hears: bool
    stack: Stack | None = None

    @property
    def name(self) -> str:
        return self.path.replace("/", ".")

    def beside(self, other: "Site") -> "Site":
        """Return the same module of two calls: a side whose width differs has none."""
        sides = ((side, getattr(self, side), getattr(other, side)) for side in ("x", "y"))
        changes = {side: "arrays of several widths" for side, a, b in sides if a[-1:] != b[-1:]}
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a module has. layers: all that have a kernel or embedding, in the tree's order.

    sites: every module by path; None: no call that was traced reached it.
    """

    layers: list[Layer | Other]
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
    found = {}
    for path in flat:
        module, _, name = path.rpartition("/")
        if name in WEIGHTS and len(unboxed(flat[path]).shape) > 1:
            found[module] = name
    return found
