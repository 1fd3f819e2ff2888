"""Discovery of a Linen module's layers, by a trace on shapes alone."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList

from vlm_jax.errors import UserError
from vlm_jax.linen.intercept import ATTEND, CALLS, EMBED, NNX, interceptor, product
from vlm_jax.linen.parts import (
    Found,
    Layer,
    Other,
    Site,
    Stack,
    axes_lost,
    first_argument,
    joined,
    lies_in,
    owners,
    shape_of,
    shapes_inside,
    stack_of,
    unboxed,
    without,
)
from vlm_jax.weights import FourBit


def see(
    module: nn.Module, params: Mapping[str, Any], flat: Mapping[str, Any], args: tuple, kwargs: dict
) -> Found:
    """Call the module on shapes alone, and return what was met."""
    seen = Found({}, {})
    roots: dict[str, list[tuple]] = {}  # of stacks: shapes
    weights = owners(flat)
    at_work: list[tuple[str, str, int]] = []  # paths, methods, and the depths of their parameters

    def record(next_method: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.module.scope is None or context.method_name == "setup":
            return next_method(*args, **kwargs)
        path = "/".join(context.module.scope.path)
        pairs = shapes_inside(path, context.module, flat)
        if axes_lost(pairs) and not any(lies_in(path, root) for root in roots):
            roots[path] = pairs
        _record_layer(seen, path, weights, args, kwargs, context)
        depth = max([axes_lost(pairs), *(deep for *_, deep in at_work[-1:])])
        me = path, context.method_name, depth
        again = any((outer, name) == me[:2] for outer, name, _ in at_work)  # super()'s, for one
        at_work.append(me)
        try:
            y = next_method(*args, **kwargs)
        finally:
            at_work.pop()
        if context.method_name == "__call__" and not again:
            kind, takes_dropout = type(context.module), context.module.has_rng("dropout")
            x_shape = shape_of(first_argument(context.orig_method, args, kwargs))
            made = "what an NNX module makes" if kind.__module__.startswith(NNX) else shape_of(y)
            site = Site(path, kind.__name__, x_shape, made, depth, takes_dropout)
            seen.sites[path] = site.beside(seen.sites.get(path) or site)
        return y

    trace = _tracer(module, args, kwargs)
    trace(params, record)
    stacks = {root: stack_of(root, pairs, flat, trace) for root, pairs in roots.items()}

    def stack(path: str) -> Stack | None:
        return next((stacks[root] for root in stacks if lies_in(path, root)), None)

    layers = {
        path: _with_stack(layer, stack(path), flat) if isinstance(layer, Layer) else layer
        for path, layer in seen.layers.items()
    }
    return Found(
        layers,
        {
            path: dataclasses.replace(site, stack=stack(path) if site.depth else None)
            for path, site in seen.sites.items()
            if site is not None
        },
    )


def _record_layer(
    seen: Found, path: str, weights: Mapping[str, str], args: tuple, kwargs: dict, context: Any
) -> None:
    """Note a module that has a weight, and of an NNX module all within."""
    name, method = weights.get(path), context.orig_method.func
    if type(context.module).__module__.startswith(NNX):
        seen.layers.update(
            {
                inner: Other(inner, "it belongs to an NNX module")
                for inner in weights
                if lies_in(inner, path)
            }
        )
    elif name is None or (method in CALLS and isinstance(seen.layers.get(path), Layer)):
        pass  # met before: a 4-bit layer calls a copy of itself, which knows no rngs
    elif method in CALLS:
        how = product(CALLS[method], context.module, args, kwargs)
        takes_dropout = context.module.has_rng("dropout")
        seen.layers[path] = (
            Layer(path, name, how.shape, how.inputs, how.outputs, takes_dropout=takes_dropout)
            if how.fault is None
            else Other(path, f"as an nn.Einsum or nn.DenseGeneral {how.fault}")
        )
    elif method in (EMBED, ATTEND):
        size = (context.module.num_embeddings, context.module.features)
        before = seen.layers.get(path)
        attended = method is ATTEND or (isinstance(before, Layer) and before.attended)
        seen.layers[path] = Layer(path, name, size, (0,), (1,), attended=attended)
    elif path not in seen.layers:
        seen.layers[path] = Other(path, f"it is a {type(context.module).__name__}")


def _tracer(module: nn.Module, args: tuple, kwargs: dict) -> Callable[..., None]:
    """Return trace(params, record), which calls the module on shapes alone.

    record: an interceptor, or None.
    """

    def is_array(leaf: Any) -> bool:
        return hasattr(leaf, "shape") and hasattr(leaf, "dtype")

    arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if is_array(leaf)]

    def trace(params: Mapping[str, Any], record: Any = None) -> None:
        def call(params: Any, arrays: list) -> None:
            traced = iter(arrays)
            positional, named = jax.tree.map(
                lambda leaf: next(traced) if is_array(leaf) else leaf, (args, kwargs)
            )
            recording = nn.intercept_methods(record) if record else contextlib.nullcontext()
            with recording, nn.intercept_methods(interceptor()):
                module.apply(
                    {"params": params}, *positional, **named, mutable=DenyList("params"),
                    rngs=dict.fromkeys(("params", "dropout"), jax.random.key(0)),
                )  # fmt: skip

        jax.eval_shape(call, params, arrays)

    return trace


def _with_stack(layer: Layer, stack: Stack | None, flat: Mapping[str, Any]) -> Layer | Other:
    """Return a layer with its stack, or why it has none."""
    leaf = unboxed(flat[layer.leaf])
    own, shape = layer.size if isinstance(leaf, FourBit) else layer.shape, tuple(leaf.shape)
    if shape == own:
        return layer
    if stack is not None and without(shape, stack.axis) == own:
        if stack.takes(2):
            return dataclasses.replace(layer, stack=stack)
        return Other(
            layer.path,
            f"its layers are stacked along axis {stack.axis}, and matrices of two axes have none "
            f"such: use nn.scan(..., variable_axes={{'params': 0}})",
        )
    return Other(
        layer.path,
        f"its {layer.weight} {list(shape)} is not that of the layer, {list(own)}, nor one stack of "
        f"them, as nn.scan makes it",
    )


def look(
    module: nn.Module, params: Mapping[str, Any], flat: Mapping[str, Any], inputs: Any
) -> Found:
    """Return what a module has; flat: params by path.

    inputs: what the module is called with, or None: then calls with such arrays as the parameters'
    shapes suggest are tried. Where none works, a kernel of two axes counts as nn.Dense's, which
    `apply` checks, and others are `Other`. Raises `UserError` where a call with `inputs` fails.
    """
    seen = Found({}, {})
    given = [as_arguments(inputs)] if inputs is not None else ((one, {}) for one in guesses(flat))
    for args, kwargs in given:
        try:
            seen = see(module, params, flat, args, kwargs)
            break
        except UserError:
            raise
        except Exception as error:  # whatever a foreign module raises for what it does not take
            if inputs is not None:
                raise UserError(
                    f"The module could not be called with the `inputs` that adapt was given: "
                    f"{type(error).__name__}: {str(error)[:300]}. Give what `module.apply` takes "
                    f"behind the variables: an array, a tuple of arguments, or a dict of named "
                    f"ones."
                ) from error
    layers = {path: _found(path, name, flat, seen) for path, name in owners(flat).items()}
    above = {path[:i] for path in flat for i in range(len(path)) if path[i] == "/"}
    sites: dict[str, Site | None] = dict.fromkeys(("", *sorted(above)))
    return Found(layers, {**sites, **seen.sites})


def as_arguments(inputs: Any) -> tuple[tuple, dict]:
    """Return (args, kwargs) of `adapt`'s inputs."""
    args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (args, {})


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
        roots = {count: math.isqrt(count) for count in counts if count > 0}
        sides = dict.fromkeys(root for count, root in roots.items() if root**2 == count)
        for side in (*sides, 8):
            yield (jax.ShapeDtypeStruct((1, side * height, side * width, channels), jnp.float32),)
    # A stack's first axis is the number of its layers.
    for width in dict.fromkeys(shape[axis] for axis in (0, 1) for shape in kernels.values()):
        yield (jax.ShapeDtypeStruct((1, 4, width), jnp.float32),)
        yield (jax.ShapeDtypeStruct((1, width), jnp.float32),)


def _found(path: str, name: str, flat: Mapping[str, Any], seen: Found) -> Layer | Other:
    if path in seen.layers:
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
