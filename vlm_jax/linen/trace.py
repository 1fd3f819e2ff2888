"""What a trace of a Linen module's call, on shapes alone, meets: layers, modules, stacks."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList

from vlm_jax.linen.additions import NNX, interceptor
from vlm_jax.linen.layers import ATTEND, CALLS, EMBED, product
from vlm_jax.linen.parts import Layer, Other, Site, first_argument, owners, shape_of
from vlm_jax.linen.stacks import (
    Stack,
    axes_lost,
    lies_in,
    shapes_inside,
    stack_of,
    unboxed,
    without,
)
from vlm_jax.weights import FourBit


@dataclasses.dataclass
class Seen:
    """What a trace saw: a module's path -> its layer's own shape and axes, or another class."""

    layers: dict[str, Layer | Other] = dataclasses.field(default_factory=dict)
    sites: dict[str, Site] = dataclasses.field(default_factory=dict)
    roots: dict[str, list[tuple]] = dataclasses.field(default_factory=dict)  # of stacks: shapes


def see(
    module: nn.Module, params: Mapping[str, Any], flat: Mapping[str, Any], args: tuple, kwargs: dict
) -> Seen:
    """Call the module on shapes alone, and return what was met."""
    seen = Seen()
    weights = owners(flat)
    at_work: list[tuple[str, str, int]] = []  # paths, methods, and the depths of their parameters

    def record(next_method: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.module.scope is None or context.method_name == "setup":
            return next_method(*args, **kwargs)
        path = "/".join(context.module.scope.path)
        pairs = shapes_inside(path, context.module, flat)
        if axes_lost(pairs) and not any(lies_in(path, root) for root in seen.roots):
            seen.roots[path] = pairs
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
            x = first_argument(context.orig_method, args, kwargs)
            hears = context.module.has_rng("dropout")
            kind = type(context.module)
            site = Site(path, kind.__name__, shape_of(x), shape_of(y), depth, hears)
            if kind.__module__.startswith(NNX):
                site = dataclasses.replace(site, y="what an NNX module makes")
            seen.sites[path] = site.beside(seen.sites.get(path, site))
        return y

    trace = _tracer(module, args, kwargs)
    trace(params, record)
    stacks = {root: stack_of(root, pairs, flat, trace) for root, pairs in seen.roots.items()}

    def stack(path: str) -> Stack | None:
        return next((stacks[root] for root in stacks if lies_in(path, root)), None)

    for path, layer in seen.layers.items():
        if isinstance(layer, Layer):
            seen.layers[path] = _with_stack(layer, stack(path), flat)
    for path, site in seen.sites.items():
        if site.depth:
            seen.sites[path] = dataclasses.replace(site, stack=stack(path))
    return seen


def _record_layer(
    seen: Seen, path: str, weights: Mapping[str, str], args: tuple, kwargs: dict, context: Any
) -> None:
    """Note a module that has a weight, and of an NNX module all within."""
    name, method = weights.get(path), context.orig_method.func
    if type(context.module).__module__.startswith(NNX):
        for inner in weights:
            if lies_in(inner, path):
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


def _tracer(module: nn.Module, args: tuple, kwargs: dict) -> Callable[..., None]:
    """Return trace(params, *interceptors), which calls the module on shapes alone."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    given = [x for x, is_array in zip(leaves, arrays, strict=True) if is_array]

    def trace(params: Mapping[str, Any], *interceptors: Any) -> None:
        def call(params: Any, given: list) -> None:
            values = iter(given)
            whole = [
                next(values) if is_array else x for x, is_array in zip(leaves, arrays, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(tree, whole)
            key = jax.random.key(0)
            with contextlib.ExitStack() as opened:
                for one in (*interceptors, interceptor()):
                    opened.enter_context(nn.intercept_methods(one))
                module.apply(
                    {"params": params}, *args, **kwargs, mutable=DenyList("params"),
                    rngs={"params": key, "dropout": key},
                )  # fmt: skip

        jax.eval_shape(call, params, given)

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
            f"such: take nn.scan(..., variable_axes={{'params': 0}})",
        )
    return Other(
        layer.path,
        f"its {layer.weight} {list(shape)} is not that of the layer, {list(own)}, nor one stack of "
        f"them, as nn.scan makes it",
    )
