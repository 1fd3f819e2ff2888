"""What fits a row: a record before any pixel is decoded, and what its text holds of its media."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.data.media.frame_sampling import Video
from vlm_jax.data.media.headers import KINDS, Grids, Media
from vlm_jax.data.records.record import Record
from vlm_jax.models.family import Family, Grid

Features = dict[str, list[Sequence[str | int]]]  # of each medium by kind, see Family.written


class Fitted(NamedTuple):
    """An example as it fits a row, before any pixel is decoded.

    media: the processors with the limit its images got. notes: bits of `measures`. films: the
    videos' headers.
    """

    record: Record
    media: Media
    grids: Grids
    tokens: np.ndarray
    weights: np.ndarray
    notes: int = 0
    films: Sequence[Video] = ()


def written(config: Family, grids: Grids, films: Sequence[Video]) -> Features:
    """Return what stands in a text for each medium; films: the videos' headers."""
    times: dict[str, list[Sequence[float]]] = {
        "image": [()] * len(grids["image"]),
        "video": [film.times for film in films],
    }
    return {
        kind: [
            config.written(kind, grid, when)
            for grid, when in zip(grids[kind], times[kind], strict=True)
        ]
        for kind in KINDS
    }


def count(features: Features) -> int:
    """Return how many placeholders there are in all."""
    parts = itertools.chain(*itertools.chain(*features.values()))
    return sum(part for part in parts if isinstance(part, int))


def stack_grids(grids: Sequence[Grid]) -> np.ndarray | None:
    return np.array(grids, np.int64) if grids and grids[0] is not None else None
