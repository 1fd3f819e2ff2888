"""Checks of config values, and the messages of those refused."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vlm_jax.config.choices import ALIASES, CHOICES, OPTIMIZERS, RANGES, REPORTERS
from vlm_jax.config.from_pytorch import foreign_key
from vlm_jax.config.parse import general
from vlm_jax.errors import UserError, nearest, refuse

MOST_NAMED = 10  # unknown keys of one file that an error speaks of


def check_choice(key: str, value: Any, allowed: Iterable[str | None], verb: str = "is") -> None:
    """Raise `UserError` where a key's value is none of those allowed, with the nearest of them."""
    if value not in allowed:
        named = [choice for choice in allowed if choice is not None]
        raise UserError(
            f"'{key}' {verb} {value!r}, which is not supported{nearest(value, named)}. "
            f"Supported: {', '.join(named)}."
        )


def check_evaluator_keys(keys: Iterable[str], where: str, known: Collection[str]) -> None:
    """Raise `UserError` for a key of the section `evaluators` that is not among the known ones."""
    for key in keys:
        if key.startswith("evaluators.") and general(key) not in known:
            names = [one.split(".")[2] for one in known if one.startswith("evaluators.")]
            raise UserError(
                f"Unknown config key '{key}' in {where}{nearest(key.rpartition('.')[2], names)}. "
                f"Expected evaluators.NAME.KEY, with a name of letters, digits, - and _, and a KEY "
                f"of {', '.join(names)}."
            )


def unknown_keys(given: Sequence[str], where: str, known: Collection[str]) -> UserError:
    """Return the error for keys that there are not: what each is called here, or the nearest one.

    given: "section.key", or a key in no section. known: every "section.key" that there is.
    """
    found = [  # the place stands in the first alone
        _unknown(key, where if number == 0 else "", known)
        for number, key in enumerate(given[:MOST_NAMED])
    ]
    more = "docs/FROM_PYTORCH.md lists all of their keys."
    if not any(foreign for foreign, _ in found):
        sections = ", ".join(dict.fromkeys(key.split(".")[0] for key in known))
        more = (
            f"Every key is listed with its meaning in vlm_jax/config/specs.py; the sections are "
            f"{sections}."
        )
    if left := len(given) - len(found):
        more = f"{left} more keys are not known. {more}"
    return UserError(" ".join([*(words for _, words in found), more]))


def _unknown(given: str, where: str, known: Iterable[str]) -> tuple[bool, str]:
    """Return whether another program has a key so named, and a sentence about it."""
    section, _, name = given.partition(".")
    if not name:
        section, name = "", section
    name = name.partition(".")[0]  # without the options of a foreign key
    foreign = foreign_key(section, name)
    named: dict[str, dict[str, None]] = {}  # name of a key -> the keys that it may mean
    for key in (*known, *ALIASES):
        named.setdefault(key.split(".")[1], {})[ALIASES.get(key, key)] = None
    if foreign is None and name not in named:
        foreign = foreign_key(None, name)
    if foreign is not None:
        return True, f"In {where}, {foreign}" if where else foreign
    # Few slips are in a word's first letter; without this 'freeze_vision' is near to 'revision'.
    alike = [one for one in named if one[:1] == name[:1]]
    close = difflib.get_close_matches(name, alike, n=1, cutoff=0.65)
    meant = list(named[close[0]]) if close else []
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
    for name in flat["training.report_to"]:
        check_choice("training.report_to", name, REPORTERS, "names")
    for key, value in flat.items():
        if general(key) == "evaluators.*.file" and value is None:
            raise UserError(f"'{key}' is not set: name a file of records with reference answers.")
    refuse(*_rules(flat))


def _rules(flat: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """Return (whether values break a rule, the message of that) of each rule."""
    lora, targets = flat["lora.enabled"], flat["lora.target_modules"]
    window = flat["training.profile_steps"]
    first, _, last = window.partition("-")
    order = flat["training.train_sampling_strategy"]
    low, high = flat["data.min_pixels"], flat["data.max_pixels"]
    return [
        (
            not flat["training.output_dir"].strip(),
            "'training.output_dir' is empty; name the directory that the run writes.",
        ),
        (
            lora and targets is not None and not targets,
            "'lora.target_modules' is empty, so LoRA would adapt nothing. Name the layers, for "
            "instance 'all-linear', or set lora.enabled=false.",
        ),
        (
            lora and flat["adapter.type"] is not None,
            f"adapter.type is '{flat['adapter.type']}' and lora.enabled is true: a run trains one "
            f"of the two. Set lora.enabled=false for adapters, or leave adapter.type out.",
        ),
        (
            flat["model.quantize"] is not None and flat["model.load_in_4bit"],
            f"model.quantize={flat['model.quantize']!r} and model.load_in_4bit=true both say how "
            f"weights are stored: keep one.",
        ),
        (
            flat["training.fp16"],
            "'training.fp16' is true, which is not supported: float16 needs loss scaling. Set "
            "training.bf16=true (any GPU since Ampere, any TPU) or neither, for float32.",
        ),
        (
            window != ""
            and not (re.fullmatch(r"[1-9]\d*(-\d+)?", window) and int(first) <= int(last or first)),
            f"'training.profile_steps' is '{window}'; expected steps from and to, such as 10-13.",
        ),
        (
            order == "group_by_length" and flat["data.packing"],
            "'training.train_sampling_strategy' is group_by_length and 'data.packing' is true: "
            "packed rows all have one length. Leave one of them out.",
        ),
        (
            order in ("random", "group_by_length") and not flat["data.shuffle"],
            f"'training.train_sampling_strategy' is {order}, but 'data.shuffle' is false, which "
            f"keeps the order of the records. Leave one of them out.",
        ),
        (
            flat["data.eval_share"] and flat["data.eval_file"] is not None,
            f"'data.eval_share' is {flat['data.eval_share']:g} and 'data.eval_file' is set: both "
            f"say what to evaluate on. Leave one of them out.",
        ),
        (
            flat["data.eval_share"] and flat["data.streaming"],
            "'data.eval_share' is set and 'data.streaming' is true: the length of "
            "a stream is unknown, so no share can be held out. Set data.eval_file instead.",
        ),
        (
            None not in (low, high) and low > high,
            f"data.min_pixels {low} is above data.max_pixels {high}.",
        ),
        (
            flat["data.image_resolution"] and (low, high) != (None, None),
            "data.image_resolution sets data.min_pixels and data.max_pixels both, to the area of "
            "its square: set one or the other.",
        ),
    ]
