"""Linen's layers as products of matrices: which axes of a kernel are its inputs and its outputs.

Every linear layer is an einsum of x and its kernel. Letters that are summed make `in`, letters that
only the kernel and y have make `out`, in the kernel's order, so that a kernel of any rank is one
matrix [in, out] and LoRA is that of a plain linear layer.
"""

import dataclasses
import math
import string
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from opt_einsum.parser import parse_einsum_input


@dataclasses.dataclass(frozen=True)
class Product:
    """y = einsum(x, kernel): the letters of the axes of each, and the kernel's shape."""

    x: str
    kernel: str
    y: str
    shape: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The kernel's axes that are summed."""
        return tuple(i for i, axis in enumerate(self.kernel) if axis not in self.y)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The kernel's axes that x has not."""
        return tuple(i for i, axis in enumerate(self.kernel) if axis not in self.x)

    @property
    def fault(self) -> str | None:
        """Why this is no product of two matrices, or None."""
        both = [axis for axis in self.kernel if axis in self.x and axis in self.y]
        if both:
            return f"it has a kernel of its own for each index of a batch axis ({', '.join(both)})"
        if any(axis not in self.x + self.y for axis in self.kernel):
            return "it sums over an axis that its kernel alone has"
        if any(len(set(axes)) < len(axes) for axes in (self.x, self.kernel, self.y)):
            return "it takes a diagonal"
        if not self.inputs or not self.outputs:
            return "it sums over no axis, or over all of its kernel's"
        return None

    def rows(self, x: jax.Array) -> jax.Array:
        """Return x as [rows ..., in]."""
        summed = "".join(self.kernel[i] for i in self.inputs)
        kept = "".join(axis for axis in self.x if axis in self.y)
        x = jnp.einsum(f"{self.x}->{kept}{summed}", x)
        return x.reshape(*x.shape[: len(kept)], math.prod(x.shape[len(kept) :]))

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """Return [rows ..., out] as y."""
        made = "".join(self.kernel[i] for i in self.outputs)
        kept = "".join(axis for axis in self.x if axis in self.y)
        sizes = (self.shape[i] for i in self.outputs)
        return jnp.einsum(f"{kept}{made}->{self.y}", rows.reshape(*rows.shape[:-1], *sizes))


def _dense(module: nn.Dense, x: jax.Array) -> Product:
    rows = string.ascii_letters[: x.ndim - 1]
    return Product(rows + "Y", "YZ", rows + "Z", (x.shape[-1], module.features))


def _dense_general(module: nn.DenseGeneral, x: jax.Array) -> Product:
    def as_tuple(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    features = as_tuple(module.features)
    axes = string.ascii_letters[: x.ndim]
    made = string.ascii_letters[x.ndim : x.ndim + len(features)]
    batch, summed = (  # the kernel has them sorted, whatever order they are given in
        sorted(axis % x.ndim for axis in as_tuple(given))
        for given in (module.batch_dims, module.axis)
    )
    lead = "".join(axes[i] for i in batch)
    rest = "".join(axes[i] for i in range(x.ndim) if i not in batch and i not in summed)
    kernel = lead + "".join(axes[i] for i in summed) + made
    shape = tuple(x.shape[i] for i in (*batch, *summed)) + features
    return Product(axes, kernel, lead + rest + made, shape)


def _einsum(module: nn.Einsum, x: jax.Array, einsum_str: str | None = None) -> Product:
    shape = tuple(module.shape)
    text = (module.einsum_str or einsum_str or "").replace(" ", "")
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    operands, y, _ = parse_einsum_input((text, jax.ShapeDtypeStruct(x.shape, x.dtype), kernel))
    left, right = operands.split(",")
    return Product(left, right, y, shape)


# How a linear layer multiplies, from the module and the arguments of its call.
LINEAR: dict[type[nn.Module], Callable[..., Product]] = {
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Einsum: _einsum,
}


def function(method: Any) -> Any:
    """Return the function that `orig_method.func` of an interceptor's context is."""
    return method.__wrapped__


# The same by the very function that runs: a subclass that calls super() is met there, once.
CALLS: dict[Any, type[nn.Module]] = {function(cls.__call__): cls for cls in LINEAR}
EMBED, ATTEND = function(nn.Embed.__call__), function(nn.Embed.attend)


def product(layer: type[nn.Module], module: nn.Module, args: tuple, kwargs: dict) -> Product:
    """Return how this call of a linear layer multiplies; layer: its entry of `LINEAR`."""
    given = dict(kwargs)
    x = args[0] if args else given.pop("inputs")
    return LINEAR[layer](module, jnp.asarray(x), *args[1:], **given)


def first(args: tuple, kwargs: dict) -> Any:
    """Return the array that a layer was called with."""
    return args[0] if args else kwargs["query" if "query" in kwargs else "inputs"]
