"""Config keys on the command line: with section or without, in any spelling."""

import itertools
from collections.abc import Iterable, Sequence

from vlm_jax.config.checks import unknown_keys
from vlm_jax.config.choices import ALIASES, WORDS
from vlm_jax.config.schema import key_types
from vlm_jax.errors import UserError, nearest, refuse

SWITCH = "true"  # the value of a key that is true or false and has none
# What somebody most likely means who writes a section for a key.
MEANT = {
    "model": "name_or_path",
    "lora": "r",
    "adapter": "type",
    "training": "output_dir",
    "data": "train_file",
    "evaluation": "accuracy",
    "evaluators": "NAME.file",
    "mesh": "fsdp",
}


def overrides(words: Sequence[str], options: Iterable[str] = ()) -> dict[str, str]:
    """Return {"section.key": value} of the words that are not options of a command.

    words: "--config.lora.r=8", "--lora.r", "8", "--learning-rate=1e-4", "--method", "qlora": a key
    goes by its name alone where one section has it. A list may be several words. options: names of
    the command's own options, for the error. Raises `UserError` for a word that no key begins, a
    key that there is not, a name of several keys, and a key without a value.
    """
    types, found = key_types(), {}
    for word, values in _groups(words):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.removeprefix("config.").replace("-", "_")
        values = [value, *values] if equals else values
        is_key = f"{name}={' '.join(values)}" in WORDS  # mesh=auto
        key = name if is_key else _key(name, values, word.partition("=")[0], types, options)
        kind = types.get(ALIASES.get(key, key))
        if not values and (kind is bool or f"{key}={SWITCH}" in WORDS):
            values = [SWITCH]
        refuse(
            (not values, f"'{word}' has no value: write --config.{key}=VALUE."),
            (
                len(values) > 1 and kind is not tuple,
                f"'{word}' takes one value, and {len(values)} follow it: {' '.join(values)}. Put a "
                f"value that has spaces in quotes.",
            ),
        )
        found[key] = ",".join(values)
    return found


def _groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return [(a word that begins with --, the words behind it)]."""
    if words and not words[0].startswith("--"):
        raise UserError(
            f"'{words[0]}' belongs to no option. A config file follows --config, and a key of it "
            f"is set by --config.section.key=value."
        )
    starts = [at for at, word in enumerate(words) if word.startswith("--")]
    edges = itertools.pairwise([*starts, len(words)])
    return [(words[start], list(words[start + 1 : end])) for start, end in edges]


def _key(
    name: str, values: list[str], word: str, types: dict[str, type], options: Iterable[str]
) -> str:
    """Return the one key that a name means: itself where it names a section or none is needed."""
    if "." in name or name == "method":
        return name
    value = values[0] if values else "VALUE"
    if name in MEANT:
        raise UserError(
            f"'{word}' names a section of the config, not a key. Write "
            f"--config.{name}.{MEANT[name]}={value}, or another of its keys; "
            f"vlm_jax/config/specs.py lists them."
        )
    known = (*types, *ALIASES, *(key.partition("=")[0] for key in WORDS if "." in key))
    meant = sorted({ALIASES.get(key, key) for key in known if key.split(".")[1] == name})
    if len(meant) > 1:
        forms = " or ".join(f"--config.{key}={value}" for key in meant)
        raise UserError(f"'{word}' may mean several keys of the config: write {forms}.")
    if not meant:
        if guess := nearest(word, [f"--{option}" for option in options]):
            raise UserError(f"There is no option '{word}'{guess}.")
        raise unknown_keys([name], "the command", types)
    return meant[0]
