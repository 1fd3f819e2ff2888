"""How many parameters train, and of how many, as PEFT counts them."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.layers.bottleneck import is_adapter
from vlm_jax.layers.linear import is_lora
from vlm_jax.model import Model
from vlm_jax.names import stacked_layers
from vlm_jax.saved import bias_places, saved_modules
from vlm_jax.targets import slots
from vlm_jax.trees import FROZEN, Table, flatten, layer_factors, match, parse_group


def leaf_sizes(model: Model, params: Mapping[str, Any]) -> dict[str, int]:
    """Return {path: its parameters}; a 4-bit leaf counts as the dense one that it stands for.

    Of an adapter only what is a parameter in PEFT too: not the zeros that fill up a stack where
    layers differ, nor scales and copies of where matrices started. `params` may be shapes.
    """
    flat = flatten(params)
    return {path: sum(_sizes(model, flat, path)) for path in flat}


def trained_sizes(
    model: Model, params: Mapping[str, Any], groups: Mapping[str, str]
) -> dict[str, int]:
    """Return {path: those of its parameters that train}. groups: of a training table, by path."""
    flat, found = flatten(params), {}
    for path in flat:
        sizes, factors = _sizes(model, flat, path), layer_factors(groups[path])
        if parse_group(groups[path])[0] == FROZEN:
            found[path] = 0
        else:
            moves = [1.0] * len(sizes) if factors is None else factors
            found[path] = sum(size for size, f in zip(sizes, moves, strict=True) if f)
    return found


def _sizes(model: Model, flat: Mapping[str, Any], path: str) -> list[int]:
    """Return the parameters of each layer of a leaf."""
    if not is_lora(path) or model.lora is None:
        layers = stacked_layers(model, path) or 1
        return [math.prod(flat[path].shape) // layers] * layers
    base, name = path.rsplit("/", 1)
    ranks = [slot.rank for slot in slots(model, model.lora, path)]
    inputs, outputs = flat[f"{base}/lora_A"].shape[-2], flat[f"{base}/lora_B"].shape[-1]
    each = {"lora_A": inputs, "lora_B": outputs}
    if name in each:
        return [each[name] * rank for rank in ranks]
    return [outputs * (rank > 0) * (name == "lora_magnitude") for rank in ranks]


def count_parameters(
    model: Model, params: Mapping[str, Any], table: Table | None = None
) -> tuple[int, int]:
    """Return (trainable, all), equal to PEFT's `get_nb_trainable_parameters()`.

    All are those of the reference's model: with tensors that nothing here reads, and with modules
    of modules_to_save twice, as PEFT keeps the base's beside the trained copy. table: a training
    table; without one what an adapter holds trains, or everything where there is no adapter.
    `params` may be shapes, as of `model.abstract()`.
    """
    sizes = leaf_sizes(model, params)
    copied = saved_modules(model, params, model.modules_to_save).leaves
    if table is not None:
        trained = trained_sizes(model, params, match(table, sizes, "training table"))
    elif model.lora is not None or model.adapter is not None:
        own = [path for path in sizes if is_lora(path) or is_adapter(path) or path in copied]
        trained = {path: sizes[path] for path in own}
        for name, place in bias_places(model, params).items():  # of some layers of a stack, maybe
            if place.path not in copied:
                trained[name] = math.prod(place.shape)
    else:
        trained = sizes
    every = sum(sizes.values()) + model.family.unused_parameters(model.config)
    every += sum(sizes[path] for path in copied)
    return sum(trained.values()), every


def trainable_line(model: Model, params: Mapping[str, Any], table: Table | None = None) -> str:
    """Return PEFT's line: trainable params: … || all params: … || trainable%: …"""
    trained, every = count_parameters(model, params, table)
    return (
        f"trainable params: {trained:,d} || all params: {every:,d} || "
        f"trainable%: {100 * trained / every:.4f}"
    )


def print_trainable_parameters(
    model: Model, params: Mapping[str, Any], table: Table | None = None
) -> None:
    """Print how many parameters train, of how many; see `count_parameters`."""
    print(trainable_line(model, params, table))
