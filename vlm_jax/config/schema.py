"""A run's config as `ml_collections` has it, and how files and words fill it in."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlm_jax.config.checks import check_choice, check_evaluator_keys, unknown_keys
from vlm_jax.config.choices import (
    ALIASES,
    CHOICES,
    IMPLIED,
    METHODS,
    NONE_MEANS,
    NONE_WORDS,
    SWITCHES,
    WORDS,
)
from vlm_jax.config.files import read_file
from vlm_jax.config.parse import TREE, VALUES, flatten, general, words_of
from vlm_jax.config.specs import SECTIONS, EvaluatorSpec, RunSpec
from vlm_jax.errors import UserError


def get_config() -> ConfigDict:
    """Return a new, locked config of all keys of `RunSpec` at their defaults.

    A file or an override may also say `method`, a key of choices.METHODS, as "dora": it stands for
    the keys by which that differs from plain LoRA.
    """
    c = ConfigDict({name: _section(spec) for name, spec in SECTIONS.items()} | {"evaluators": {}})
    c.lock()
    c.evaluators.unlock()  # its names are the user's
    return c


def _section(spec: type) -> dict[str, Any]:
    """Return the keys of a section at their defaults."""
    return {
        field.name: placeholder(_kind(field)) if field.default is None else field.default
        for field in dataclasses.fields(spec)
    }


def _kind(field: dataclasses.Field) -> type:
    """Return the type of a key's values, the first one of its annotation."""
    if field.default is not None:
        return type(field.default)
    first = (typing.get_args(field.type) or (field.type,))[0]
    return object if first is Any else typing.get_origin(first) or first


def _fields() -> dict[str, dataclasses.Field]:
    """Return {"section.key": its field} by the alphabet; one evaluator's are "evaluators.*.key"."""
    sections = {**dict(sorted(SECTIONS.items())), "evaluators.*": EvaluatorSpec}
    return {
        f"{section}.{field.name}": field
        for section, spec in sections.items()
        for field in sorted(dataclasses.fields(spec), key=lambda field: field.name)
    }


def flatten_config(config: RunSpec | Mapping[str, Any]) -> dict[str, Any]:
    """Return {"section.key": value} of settings, or of a tree of sections."""
    return config.flat() if isinstance(config, RunSpec) else flatten(config)


def key_types() -> dict[str, type]:
    """Return {"section.key": the type of its values} of every key."""
    return {key: _kind(field) for key, field in _fields().items()}


def coerce(key: str, value: Any, kind: type, optional: bool, where: str) -> Any:
    """Return `value` as the key's type, or raise `UserError`. Numbers may come as strings."""
    try:
        named = str(value) in CHOICES.get(key, ())  # "none" may be one of several choices
        if value is None or (optional and not named and str(value).strip().lower() in NONE_WORDS):
            if optional:
                return None
            if kind is tuple:
                return ()
            raise ValueError
        if general(key) in VALUES:
            return VALUES[general(key)](value)
        if key in ("lora.target_modules", "lora.exclude_modules") and isinstance(value, str):
            # One string is a preset or a regex, unless it plainly is a list.
            listed = value.startswith("[") or re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value)
            return words_of(value) if listed else value
        if kind is bool:
            return SWITCHES[str(value).strip().lower()]
        if kind is tuple:
            return words_of(value) if isinstance(value, str) else tuple(str(v) for v in value)
        if isinstance(value, bool):
            raise ValueError
        if kind is int:
            number = float(value)
            if not number.is_integer():
                raise ValueError
            return int(number)
        if kind is float:
            return float(value)
        if isinstance(value, str | Path):
            return str(value).removeprefix("torch.") if key.endswith("dtype") else str(value)
        raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        names = {tuple: "list of strings", str: "string", bool: "true or false"}
        expected = (general(key) in VALUES and str(error)) or names.get(kind, kind.__name__)
        raise UserError(
            f"The key '{key}' has the value {value!r} in {where}; expected {expected}. Its "
            f"default is {_fields()[general(key)].default!r}."
        ) from None


def _known(given: str, value: Any) -> tuple[str, Any]:
    """Return the key and value that a given key, perhaps by another name, and its value mean."""
    key = ALIASES.get(given, given)
    return WORDS.get(_spelled(key, value), (key, value))


def _spelled(key: str, value: Any) -> str:
    """Return a key with its value as `WORDS` has them."""
    return f"{key}={str(value).strip().lower()}"


def _with_implied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat values with the keys that others stand for, where they are not given too."""
    given = {key: value for key, value in values.items() if key != "method"}
    known = {ALIASES.get(key, key) for key in given}
    implied = {key: value for one in known for key, value in IMPLIED.get(one, {}).items()}
    if "method" in values:
        check_choice("method", values["method"], METHODS)
        implied |= METHODS[values["method"]]
    return {**{key: value for key, value in implied.items() if key not in known}, **given}


def _resolved(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return flat values under our names of keys, checked and of the keys' types."""
    types, fields = key_types(), _fields()
    seen: dict[str, str] = {}
    found: dict[str, Any] = {}
    words = {given: _known(given, value) for given, value in _with_implied(values).items()}
    check_evaluator_keys([key for key, _ in words.values()], where, types)
    if unknown := [given for given, (key, _) in words.items() if general(key) not in types]:
        raise unknown_keys(unknown, where, types)
    for given, (key, value) in words.items():
        if key in seen:
            raise UserError(f"{where} sets '{seen[key]}' and '{given}', which are one key: {key}.")
        seen[key] = given
        if key in NONE_MEANS and (value is None or str(value).strip().lower() in NONE_WORDS):
            value = NONE_MEANS[key]
        known = general(key)
        found[key] = coerce(key, value, types[known], fields[known].default is None, where)
    return found


def load(path: str | Path | None, overrides: Mapping[str, Any] | Iterable[str] = ()) -> RunSpec:
    """Return the settings of a Python or YAML file (or a run's config.json), checked.

    path: a `.py` file with `get_config()` (`file.py:arg` calls `get_config("arg")`), a `.yaml` or
    `.json` file with the same sections and keys, or None for the defaults.
    overrides: {"training.learning_rate": 1e-4} or ["training.learning_rate=1e-4"]; they win.
    Raises `UserError` for a missing file, an unknown key (with the nearest known one), a value of
    the wrong type, or a value that is not supported.
    """
    if not isinstance(overrides, Mapping):
        overrides = list(overrides)
        if bare := [item for item in overrides if "=" not in item]:
            raise UserError(f"The override '{bare[0]}' has no value; write section.key=value.")
        overrides = dict(item.split("=", 1) for item in overrides)
    found: dict[str, Any] = {}
    if path is not None:
        file, tree = read_file(path)
        for section, values in tree.items():
            is_section = section in SECTIONS or section == "evaluators"
            is_word = isinstance(values, TREE) or _spelled(section, values) in WORDS
            if is_section and not is_word:
                raise UserError(f"'{section}' in '{file}' is a section, not the value {values!r}.")
        values = flatten(tree)
        if "method" in overrides:  # another method, and not what the file's one stood for
            values.pop("method", None)
        found = _resolved(values, f"'{file}'")
    return RunSpec.of_flat({**found, **_resolved(overrides, "the overrides")})


def to_dict(config: RunSpec | ConfigDict) -> dict[str, dict[str, Any]]:
    """Return plain nested dicts of values that JSON can hold."""
    return RunSpec.of(config).to_dict()
