"""Which layers of a Linen module there are, found by tracing a call of it on shapes alone."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, meta

from vlm_jax.errors import UserError
from vlm_jax.linen.additions import NNX, interceptor
from vlm_jax.linen.layers import ATTEND, CALLS, EMBED, product
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit

WEIGHTS = ("kernel", "embedding")  # the leaves that make their module a layer


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose weight is one matrix [in, out], or one a layer of a stack.

    path: of the module, joined by "/". weight: the leaf's name. shape: one layer's own weight's.
    inputs, outputs: its axes that make `in` and `out`. stack: the axis of the leaf along which
    layers are stacked, or None; stacked: the module that is (its first parts of the path).
    attended: an embedding that is a head too, by `attend`. hears: whether a "dropout" rng that
    `apply` is given reaches the layer, as far as a trace saw it.
    """

    path: str
    weight: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: int | None = None
    count: int = 1
    stacked: str | None = None
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
        return () if self.stack is None else (self.count,)

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
            weight = jnp.moveaxis(weight, self.stack, 0)
        lead = len(self.layers)
        order = (*range(lead), *(lead + i for i in (*self.inputs, *self.outputs)))
        return weight.transpose(order).reshape(*self.layers, *self.size)

    def unmatrix(self, matrix: jax.Array) -> jax.Array:
        """Return the weight that `matrix` was given."""
        lead, order = len(self.layers), (*self.inputs, *self.outputs)
        weight = matrix.reshape(*self.layers, *(self.shape[i] for i in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        weight = weight.transpose((*range(lead), *(lead + i for i in back)))
        return weight if self.stack is None else jnp.moveaxis(weight, 0, self.stack)


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


def unboxed(leaf: Any) -> Any:
    """Return a leaf without the box that `nn.with_partitioning` puts it in."""
    return meta.unbox(leaf)


def joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def owners(flat: Mapping[str, Any]) -> dict[str, str]:
    """Return {module path: its weight's name} of all modules that have a kernel or embedding."""
    found = {}
    for path in flat:
        module, _, name = path.rpartition("/")
        if name in WEIGHTS and len(unboxed(flat[path]).shape) > 1:
            found[module] = name
    return found


def layers_of(
    module: nn.Module, params: Mapping[str, Any], flat: Mapping[str, Any], inputs: Any
) -> list[Layer | Other]:
    """Return every module that has a kernel or embedding, in the tree's order.

    inputs: what the module is called with, or None: then calls with such arrays as the parameters'
    shapes suggest are tried. Where none works, a kernel of two axes counts as nn.Dense's, which
    `apply` checks, and others are `Other`. Raises `UserError` where a call with `inputs` fails.
    """
    seen: _Seen | None = None
    if inputs is not None:
        try:
            seen = _trace(module, params, flat, *as_arguments(inputs))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"The module could not be called with the `inputs` that adapt was given: "
                f"{type(error).__name__}: {str(error)[:300]}. Give what `module.apply` takes "
                f"behind the variables: an array, a tuple of arguments, or a dict of named ones."
            ) from error
    else:
        for arguments in guesses(flat):
            try:
                seen = _trace(module, params, flat, arguments, {})
                break
            except UserError:
                raise
            except Exception:  # whatever a foreign module raises for what it does not take
                continue
    return [_found(path, name, flat, seen) for path, name in owners(flat).items()]


def as_arguments(inputs: Any) -> tuple[tuple, dict]:
    """Return (args, kwargs) of `adapt`'s inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def guesses(flat: Mapping[str, Any]) -> Iterator[tuple]:
    """Yield arguments that a module with such parameters may take: tokens, images, vectors.

    What is found does not hang on them: a layer's kind and axes are the same for any call.
    """
    shapes = {path: tuple(unboxed(leaf).shape) for path, leaf in flat.items()}
    if any(path.split("/")[-1] == "embedding" for path in shapes):
        yield (jax.ShapeDtypeStruct((1, 4), jnp.int32),)
    kernels = {path: shape for path, shape in shapes.items() if path.split("/")[-1] == "kernel"}
    patches = next((shape for shape in kernels.values() if len(shape) == 4), None)
    if patches is not None:  # as many as a table of positions has rows, with a class token or not
        height, width, channels, _ = patches
        tables = [shape for shape in shapes.values() if shape[-2:-1] and set(shape[:-2]) <= {1}]
        counts = dict.fromkeys(shape[-2] - extra for shape in tables for extra in (0, 1))
        sides = dict.fromkeys(math.isqrt(count) for count in counts if _is_square(count))
        for side in (*sides, 8):
            image = (1, side * height, side * width, channels)
            yield (jax.ShapeDtypeStruct(image, jnp.float32),)
    firsts = [shape[0] for shape in kernels.values()]  # a stack's is the number of its layers
    for width in dict.fromkeys((*firsts, *(shape[1] for shape in kernels.values()))):
        yield (jax.ShapeDtypeStruct((1, 4, width), jnp.float32),)
        yield (jax.ShapeDtypeStruct((1, width), jnp.float32),)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


@dataclasses.dataclass
class _Seen:
    """What a trace saw: a module's path -> its layer's own shape and axes, or another class."""

    layers: dict[str, Layer | Other] = dataclasses.field(default_factory=dict)
    axes: dict[str, int | None] = dataclasses.field(default_factory=dict)  # of stacked modules


def _trace(
    module: nn.Module, params: Mapping[str, Any], flat: Mapping[str, Any], args: tuple, kwargs: dict
) -> _Seen:
    """Call the module on shapes alone, and return the layers that were met."""
    seen = _Seen()
    weights = owners(flat)

    def record(next_method: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.module.scope is None or context.method_name == "setup":
            return next_method(*args, **kwargs)
        path = "/".join(context.module.scope.path)
        _record_stack(seen, path, context.module, flat)
        name, method = weights.get(path), context.orig_method.func
        if type(context.module).__module__.startswith(NNX):
            for inner in weights:
                if not path or f"{inner}/".startswith(f"{path}/"):
                    seen.layers[inner] = Other(inner, "it belongs to an NNX module")
        elif name is None or (method in CALLS and isinstance(seen.layers.get(path), Layer)):
            pass  # met before: a 4-bit layer calls a copy of itself, which knows no rngs
        elif method in CALLS:
            how = product(CALLS[method], context.module, args, kwargs)
            if how.fault is None:
                hears = context.module.has_rng("dropout")
                layer = Layer(path, name, how.shape, how.inputs, how.outputs, hears=hears)
                seen.layers[path] = layer
            else:
                seen.layers[path] = Other(path, f"as an nn.Einsum or nn.DenseGeneral {how.fault}")
        elif method in (EMBED, ATTEND):
            size = (context.module.num_embeddings, context.module.features)
            before = seen.layers.get(path)
            attended = method is ATTEND or (isinstance(before, Layer) and before.attended)
            seen.layers[path] = Layer(path, name, size, (0,), (1,), attended=attended)
        elif path not in seen.layers:
            seen.layers[path] = Other(path, f"it is a {type(context.module).__name__}")
        return next_method(*args, **kwargs)

    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def call(params: Any, given: list) -> None:
        values = iter(given)
        whole = [
            next(values) if is_array else x for x, is_array in zip(leaves, arrays, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(tree, whole)
        key = jax.random.key(0)
        with nn.intercept_methods(record), nn.intercept_methods(interceptor()):
            module.apply(
                {"params": params}, *args, **kwargs, mutable=DenyList("params"),
                rngs={"params": key, "dropout": key},
            )  # fmt: skip

    given = [x for x, is_array in zip(leaves, arrays, strict=True) if is_array]
    jax.eval_shape(call, params, given)
    for path, layer in seen.layers.items():
        if isinstance(layer, Layer):
            seen.layers[path] = _with_stack(layer, seen, flat)
    return seen


def _record_stack(seen: _Seen, path: str, module: nn.Module, flat: Mapping[str, Any]) -> None:
    """Note a module whose parameters come in with one axis less than they are stored with."""
    if path in seen.axes or any(path.startswith(f"{outer}/") for outer in seen.axes):
        return
    pairs = []
    for name, leaf in flatten(module.variables.get("params", {})).items():
        stored = flat.get(joined(path, name))
        if stored is None:
            return
        pairs.append((tuple(unboxed(leaf).shape), tuple(unboxed(stored).shape)))
    if not pairs or all(inner == outer for inner, outer in pairs):
        return
    most = max(len(inner) for inner, _ in pairs)
    for axis in (*range(most + 1), *range(-1, -most - 2, -1)):
        if all(_without(outer, axis) == inner for inner, outer in pairs):
            seen.axes[path] = axis
            return
    seen.axes[path] = None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def _with_stack(layer: Layer, seen: _Seen, flat: Mapping[str, Any]) -> Layer | Other:
    """Return a layer with its stack's axis, or why it has none."""
    leaf = unboxed(flat[layer.leaf])
    own = layer.size if isinstance(leaf, FourBit) else layer.shape
    if tuple(leaf.shape) == own:
        return layer
    for root, axis in seen.axes.items():
        if root == layer.path or layer.path.startswith(f"{root}/"):
            if axis is not None and _without(tuple(leaf.shape), axis) == own:
                count = leaf.shape[axis]
                return dataclasses.replace(layer, stack=axis, count=count, stacked=root)
    shape = list(leaf.shape)
    return Other(
        layer.path,
        f"its {layer.weight} {shape} is not that of the layer, {list(own)}, nor one stack of them, "
        f"as nn.scan makes it",
    )


def _found(path: str, name: str, flat: Mapping[str, Any], seen: _Seen | None) -> Layer | Other:
    if seen is not None and path in seen.layers:
        return seen.layers[path]
    shape = tuple(unboxed(flat[joined(path, name)]).shape)
    if name == "kernel" and len(shape) == 2:
        return Layer(path, name, shape, (0,), (1,))
    return Other(
        path,
        f"no call that was tried reached it, and its {name} {list(shape)} alone does not tell "
        f"which axes are heads, layers or inputs: give adapt `inputs=`, what `module.apply` takes "
        f"behind the variables",
        unknown=True,
    )
