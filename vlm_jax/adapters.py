"""Bottleneck adapters on a parameter tree: fresh ones, several on one base, their average."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError, nearest
from vlm_jax.layers.activations import ACTIVATIONS
from vlm_jax.layers.bottleneck import KINDS, is_adapter
from vlm_jax.lora import is_lora
from vlm_jax.model import Adapter, Model
from vlm_jax.trees import flatten, unflatten

Leaves = dict[str, jax.Array]


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def _truncated(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.01 * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)


def _kaiming(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bound = 1 / math.sqrt(shape[-2])  # a = sqrt(5)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del key
    return jnp.zeros(shape, jnp.float32)


# Name -> how down and up start; biases are zero.
INIT: dict[str, tuple[Callable, Callable]] = {
    "mam_adapter": (_kaiming, _zeros),
    "bert": (_normal, _normal),
    "houlsby": (_truncated, _truncated),
}


def _width(model: Model, stack: str) -> int:
    """Return the width of the blocks of a stack."""
    text = stack.startswith("model/language_model/")
    return model.config.text.hidden_size if text else model.config.vision.width


def shapes(model: Model, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return {path: shape} of the leaves of an adapter. Raises `UserError` for what it lacks."""
    if adapter.non_linearity not in ACTIVATIONS:
        raise UserError(
            f"The adapter's non_linearity '{adapter.non_linearity}' is not known"
            f"{nearest(str(adapter.non_linearity), ACTIVATIONS)}. Known: {', '.join(ACTIVATIONS)}."
        )
    if adapter.init_weights not in INIT:
        raise UserError(
            f"The adapter's init_weights '{adapter.init_weights}' is not known"
            f"{nearest(adapter.init_weights, INIT)}. Known: {', '.join(INIT)}."
        )
    assert adapter.reduction_factor is not None
    if adapter.reduction_factor <= 0:
        raise UserError(
            f"The adapter's reduction_factor is {adapter.reduction_factor:g}; it must be above 0: "
            f"a block of width D gets a bottleneck of D / reduction_factor."
        )
    found: dict[str, tuple[int, ...]] = {}
    for stack, layers in model.family.stacks(model.config).items():
        if model.component(f"{stack}/kernel") not in adapter.components:
            continue
        wide = _width(model, stack)
        low = max(1, int(wide // adapter.reduction_factor))
        for place in KINDS[adapter.kind].places:
            base = f"{stack}/{place}"
            if adapter.norm:
                found[f"{base}/adapter_norm_before/scale"] = (layers, wide)
                found[f"{base}/adapter_norm_before/bias"] = (layers, wide)
            found[f"{base}/adapter_down/kernel"] = (layers, wide, low)
            found[f"{base}/adapter_down/bias"] = (layers, low)
            found[f"{base}/adapter_up/kernel"] = (layers, low, wide)
            found[f"{base}/adapter_up/bias"] = (layers, wide)
    if not found:
        raise UserError(
            f"No adapter can stand in the components {list(adapter.components)}: only the blocks "
            f"of the language_model and of vision take one."
        )
    return found


def add_adapter(
    model: Model, params: Mapping[str, Any], adapter: Adapter, key: jax.Array
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with fresh adapters, float32, stacked by layer.

    The old tree stays as it was, and its arrays are the new one's. Raises `UserError` for settings
    that are not known, and where there are adapters or LoRA already.
    """
    flat = flatten(params)
    if any(is_adapter(path) or is_lora(path) for path in flat):
        raise UserError(
            "These parameters hold LoRA matrices or adapters already. Merge LoRA first; to switch "
            "adapters take with_adapter."
        )
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"The adapter's dropout is {adapter.dropout}; it must be in [0, 1).")
    down, up = INIT[adapter.init_weights] if adapter.init_weights in INIT else (_zeros, _zeros)
    wanted = shapes(model, adapter)
    for path, one in zip(wanted, jax.random.split(key, len(wanted)), strict=True):
        shape = wanted[path]
        if path.endswith("/kernel"):
            flat[path] = (down if "/adapter_down/" in path else up)(one, shape)
        else:
            flat[path] = jnp.full(shape, float(path.endswith("/scale")), jnp.float32)
    return dataclasses.replace(model, adapter=adapter), unflatten(flat)


def adapter_leaves(params: Mapping[str, Any]) -> Leaves:
    """Return {path: leaf} of the adapter that a tree holds: all that differs from its base's."""
    return {path: leaf for path, leaf in flatten(params).items() if is_adapter(path)}


def with_adapter(params: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with another adapter's leaves in the place of its own.

    leaves: of `adapter_leaves`, of an adapter of the same kind and sizes: whatever was compiled for
    the one runs the other. Base arrays are shared. Raises `UserError` where they do not fit.
    """
    flat = flatten(params)
    own = {path: leaf.shape for path, leaf in flat.items() if is_adapter(path)}
    given = {path: leaf.shape for path, leaf in leaves.items()}
    if own != given:
        differ = sorted(p for p in own.keys() | given.keys() if own.get(p) != given.get(p))
        raise UserError(
            f"The adapter does not fit: '{differ[0]}' is {given.get(differ[0])} in it and "
            f"{own.get(differ[0])} in these parameters ({len(differ)} leaves differ). Adapters "
            f"that are switched are of one kind, with one reduction_factor."
        )
    return unflatten({**flat, **leaves})


def average_adapters(
    adapters: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None
) -> Leaves:
    """Return the weighted mean of adapters' leaves (https://arxiv.org/abs/2302.07027).

    weights: one for each, divided by their sum; default: all alike. Raises `UserError` where the
    adapters differ in their leaves.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    total = sum(weights)
    if not adapters or len(weights) != len(adapters) or not total:
        raise UserError(
            f"Averaging takes as many weights as adapters, whose sum is not 0; given are "
            f"{len(adapters)} adapters and the weights {weights}."
        )
    first = {path: leaf.shape for path, leaf in adapters[0].items()}
    for number, other in enumerate(adapters):
        if {path: leaf.shape for path, leaf in other.items()} != first:
            raise UserError(
                f"Adapter {number} differs from the first in its leaves or their shapes: only "
                f"adapters of one kind and one reduction_factor have an average."
            )
    shares = jnp.asarray(weights, jnp.float32) / total
    return {
        path: jnp.einsum("a...,a->...", jnp.stack([one[path] for one in adapters]), shares)
        for path in first
    }
