"""Formats of raw rows, each read as turns: roles, texts, loss weights."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from vlm_jax.data.records.unread_keys import is_given, refuse_unread_in_turn
from vlm_jax.errors import UserError, nearest, refuse

Turn = dict[str, Any]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
}
# A system prompt beside the turns, as ShareGPT's and LLaMA-Factory's files have it.
SYSTEM = ("system", "system_prompt")
IMAGES, VIDEOS = ("images", "image"), ("videos", "video")
# What a turn counts in the loss: OpenAI's, axolotl's and ms-swift's names of it.
WEIGHTS = ("weight", "train", "loss", "loss_scale")


class Format(NamedTuple):
    """One shape: the keys a row of it must have, those it may, and its turns.

    Where a row has `messages` or `conversations`, the keys of other formats are columns beside it.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    turns: Callable[[Mapping[str, Any], str], list[Turn]]


def read_turns(
    row: Mapping[str, Any], where: str, mapped: Mapping[str, str]
) -> tuple[list[Turn], frozenset[str]]:
    """Return the turns of a row and the keys that were read.

    A turn is {"role", "content"}, and "weight" where that is not 1. mapped: `data.columns`; a
    format that it names is preferred to one that it does not.
    """
    found = [name for name, form in FORMATS.items() if has_all(row, form.needed)]
    if not found:
        expected = ", ".join("/".join(form.needed) for form in FORMATS.values())
        raise UserError(
            f"{where} has the keys {sorted(map(str, row))}; expected one of {expected}, or "
            f"data.columns to say which column is which."
        )
    chats = [name for name in found if name in CHATS]
    if len(found) > 1:
        found = chats or [n for n in found if mapped.keys() & set(FORMATS[n].needed)] or found
        # Its columns are also parts of others, which say more of a row.
        found = [name for name in found if name != "prompt and response"] or found
    read = BESIDE.union(*(FORMATS[name].needed + FORMATS[name].optional for name in found))
    for key in read & row.keys():
        if type(row[key]) is float and math.isnan(row[key]):
            raise UserError(
                f"{where} has NaN in '{key}', as pandas writes for what is missing. Write null, or "
                f"leave the key out, where a row has none."
            )
    turns = FORMATS[found[0]].turns(row, where)
    if len(found) > 1 and any(FORMATS[name].turns(row, where) != turns for name in found[1:]):
        raise UserError(
            f"{where} has both {' and '.join(found)}, and they differ. Leave one of them out"
            f"{'' if chats else ', or name the columns of one in data.columns'}."
        )
    return _with_system(row, turns, where), read


