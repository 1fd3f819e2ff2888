"""Average normalised Levenshtein similarity, the measure of DocVQA, InfographicVQA and ST-VQA.

https://arxiv.org/abs/1905.13648, equation 1: an answer that differs from a right one by less than
half of its letters counts in part, as a misread word should.
"""

import functools
from collections.abc import Sequence

from vlm_jax.evals.answers import scored

THRESHOLD = 0.5  # the normalised distance from which on an answer counts nothing


def edit_distance(one: str, other: str) -> int:
    """Return the least number of letters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))  # distances of one[:i] to each other[:j]
    for i, letter in enumerate(one, 1):
        above, row = row, [i]
        for j, theirs in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != theirs)))
    return row[-1]


def similarity(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 - NL of the nearest right answer, 0 where NL >= 0.5; case counts nothing.

    NL: the edit distance over the length of the longer text.
    """
    ours, *theirs = (" ".join(text.lower().split()) for text in (prediction, *answers))
    nearest = min(edit_distance(ours, text) / max(len(ours), len(text), 1) for text in theirs)
    return 1 - nearest if nearest < THRESHOLD else 0.0


anls = functools.partial(scored, "anls", similarity)
