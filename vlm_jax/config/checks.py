"""Checks of config values, and the messages of those refused."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlm_jax.config.choices import ALIASES, CHOICES, OPTIMIZERS, RANGES, REPORTERS
from vlm_jax.config.from_pytorch import told
from vlm_jax.config.parse import general
from vlm_jax.errors import UserError, nearest

MOST_TOLD = 10  # unknown keys of one file that an error speaks of


def check_choice(key: str, value: Any, allowed: Iterable[str | None]) -> None:
    """Raise `UserError` where a key's value is none of those allowed, with the nearest of them."""
    if value not in allowed:
        named = [choice for choice in allowed if choice is not None]
        raise UserError(
            f"'{key}' is {value!r}, which is not supported{nearest(value, named)}. "
            f"Supported: {', '.join(named)}."
        )


def check_evaluator_keys(keys: Iterable[str], where: str, known: Iterable[str]) -> None:
    """Raise `UserError` for a key of the section `evaluators` that is not among the known ones."""
    names = [key.removeprefix("evaluators.*.") for key in known if key.startswith("evaluators.")]
    for key in keys:
        if (
            key.startswith("evaluators.")
            and general(key).removeprefix("evaluators.*.") not in names
        ):
            raise UserError(
                f"Unknown config key '{key}' in {where}{nearest(key.rpartition('.')[2], names)}. "
                f"Expected evaluators.NAME.KEY, with a name of letters, digits, - and _, and a KEY "
                f"of {', '.join(names)}."
            )


def unknown_keys(given: Iterable[str], where: str, known: Iterable[str]) -> UserError:
    """Return the error for keys that there are not: what each is called here, or the nearest one.

    given: "section.key", or a key in no section. known: every "section.key" that there is.
    """
    given, known = list(given), list(known)
    places = [where, *[""] * len(given)]  # said once
    said = [_unknown(*one, known) for one in zip(given[:MOST_TOLD], places, strict=False)]
    left = len(given) - len(said)
    if any(theirs for theirs, _ in said):
        more = "docs/FROM_PYTORCH.md lists all of their keys."
    else:
        sections = ", ".join(dict.fromkeys(key.split(".")[0] for key in known))
        more = (
            f"Every key is listed with its meaning in vlm_jax/config/specs.py; the sections are "
            f"{sections}."
        )
    if left > 0:
        more = f"{left} more keys are not known. {more}"
    return UserError(" ".join([*(words for _, words in said), more]))


def _unknown(given: str, where: str, known: list[str]) -> tuple[bool, str]:
    """Return whether another program has a key so named, and a sentence about it."""
    section, _, name = given.partition(".")
    if not name:
        section, name = "", section
    name = name.partition(".")[0]  # options of a key of theirs
    theirs = told(section, name)
    named: dict[str, dict[str, None]] = {}  # name of a key -> the keys that it may mean
    for key in (*known, *ALIASES):
        named.setdefault(key.split(".")[1], {})[ALIASES.get(key, key)] = None
    if theirs is None and name not in named:
        theirs = told(None, name)
    if theirs is not None:
        return True, f"In {where}, {theirs}" if where else theirs
    # Few slips are in a word's first letter; without this 'freeze_vision' is near to 'revision'.
    alike = [one for one in named if one[:1] == name[:1]]
    close = difflib.get_close_matches(name, alike, n=1, cutoff=0.65)
    meant = [key for one in close for key in named[one]]
    meant = [key for key in meant if key.split(".")[0] == section] or meant
    guess = f" (did you mean {' or '.join(map(repr, meant))}?)" if meant else ""
    place = f" in {where}" if where else ""
    return False, f"Unknown config key '{given}'{place}{guess}."


def optimizer_name(name: str) -> str:
    """Return the name by which this program knows the optimizer of any of its names.

    Raises `UserError` for another optimizer.
    """
    check_choice("training.optim", name, OPTIMIZERS)
    return OPTIMIZERS[name]


