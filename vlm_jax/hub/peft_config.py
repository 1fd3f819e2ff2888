"""adapter_config.json of PEFT's LoRA: which keys are read and written, and what they may say."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.adapters.lora import BIASES
from vlm_jax.adapters.targets import ALPHA, is_alpha, is_number, is_rank
from vlm_jax.errors import UserError
from vlm_jax.files.limits import read_json
from vlm_jax.models.methods import LoRA

CONFIG = "adapter_config.json"
NO_TARGETS = "dummy-target-modules"  # peft's name for an adapter without matrices


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_pattern(value: Any, fits: Callable[[Any], bool]) -> bool:
    return not value or (isinstance(value, dict) and all(map(fits, value.values())))


# Keys that are fields of `LoRA`: (the field, whether a file's value can be one, what can).
KEYS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "r": ("rank", is_rank, "a whole number of 1 or more"),
    "lora_alpha": ("alpha", is_alpha, f"a number of 0 to {ALPHA:g}"),
    "lora_dropout": (
        "dropout", lambda v: v is None or is_number(v, 0, 1), "a number of 0 to 1, or null"
    ),
    "bias": ("bias", lambda v: not v or v in BIASES, f"one of {', '.join(BIASES)}"),
    "target_modules": (
        "targets", lambda v: not v or isinstance(v, str) or _are_names(v), "names or a regex"
    ),
    "modules_to_save": (
        "modules_to_save", lambda v: not v or _are_names(v), "a list of names or null"
    ),
    "rank_pattern": ("rank_pattern", lambda v: _is_pattern(v, is_rank), "ranks by regex"),
    "alpha_pattern": ("alpha_pattern", lambda v: _is_pattern(v, is_alpha), "numbers by regex"),
    "use_rslora": ("rslora", lambda v: True, ""),
    "use_dora": ("dora", lambda v: True, ""),
}  # fmt: skip
# Keys that are read otherwise, and those that change nothing here.
READ = {*KEYS, "peft_type", "base_model_name_or_path", "revision", "ensure_weight_tying"}
HARMLESS = frozenset(  # which layers are adapted is read off the tensors' names
    """task_type auto_mapping peft_version inference_mode exclude_modules layers_to_transform
    layers_pattern megatron_core qalora_group_size runtime_config ephemeral_gpu_offload""".split()
)
# Starts that leave the base's weights alone; PiSSA, OLoRA, CorDA and LoftQ change them.
HARMLESS_VALUES: dict[str, tuple] = {
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


def read_config(directory: Path, also: Sequence[str] = ()) -> tuple[dict[str, Any], LoRA]:
    """Return an adapter_config.json whose every key is known, and the `LoRA` that it describes.

    also: further keys that the caller reads. Raises `UserError` for any other that is set.
    """
    config = read_json(directory / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"'{directory}' holds a PEFT adapter of type {config.get('peft_type')!r}; only LORA "
            f"is supported."
        )
    for name, (_, fits, expected) in KEYS.items():
        if not fits(config.get(name)):
            raise UserError(
                f"The {CONFIG} in '{directory}' has {name}={config.get(name)!r}; "
                f"expected {expected}. It is damaged: take the file that the adapter came with."
            )
    for name in sorted(config.keys() - READ - HARMLESS - {*also}):
        value = config[name]
        if value and value not in HARMLESS_VALUES.get(name, ()):
            raise UserError(
                f"The adapter in '{directory}' sets {name}={value!r} in {CONFIG}, which is not "
                f"supported: its logits would differ. Merge it with peft first, or train without."
            )
    stated = {field: config.get(name) for name, (field, *_) in KEYS.items()}
    values: dict[str, Any] = {
        field: tuple(sorted(value)) if isinstance(value, list) else value
        for field, value in stated.items()
        if value == 0 or (value and value != NO_TARGETS)
    }
    return config, LoRA(**{"targets": (), **values})


def config_of(lora: LoRA, modules: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """Return the adapter_config.json of a LoRA.

    Only long-standing keys: older releases of peft refuse those that they do not know.
    modules: the keys that say which modules it adapts and holds in full. others: what differs from
    the values here.
    """
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **modules,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        **others,
    }
