"""Exact-match accuracy: the share of answers that are the first right one, after `normalise`."""

import functools
from collections.abc import Sequence

from vlm_jax.evals.answers import scored


def normalise(text: str) -> str:
    """Return what is compared: lower case, single spaces, no full stop at the end.

    Nothing else is forgiven: "a red ball" is not "red ball", and 2 is not "two".
    """
    return " ".join(text.split()).lower().rstrip(".").rstrip()


def is_exact(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether a prediction is the answer that training would have taught, the first one."""
    return normalise(prediction) == normalise(answers[0])


accuracy = functools.partial(scored, "accuracy", is_exact)