def check(flat: Mapping[str, Any]) -> None:
    """Raise `UserError` where no part of the program supports a value of {"section.key": value}."""
    if flat["model.bnb_4bit_compute_dtype"] == "float16":
        raise UserError(
            "'model.bnb_4bit_compute_dtype' is float16, which is not supported: float16 needs loss "
            "scaling. Use bfloat16 (any GPU since Ampere, any TPU) or float32."
        )
    for key, allowed in CHOICES.items():
        check_choice(key, flat[key], allowed)
    for pattern, low, high in RANGES:
        for key, value in flat.items():
            if re.fullmatch(pattern, key) and value is not None and not low <= value <= high:
                raise UserError(f"'{key}' is {value}; it must be between {low:g} and {high:g}.")
    for key, value in flat.items():
        if general(key) == "evaluators.*.file" and value is None:
            raise UserError(f"'{key}' is not set: name a file of records with reference answers.")
    if not flat["training.output_dir"].strip():
        raise UserError("'training.output_dir' is empty; name the directory that the run writes.")
    lora, targets = flat["lora.enabled"], flat["lora.target_modules"]
    if lora and targets is not None and not targets:
        raise UserError(
            "'lora.target_modules' is empty, so LoRA would adapt nothing. Name the layers, for "
            "instance 'all-linear', or set lora.enabled=false."
        )
    if lora and flat["adapter.type"] is not None:
        raise UserError(
            f"adapter.type is '{flat['adapter.type']}' and lora.enabled is true: a run trains one "
            f"of the two. Set lora.enabled=false for adapters, or leave adapter.type out."
        )
    if flat["model.quantize"] is not None and flat["model.load_in_4bit"]:
        raise UserError(
            f"model.quantize={flat['model.quantize']!r} and model.load_in_4bit=true both say how "
            f"weights are stored: keep one."
        )
    if flat["training.fp16"]:
        raise UserError(
            "'training.fp16' is true, which is not supported: float16 needs loss scaling. Set "
            "training.bf16=true (any GPU since Ampere, any TPU) or neither, for float32."
        )
    window = flat["training.profile_steps"]
    first, _, last = window.partition("-")
    if window and not (
        re.fullmatch(r"[1-9]\d*(-\d+)?", window) and int(first) <= int(last or first)
    ):
        raise UserError(
            f"'training.profile_steps' is '{window}'; expected steps from and to, such as 10-13."
        )
    for name in flat["training.report_to"]:
        if name not in REPORTERS:
            raise UserError(
                f"'training.report_to' names '{name}', which is not supported"
                f"{nearest(name, REPORTERS)}. Supported: {', '.join(REPORTERS)}."
            )
    order, packed = flat["training.train_sampling_strategy"], flat["data.packing"]
    if order == "group_by_length" and packed:
        raise UserError(
            "'training.train_sampling_strategy' is group_by_length and 'data.packing' is true: "
            "packed rows all have one length. Leave one of them out."
        )
    if order in ("random", "group_by_length") and not flat["data.shuffle"]:
        raise UserError(
            f"'training.train_sampling_strategy' is {order}, but 'data.shuffle' is false, which "
            f"keeps the order of the records. Leave one of them out."
        )
    if flat["data.eval_share"] and flat["data.eval_file"] is not None:
        raise UserError(
            f"'data.eval_share' is {flat['data.eval_share']:g} and 'data.eval_file' is set: both "
            f"say what to evaluate on. Leave one of them out."
        )
    if flat["data.eval_share"] and flat["data.streaming"]:
        raise UserError(
            "'data.eval_share' is set and 'data.streaming' is true: the length of "
            "a stream is unknown, so no share can be held out. Set data.eval_file instead."
        )
    both = flat["data.min_pixels"], flat["data.max_pixels"]
    if None not in both and both[0] > both[1]:
        raise UserError(f"data.min_pixels {both[0]} is above data.max_pixels {both[1]}.")
    if flat["data.image_resolution"] and both != (None, None):
        raise UserError(
            "data.image_resolution sets data.min_pixels and data.max_pixels both, to the area of "
            "its square: set one or the other."
        )
