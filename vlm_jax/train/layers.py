"""Rates that differ by layer: the lowest blocks frozen, the tower's slower the lower they are."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.trees import FROZEN, layer_factors, layer_words, map_leaves, parse_group

# Of a tower, what comes behind its blocks.
BEHIND = r".*/(post_layernorm|norm)/.*"


def rates_of_layers(
    model: Model, paths: Sequence[str], freeze_layers: int, vision_layer_decay: float
) -> dict[str, tuple[float, ...] | float]:
    """Return {regex of paths: factor of the rate, or one for each layer of a stack}.

    freeze_layers: blocks of the language model that do not train, from the lowest on.
    vision_layer_decay: what each block of the tower is slower by than the one above it, and what
    lies below the blocks than the lowest (https://arxiv.org/abs/2106.08254, appendix H).
    Raises `UserError` where no block would be left.
    """
    found: dict[str, tuple[float, ...] | float] = {}
    for prefix, count in model.family.stacks(model.config).items():
        inside = [path for path in paths if path.startswith(f"{prefix}/")]
        if not inside:
            continue
        component = model.component(inside[0])
        if component == "language_model" and freeze_layers > 0:
            if freeze_layers >= count:
                raise UserError(
                    f"model.freeze_layers is {freeze_layers}, but the language model has {count} "
                    f"layers. Take fewer, or model.language_model_lr_scale=0.0 to freeze it all."
                )
            found[f"{prefix}/.*"] = (0.0,) * freeze_layers + (1.0,) * (count - freeze_layers)
        if component == "vision" and vision_layer_decay < 1:
            found[f"{prefix}/.*"] = tuple(vision_layer_decay ** (count - i) for i in range(count))
            for path in paths:
                if model.component(path) == "vision" and path not in inside:
                    if not re.fullmatch(BEHIND, path):
                        found[re.escape(path)] = vision_layer_decay ** (count + 1)
    return found


def with_rates(
    rows: Sequence[tuple[str, str]],
    rates: Mapping[str, tuple[float, ...] | float],
    paths: Sequence[str],
) -> list[tuple[str, str]]:
    """Return a training table whose groups hold the rates of `rates_of_layers`.

    A row that trains such leaves gets one above it for them.
    """
    made: list[tuple[str, str]] = []
    for pattern, group in rows:
        for regex, factor in rates.items() if group != FROZEN else ():
            row = f"(?={regex}$){pattern}"
            if any(re.fullmatch(row, path) for path in paths):
                method, scale = parse_group(group)
                if isinstance(factor, tuple):
                    made.append((row, f"{method}({scale!r}; layers {layer_words(factor)})"))
                else:
                    made.append((row, f"{method}({float(f'{scale * factor:g}')!r})"))
        made.append((pattern, group))
    return made


def check_layers(groups: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `UserError` where a group has numbers of other layers than a leaf of it."""
    for path, group in groups.items():
        factors = layer_factors(group)
        if factors is not None and shapes[path][:1] != (len(factors),):
            raise UserError(
                f"The training table has the group {group!r} for '{path}', which is of shape "
                f"{shapes[path]}: it needs one number for each of its "
                f"{shapes[path][0] if shapes[path] else 0} layers."
            )


def scaled(groups: Mapping[str, str]) -> optax.GradientTransformation:
    """Return what multiplies each leaf by its group's factors of layers; frozen ones do not move.

    Their update is -0.0, which leaves even the sign of a zero as it was. As gradients they are then
    zeros, of which no norm takes notice.
    """
    factors = {path: layer_factors(group) for path, group in groups.items()}

    def one(path: str, leaf: Any) -> Any:
        numbers = factors.get(path)
        if numbers is None or isinstance(leaf, optax.MaskedNode):
            return leaf
        factor = jnp.asarray(numbers, leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(factor == 0, jnp.asarray(-0.0, leaf.dtype), factor * leaf)

    return optax.stateless(lambda updates, _: map_leaves(one, updates))


def frozen_layers(groups: Mapping[str, str]) -> optax.GradientTransformation:
    """Return what takes the gradients of frozen layers away."""
    only = {
        path: f"full(1; layers {layer_words(float(f > 0) for f in factors)})"
        for path, group in groups.items()
        if (factors := layer_factors(group)) is not None and 0 in factors
    }
    return scaled(only)


def any_layers(groups: Mapping[str, str]) -> bool:
    return any(layer_factors(group) is not None for group in groups.values())
