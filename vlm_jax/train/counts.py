"""How many parameters train, and of how many, as PEFT counts them."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.lora import bias_leaves, is_lora, saved_modules
from vlm_jax.model import Model
from vlm_jax.targets import slots
from vlm_jax.trees import FROZEN, Table, flatten, match


def leaf_sizes(model: Model, params: Mapping[str, Any]) -> dict[str, int]:
    """Return {path: its parameters}; a 4-bit leaf counts as the dense one that it stands for.

    Of an adapter only what is a parameter in PEFT too: not the zeros that fill up a stack where
    layers differ, nor scales and copies of where matrices started. `params` may be shapes.
    """
    flat = flatten(params)
    return {path: _size(model, flat, path) for path in flat}


def _size(model: Model, flat: Mapping[str, Any], path: str) -> int:
    if not is_lora(path) or model.lora is None:
        return math.prod(flat[path].shape)
    base, name = path.rsplit("/", 1)
    ranks = [slot.rank for slot in slots(model, model.lora, path)]
    inputs, outputs = flat[f"{base}/lora_A"].shape[-2], flat[f"{base}/lora_B"].shape[-1]
    each = {"lora_A": inputs, "lora_B": outputs}
    if name in each:
        return each[name] * sum(ranks)
    return outputs * sum(rank > 0 for rank in ranks) if name == "lora_magnitude" else 0


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
    copied: list[str] = []
    if model.lora is not None:
        copied = saved_modules(model, params, model.lora.modules_to_save).leaves
    if table is not None:
        groups = match(table, sizes, "training table")
        trained = [path for path in sizes if groups[path] != FROZEN]
    elif model.lora is not None:
        held = {*copied, *bias_leaves(model, params)}
        trained = [path for path in sizes if is_lora(path) or path in held]
    else:
        trained = list(sizes)
    every = sum(sizes.values()) + model.family.unused_parameters(model.config)
    every += sum(sizes[path] for path in copied)
    return sum(sizes[path] for path in trained), every


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
