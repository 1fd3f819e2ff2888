"""Fields of PEFT's adapter_config.json: those read, and those ignored."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.adapters.lora import BIASES
from vlm_jax.errors import UserError
from vlm_jax.files.limits import read_json

# Fields of adapter_config.json that are read, or that change nothing here.
READ = frozenset(
    """peft_type r lora_alpha lora_dropout target_modules exclude_modules modules_to_save
    use_rslora use_dora base_model_name_or_path revision ensure_weight_tying rank_pattern
    alpha_pattern""".split()
)
HARMLESS = frozenset(  # which layers are adapted is read off the keys
    """task_type auto_mapping peft_version inference_mode layers_to_transform
    layers_pattern megatron_core qalora_group_size runtime_config ephemeral_gpu_offload""".split()
)

# Starts that leave the base's weights alone; PiSSA, OLoRA, CorDA and LoftQ change them.
HARMLESS_VALUES: dict[str, tuple] = {
    "bias": BIASES,
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


def _is_number(value: Any, least: float, most: float = math.inf) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and least <= value <= most


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_pattern(value: Any, fits: Callable[[Any], bool]) -> bool:
    return not value or (isinstance(value, dict) and all(map(fits, value.values())))


ALPHA = 1e9  # as of a config, see RANGES


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value, 1)


KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("r", _is_rank, "a whole number of 1 or more"),
    ("lora_alpha", lambda v: _is_number(v, 0, ALPHA), f"a number of 0 to {ALPHA:g}"),
    ("lora_dropout", lambda v: v is None or _is_number(v, 0, 1), "a number of 0 to 1, or null"),
    ("target_modules", lambda v: not v or isinstance(v, str) or _are_names(v), "names or a regex"),
    ("rank_pattern", lambda v: _is_pattern(v, _is_rank), "ranks by regex"),
    (
        "alpha_pattern",
        lambda v: _is_pattern(v, lambda alpha: _is_number(alpha, 0, ALPHA)),
        "numbers by regex",
    ),
    ("modules_to_save", lambda v: not v or _are_names(v), "a list of names or null"),
)


def read_config(directory: Path, also: Sequence[str] = ()) -> dict[str, Any]:
    """Return an adapter_config.json whose every field is known to be read or to change nothing.

    also: further fields that the caller reads. Raises `UserError` for any other that is set.
    """
    config = read_json(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"'{directory}' holds a PEFT adapter of type {config.get('peft_type')!r}; only LORA "
            f"is supported."
        )
    for name, fits, expected in KINDS:
        if not fits(config.get(name)):
            raise UserError(
                f"The adapter_config.json in '{directory}' has {name}={config.get(name)!r}; "
                f"expected {expected}. It is damaged: use the file that the adapter came with."
            )
    for name, value in config.items():
        known = name in READ | HARMLESS or name in also
        if known or not value or value in HARMLESS_VALUES.get(name, ()):
            continue
        raise UserError(
            f"The adapter in '{directory}' sets {name}={value!r} in adapter_config.json, which is "
            f"not supported: its logits would differ. Merge it with peft first, or train without."
        )
    return config
