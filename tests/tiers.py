"""Which parameters of a long sweep the fast tier runs; the others are marked nightly."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast(kept: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters of a test, nightly where they are not among `kept`."""
    left = set(kept)
    params = [
        value if value in left else pytest.param(value, marks=pytest.mark.nightly)
        for value in values
    ]
    assert left <= set(values), f"{left} are not all among the values"
    return params
