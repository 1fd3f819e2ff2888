"""Which parameters of a long sweep the fast tier runs; the others are marked nightly."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast(kept: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters of a test, nightly where they are not among `kept`."""
    values = list(values)
    assert all(value in values for value in kept), f"{kept} are not all among {values}"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in kept else pytest.mark.nightly,
        )
        for value in values
    ]