def has_all(row: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Return whether a row has a value that is not null under each of the keys."""
    return all(row.get(key) is not None for key in keys)


def check_order(turns: list[Turn], where: str) -> None:
    """Raise `UserError` for roles in an order that no conversation has.

    Whether an assistant may begin is for the checkpoint's chat template to say.
    """
    roles = [turn["role"] for turn in turns]
    for number, (before, role) in enumerate(itertools.pairwise(roles), start=1):
        if role == "system":
            raise UserError(f"{where}: turn {number} is a system turn; only the first may be one.")
        if role == before:
            raise UserError(
                f"{where}: turns {number - 1} and {number} are both the {role}'s. Roles must take "
                f"turns: join the two into one, or correct the order."
            )


def rename_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], where: str
) -> Mapping[str, Any]:
    """Return the row with its columns under the names we read: {our name: the row's}."""
    if missing := [name for name in columns.values() if name not in row]:
        raise UserError(
            f"{where} has no column '{missing[0]}'{nearest(missing[0], row)}, which data.columns "
            f"names; it has {sorted(map(str, row))}. Write null where a row has none."
        )
    return {
        **{key: value for key, value in row.items() if key not in columns.values()},
        **{ours: row[theirs] for ours, theirs in columns.items()},
    }


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise `UserError` for a `data.columns` that names what is not read."""
    for ours, theirs in columns.items():
        refuse(
            (
                ours not in READ,
                f"data.columns names '{ours}'{nearest(ours, READ)}, which is not read: it maps "
                f"names that are read ({', '.join(sorted(READ))}) to the data's own.",
            ),
            (
                not isinstance(theirs, str),
                f"data.columns maps '{ours}' to {theirs!r}; expected a column's name.",
            ),
        )


# Turns


def _listed(value: Any, where: str) -> list[Turn]:
    """Return turns of a list of {"role", "content"} or {"from", "value"}."""
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where} holds no list of turns: {value!r:.80}.")
    turns = []
    for number, turn in enumerate(value):
        given = turn if isinstance(turn, Mapping) else {}
        keys = ("from", "value") if given.get("role") is None else ("role", "content")
        if not has_all(given, keys):
            raise UserError(
                f"{where}: turn {number} is {turn!r:.80}; expected an object with 'role' and "
                f"'content', or with 'from' and 'value'."
            )
        role = ROLES.get(str(turn[keys[0]]).lower())
        if role is None:
            raise UserError(
                f"{where}: turn {number} has the role {turn[keys[0]]!r}"
                f"{nearest(turn[keys[0]], ROLES)}; expected one of {', '.join(ROLES)}."
            )
        refuse_unread_in_turn(turn, {*keys, *WEIGHTS}, f"{where}: turn {number}")
        weight = _weight(turn, role, f"{where}: turn {number}")
        turns.append({"role": role, "content": turn[keys[1]], **weight})
    return turns


LEAST_WEIGHT = 1e-6  # what float32 sums of a batch still tell from 0


def _weight(turn: Mapping[str, Any], role: str, where: str) -> dict[str, float]:
    """Return {"weight": what a turn counts in the loss}, {} where that is 1."""
    given = {key: turn[key] for key in WEIGHTS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or not (
            value == 0 or LEAST_WEIGHT <= value <= 1 / LEAST_WEIGHT
        ):
            raise UserError(
                f"{where} has the {key} {value!r}; expected true or false, 0, or a number from "
                f"{LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}, which multiplies the turn's loss."
            )
        if value and role != "assistant":
            raise UserError(
                f"{where} is the {role}'s and has the {key} {value!r}: only what the assistant "
                f"writes can carry loss. Remove the key from this turn."
            )
    values = {float(value) for value in given.values()}
    if len(values) > 1:
        raise UserError(f"{where} has {' and '.join(given)}, which differ. Leave one of them out.")
    return {"weight": values.pop()} if role == "assistant" and values - {1.0} else {}


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise UserError(f"{where} has {row[key]!r:.80} in '{key}'; expected text.")
    return row[key]


def _pair(asked: str, answered: str) -> list[Turn]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _history(row: Mapping[str, Any], where: str) -> list[Turn]:
    """Return the earlier rounds, which ms-swift and LLaMA-Factory have as pairs."""
    history = row.get("history") or []
    if not isinstance(history, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in history
    ):
        raise UserError(
            f"{where} has a 'history' that is not a list of [query, response] pairs: "
            f"{history!r:.80}."
        )
    return [turn for pair in history for turn in _pair(*pair)]


def _answered(row: Mapping[str, Any], where: str, *, asked: str, answered: str) -> list[Turn]:
    """A question and an answer under two keys; of several answers the first.

    All of them stand beside that turn's content, for evaluators.
    """
    value = row[answered]
    answers = value if isinstance(value, list | tuple) else [value]
    if not answers:
        raise UserError(f"{where} has an empty list in '{answered}'; the first one is trained on.")
    last = _pair(_text(row, asked, where), _text({answered: answers[0]}, answered, where))
    if len(answers) > 1:
        last[1]["answers"] = [one for one in answers if isinstance(one, str)]
    return _history(row, where) + last


def _prompt(row: Mapping[str, Any], where: str) -> list[Turn]:
    """TRL: two texts, or two lists of messages; loss falls on the completion alone."""
    asked, answered = (
        _listed(row[key], f"{where}, '{key}'")
        if isinstance(row[key], list | tuple)
        else [Turn(role=role, content=_text(row, key, where))]
        for key, role in (("prompt", "user"), ("completion", "assistant"))
    )
    return [{**t, "weight": 0.0} if t["role"] == "assistant" else t for t in asked] + answered


def _instruction(row: Mapping[str, Any], where: str) -> list[Turn]:
    """Alpaca: the input stands on a line below the instruction."""
    asked = [_text(row, key, where) for key in ("instruction", "input") if is_given(row, key)]
    return _history(row, where) + _pair("\n".join(asked), _text(row, "output", where))


def _pairs(asked: str, answered: str) -> Format:
    return Format(
        needed=(asked, answered),
        optional=("history",),
        turns=functools.partial(_answered, asked=asked, answered=answered),
    )


# A format's first key, or all -> how it is read. To add one, add a row.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), (), lambda row, where: _listed(row["messages"], where)),
    "conversations": Format(
        ("conversations",), (), lambda row, where: _listed(row["conversations"], where)
    ),
    "query": _pairs("query", "response"),
    "prompt": Format(("prompt", "completion"), (), _prompt),
    "prompt and response": _pairs("prompt", "response"),
    "question": _pairs("question", "answer"),
    "instruction": Format(("instruction", "output"), ("input", "history"), _instruction),
}
CHATS = ("messages", "conversations")
BESIDE = frozenset(
    {"id", "objects", *SYSTEM, *IMAGES, *VIDEOS, *CHATS}
)  # what any format may have beside it
READ = BESIDE.union(*(form.needed + form.optional for form in FORMATS.values()))


def _with_system(row: Mapping[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    """Return the turns with a system prompt that stands beside them as the first."""
    for key in (key for key in SYSTEM if is_given(row, key)):
        prompt = row[key]
        if not isinstance(prompt, str):
            raise UserError(f"{where} has a '{key}' that is not text: {prompt!r:.80}.")
        own = [turn["content"] for turn in turns if turn["role"] == "system"]
        if prompt.strip() and not own:
            turns = [{"role": "system", "content": prompt}, *turns]
        elif prompt.strip() and own != [prompt]:
            raise UserError(
                f"{where} has a '{key}' that differs from its system turn. Leave one of them out."
            )
    return turns
