"""Policies for examples longer than a row; none of them truncates.

An image is whole or not there at all: its tokens are never truncated, and neither is an answer.
"""

import bisect
import collections
import itertools
from collections.abc import Callable, Mapping, Sized
from typing import Any, NamedTuple

from vlm_jax.data.records.record import BadExample, Record, describe

# data.overlong -> what is tried, in this order, before the example is left out, and how the message
# of one that does not fit says so.
POLICIES: dict[str, tuple[tuple[str, ...], str]] = {
    "shrink_pixels": (
        ("shrink", "turns"),
        ", even with its images at their least size and its leading turns left out",
    ),
    "drop_turns": (("turns",), ", even with its leading turns left out"),
    "drop": ((), ""),
    "error": ((), ""),
}


class Trial(NamedTuple):
    """An example as it would be encoded: its record, the pixel limit of its images, its size."""

    record: Record
    max_pixels: int | None  # None: the processor's own
    tokens: int
    patches: int
    encoded: Any


def fit(
    record: Record,
    attempt: Callable[[Record, int | None], Trial],
    limits: tuple[int | None, int | None],
    policy: str,
    pixels: tuple[int, int] | None,
) -> tuple[Trial, bool]:
    """Return the first trial that fits and True, or the last one and False.

    attempt: sizes up a record with its images limited to so many pixels. limits: most tokens and
    patches. pixels: the least and most pixels an image may get; None where they cannot change.
    With "shrink_pixels" every image of the example gets the largest common limit that fits, down
    to the least; if that is not enough, or with "drop_turns", whole leading exchanges are dropped
    with their images, as few as possible, the system prompt kept.
    """
    steps, _ = POLICIES[policy]

    def fits(trial: Trial) -> bool:
        pairs = zip((trial.tokens, trial.patches), limits, strict=True)
        return all(limit is None or size <= limit for size, limit in pairs)

    full = attempt(record, None)
    if fits(full):
        return full, True

    def tried(dropped: int) -> Trial | None:
        shorter = drop_exchanges(record, dropped)
        trial = attempt(shorter, None) if dropped else full
        if fits(trial):
            return trial
        if "shrink" not in steps or pixels is None or not trial.patches:
            return None
        low, high = pixels
        if not fits(attempt(shorter, low)):
            return None
        over = bisect.bisect_left(
            range(low, high), True, lo=1, key=lambda most: not fits(attempt(shorter, most))
        )
        return attempt(shorter, low + over - 1)

    found = tried(0)
    exchanges = [message for message in record["messages"] if message["role"] == "user"]
    most = len(exchanges) - 1 if "turns" in steps else 0
    if found is None and most > 0:  # an exchange less never takes more: the fewest are bisected
        fewest = bisect.bisect_left(
            range(most), True, lo=1, key=lambda dropped: tried(dropped) is not None
        )
        found = tried(fewest)
    return (full, False) if found is None else (found, True)


def too_long(
    trial: Trial,
    limits: tuple[int | None, int | None],
    policy: str,
    features: int,
    media: Mapping[str, Sized],
) -> BadExample:
    """Return what says that a trial does not fit: by how much, and what would help.

    features: its tokens that stand for images and videos; media: one item for each.
    """
    length, most_patches = limits
    reason, have, limit = (
        ("too_long", f"{trial.tokens} tokens", f"data.max_seq_length = {length}")
        if length is not None and trial.tokens > length
        else (
            "too_many_patches",
            f"{trial.patches} patches",
            f"data.max_patches = {most_patches}",
        )
    )
    return BadExample(
        reason,
        f"{describe(trial.record)} has {have} ({features} tokens are for {len(media['image'])} "
        f"images and {len(media['video'])} videos), more than {limit}{POLICIES[policy][1]}. "
        f"It is not cut: raise the limit, lower data.max_pixels, or split the conversation.",
    )


def drop_exchanges(record: Record, count: int) -> Record:
    """Return the record without its first `count` user turns, their answers and their images."""
    messages = record["messages"]
    turns = itertools.accumulate(message["role"] == "user" for message in messages)
    kept = [m["role"] == "system" or turn > count for m, turn in zip(messages, turns, strict=True)]
    left_out = itertools.compress(messages, (not keep for keep in kept))
    dropped = collections.Counter(part["type"] for m in left_out for part in m["content"])
    rest = {
        name: record[name][dropped[kind] :]
        for name, kind in (("images", "image"), ("videos", "video"))
        if name in record
    }
    return {**record, "messages": list(itertools.compress(messages, kept)), **rest}
