"""Parsers of config values that are lists and maps: data sources, column names."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.errors import UserError
from vlm_jax.files.limits import parse_yaml

SOURCES = "a path, or a list of paths and of {path, weight, ...}"
LAYERS = "numbers of layers, [0, 1, 2]"
TREE = Mapping | ConfigDict | FrozenConfigDict  # of keys and values


def plain(value: Any) -> Any:
    """Return lists and maps as JSON has them, whatever ml_collections made of them."""
    if isinstance(value, TREE):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def general(key: str) -> str:
    """Return "evaluators.*.file" for "evaluators.NAME.file", any other key as it is."""
    return re.sub(r"^evaluators\.[\w-]+\.(\w+)$", r"evaluators.*.\1", key)


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a list that is written as text, with brackets and quotes or without."""
    return tuple(part for part in re.split(r"[\s,]+", text.strip("[]() ").replace("'", "")) if part)


def sources_value(value: Any) -> Any:
    """Return a path, or a list of paths and maps; raises `ValueError`, saying what it expects."""
    value = _parsed(value, SOURCES)
    value = [value] if isinstance(value, dict) else value
    listed = value if isinstance(value, list) else [value]
    named = all(isinstance(one, str) or (isinstance(one, dict) and "path" in one) for one in listed)
    if not listed or not named:
        raise ValueError(SOURCES)
    return value


def map_value(value: Any, expected: str) -> dict[str, Any]:
    """Return a map; raises `ValueError` with what is expected for all else."""
    value = _parsed(value, expected)
    if not isinstance(value, dict):
        raise ValueError(expected)
    return value


def steps_value(value: Any) -> int | float:
    """Return a whole number of steps, or a share of all of them above 0 and below 1."""
    number = _number(value)
    if 0 < number < 1:
        return number
    if number < 0 or not number.is_integer():
        raise ValueError("a number of steps, or a share of all steps below 1")
    return int(number)


def side_value(value: Any) -> int:
    """Return the side of a square in pixels; 0 for the word dynamic."""
    number = 0.0 if str(value).strip().lower() == "dynamic" else _number(value)
    if not number.is_integer():
        raise ValueError("the side of a square in pixels, or dynamic")
    return int(number)


def layers_value(value: Any) -> list[int]:
    """Return numbers of layers; raises `ValueError`, saying what it expects, for all else."""
    value = _parsed(value, LAYERS)
    if isinstance(value, str):
        value = value.split(",")
    try:
        numbers = [int(str(one)) for one in (value if isinstance(value, list) else [value])]
    except ValueError:
        raise ValueError(LAYERS) from None
    if min(numbers, default=0) < 0:
        raise ValueError(LAYERS)
    return numbers


def start_value(value: Any) -> str:
    """Return a value of init_lora_weights as a word."""
    if not isinstance(value, bool | str) or not str(value).strip():
        raise ValueError("true, or a word such as gaussian, pissa, loftq")
    return str(value).strip().lower()


def _number(value: Any) -> float:
    """Return a value as a number; NaN where it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        return math.nan


def _parsed(value: Any, expected: str) -> Any:
    """Return a value as JSON has it; text in brackets, as on the command line, is read as YAML."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = parse_yaml(value, "the value")
        except (yaml.YAMLError, UserError):
            raise ValueError(f"{expected}, in YAML") from None
    return plain(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"section.key": value} of a tree of sections."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_tree = isinstance(value, TREE) and general(f"{prefix}{key}") not in VALUES
        if is_tree and (value or not prefix):  # an empty one in a section is a value, a wrong one
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Key -> what reads its value.
VALUES: dict[str, Callable[[Any], Any]] = {
    "data.train_file": sources_value,
    "data.eval_file": sources_value,
    "evaluators.*.file": sources_value,
    "lora.rank_pattern": partial(map_value, expected="ranks by regex, {layers.0.*q_proj: 32}"),
    "lora.alpha_pattern": partial(map_value, expected="alphas by regex, {layers.0.*q_proj: 64}"),
    "lora.layers_to_transform": layers_value,
    "lora.init_lora_weights": start_value,
    "data.columns": partial(
        map_value, expected="our names of columns with the data's own, {question: q_text}"
    ),
    "data.image_resolution": side_value,
    "training.lr_scheduler_kwargs": partial(
        map_value, expected="the schedule's own options, {min_lr_rate: 0.1}"
    ),
    **{
        f"training.{name}": steps_value
        for name in ("warmup_steps", "logging_steps", "save_steps", "eval_steps")
    },
}
