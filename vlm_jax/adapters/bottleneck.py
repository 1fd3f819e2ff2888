"""Bottleneck adapters on a parameter tree: initialisation, switching, averaging."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from vlm_jax.adapters.added_tokens import is_added
from vlm_jax.adapters.modules_to_save import saved_modules
from vlm_jax.errors import UserError, nearest, refuse
from vlm_jax.model import Model
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.bottleneck import KINDS, is_adapter
from vlm_jax.models.layers.linear import fresh_a, is_lora
from vlm_jax.models.methods import Adapter
from vlm_jax.trees import flatten, unflatten

_normal, _truncated = initializers.normal(0.02), initializers.truncated_normal(0.01)
# Name -> how down and up start; biases are zero.
INIT: dict[str, tuple[Callable, Callable]] = {
    "mam_adapter": (fresh_a, initializers.zeros),
    "bert": (_normal, _normal),
    "houlsby": (_truncated, _truncated),
}


def check_known(adapter: Adapter) -> None:
    """Raise `UserError` for words and numbers of an adapter that mean nothing."""
    for name, known in (("non_linearity", ACTIVATIONS), ("init_weights", INIT)):
        word = getattr(adapter, name)
        if word not in known:
            raise UserError(
                f"The adapter's {name} '{word}' is not known{nearest(word, known)}. Known: "
                f"{', '.join(known)}."
            )
    assert adapter.reduction_factor is not None
    refuse(
        (
            not 1e-3 <= adapter.reduction_factor <= 1e6,  # as of a config, see RANGES
            f"The adapter's reduction_factor is {adapter.reduction_factor:g}; it must be between "
            f"0.001 and 1e+06: a block of width D gets a bottleneck of D / reduction_factor.",
        ),
        (
            not 0 <= adapter.dropout < 1,
            f"The adapter's dropout is {adapter.dropout}; it must be in [0, 1).",
        ),
    )


def leaf_shapes(
    adapter: Adapter, base: str, inside: int, outside: int, lead: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Return {path: shape} of the leaves of one bottleneck, or of a stack of them.

    base: what their paths start with, "block/attention_adapters/". inside, outside: the widths of
    what it reads and of what it gives, D / reduction_factor of the latter that of the bottleneck.
    lead: (layers,) of a stack, else ().
    """
    assert adapter.reduction_factor is not None
    low = max(1, int(outside // adapter.reduction_factor))
    leaves: dict[str, tuple[int, ...]] = {
        "adapter_norm_before/scale": (inside,),
        "adapter_norm_before/bias": (inside,),
        "adapter_down/kernel": (inside, low),
        "adapter_down/bias": (low,),
        "adapter_up/kernel": (low, outside),
        "adapter_up/bias": (outside,),
    }
    return {
        f"{base}{leaf}": (*lead, *shape)
        for leaf, shape in leaves.items()
        if adapter.norm or "norm" not in leaf
    }


def fresh(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], key: jax.Array
) -> dict[str, jax.Array]:
    """Return {path: float32 leaf} as an adapter starts; shapes: as `leaf_shapes` gives them."""
    down, up = INIT[adapter.init_weights]
    starts = {
        "down/kernel": down,
        "up/kernel": up,
        "bias": initializers.zeros,
        "scale": initializers.ones,
    }
    return {
        path: next(start for end, start in starts.items() if path.endswith(end))(one, shapes[path])
        for path, one in zip(shapes, jax.random.split(key, len(shapes)), strict=True)
    }


def shapes(model: Model, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return {path: shape} of the leaves of an adapter. Raises `UserError` for what it lacks."""
    check_known(adapter)
    found: dict[str, tuple[int, ...]] = {}
    text, vision = model.config.text, model.config.vision
    for stack, layers in model.config.stacks.items():
        part = model.component(f"{stack}/kernel")
        for place in KINDS[adapter.kind].places if part in adapter.components else ():
            width = text.hidden_size if part == "language_model" else vision.width
            found |= leaf_shapes(adapter, f"{stack}/{place}/", width, width, (layers,))
    if not found:
        raise UserError(
            f"No adapter can stand in the components {list(adapter.components)}: only the blocks "
            f"of the language_model and of vision take one."
        )
    return found


def add_adapter(
    model: Model, params: Mapping[str, Any], adapter: Adapter, key: jax.Array
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with new adapters: float32 leaves, stacked by layer.

    Args:
        model: the model without adapters and LoRA.
        params: its tree; it stays as it was, and its arrays are the new tree's.
        adapter: kind, reduction factor and components.
        key: for initialisation.

    Raises:
        UserError: for unknown settings, and where the tree holds adapters or LoRA already.
    """
    flat = flatten(params)
    check_bare(flat)
    if adapter.targets:
        raise UserError(
            f"The adapter has targets={adapter.targets!r}, which are for the modules that adapt "
            f"takes: in this library's own models the kind says where adapters stand, and "
            f"components in which part. Leave targets out."
        )
    flat |= fresh(adapter, shapes(model, adapter), key)
    return dataclasses.replace(model, adapter=adapter), unflatten(flat)


def check_bare(flat: Iterable[str]) -> None:
    """Raise `UserError` where a flat tree holds LoRA factors or bottleneck adapters."""
    if any(is_adapter(path) or is_lora(path) for path in flat):
        raise UserError(
            "These parameters hold LoRA factors or an adapter already. Merge LoRA first; put each "
            "adapter onto the base, and switch by with_adapter."
        )


def check_no_adapter(flat: Iterable[str], why: str) -> None:
    """Raise `UserError` where a flat tree holds bottleneck adapters."""
    if any(map(is_adapter, flat)):
        raise UserError(
            f"These parameters hold bottleneck adapters, which no weight can stand for: between "
            f"their two layers is a non-linearity. {why} them: save them with save_adapter."
        )


@dataclasses.dataclass(frozen=True)
class TakenAdapter:
    """An adapter apart from its base. leaves: {path: array}, of what trained beside it too."""

    adapter: Adapter
    leaves: dict[str, Any]


def take_adapter(model: Model, params: Mapping[str, Any]) -> TakenAdapter:
    """Return the adapter that a tree holds: all by which it differs from its base's.

    That is the bottlenecks, the modules of `modules_to_save`, such as the projector, and rows of
    new tokens. Raises `UserError` where there is none.
    """
    flat = flatten(params)
    if model.adapter is None or not any(map(is_adapter, flat)):
        raise UserError("These parameters hold no bottleneck adapter: add or load one first.")
    saved = saved_modules(model, params, model.modules_to_save).leaves
    return TakenAdapter(
        model.adapter,
        {p: x for p, x in flat.items() if is_adapter(p) or is_added(p) or p in saved},
    )


def with_adapter(model: Model, params: Mapping[str, Any], other: TakenAdapter) -> dict[str, Any]:
    """Return the tree with another adapter in the place of its own.

    other: of `take_adapter`, of the same kind and sizes, with the same modules beside it: whatever
    was compiled for the one runs the other. Base arrays are shared. Raises `UserError` where it
    does not fit.
    """
    _check_alike(take_adapter(model, params), other)
    return unflatten({**flatten(params), **other.leaves})


def average_adapters(
    adapters: Sequence[TakenAdapter], weights: Sequence[float] | None = None
) -> TakenAdapter:
    """Return the weighted mean of adapters' leaves (https://arxiv.org/abs/2302.07027).

    weights: one for each, divided by their sum; default: all alike. Raises `UserError` where the
    adapters differ in more than their values.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    total = sum(weights)
    if not adapters or len(weights) != len(adapters) or not total:
        raise UserError(
            f"Averaging takes as many weights as adapters, whose sum is not 0; given are "
            f"{len(adapters)} adapters and the weights {weights}."
        )
    for other in adapters[1:]:
        _check_alike(adapters[0], other)
    shares = jnp.asarray(weights, jnp.float32) / total
    return TakenAdapter(
        adapters[0].adapter,
        jax.tree.map(
            lambda *leaves: jnp.einsum("a...,a->...", jnp.stack(leaves), shares),
            *(one.leaves for one in adapters),
        ),
    )


def _check_alike(first: TakenAdapter, second: TakenAdapter) -> None:
    """Raise `UserError` where two adapters do not compute alike, or differ in their leaves."""
    for name in ("reads", "non_linearity", "scaling"):
        one, two = (getattr(taken.adapter.form, name) for taken in (first, second))
        if one != two:
            raise UserError(
                f"The adapters differ: {name} is {one!r} in one and {two!r} in the other. Adapters "
                f"that are switched or averaged are of one kind."
            )
    one, two = ({p: x.shape for p, x in taken.leaves.items()} for taken in (first, second))
    if one != two:
        differ = sorted(p for p in one.keys() | two.keys() if one.get(p) != two.get(p))
        raise UserError(
            f"The adapters differ: '{differ[0]}' is {one.get(differ[0])} in one and "
            f"{two.get(differ[0])} in the other ({len(differ)} leaves differ). Those that are "
            f"switched or averaged have one reduction_factor and the same modules_to_save."
        )
