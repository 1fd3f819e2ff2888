"""Lengths of records in tokens and patches: measured once, cached in a file that processes share.

A record's tokens and patches follow from its text, its images' headers and the settings alone, so
they are worth keeping: between runs, and between the processes of one run, which measure whatever
the others have not.
"""

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data.cache import cache_directory
from vlm_jax.errors import UserError, explained

VERSION = 4  # raise it when measuring changes: files of an older one are not read
COLUMNS = ("tokens", "patches", "answers", "notes", "check")
CHECK = 0x56_4C_4D  # a row's check is this and the other columns xor-ed: no half-written row passes
SHRUNK, TURNS_DROPPED, FILMED = 1, 2, 4  # bits of notes; FILMED: it holds a video
# Why a record is left out, in the order of the codes that stand in for its tokens: -1, -2, ...
REASONS = (
    "record",
    "template",
    "image",
    "video",
    "no_answer",
    "too_long",
    "too_many_patches",
    "placeholders",
    "changed",
)


class Size(NamedTuple):
    """What an example takes of a row: tokens, patches; how many tokens carry loss; and notes."""

    tokens: int
    patches: int
    answers: int
    notes: int = 0


class Measures:
    """Sizes of `count` records, in a file mapped into memory.

    path: the file, made where it is missing, shared by all who open it; None: a temporary file
    that ends with its first owner. Pickles as its path, so that worker processes share it.
    run: the number of the run, which its processes share; None: a new one.
    What one run finds bad (`drop`) the next one measures again: it may have been repaired since.
    """

    def __init__(self, count: int, path: str | Path | None = None, run: int | None = None):
        self.count, self.run = count, secrets.randbits(30) if run is None else run
        self._owned = tempfile.NamedTemporaryFile(suffix=".sizes") if path is None else None
        self.path = str(self._owned.name if self._owned else path)
        self._map()

    def _map(self) -> None:
        shape = (self.count, len(COLUMNS))
        with explained(
            OSError,
            lambda error: (
                f"The sizes of the records cannot be kept in '{self.path}' ({error.strerror}): "
                f"delete it, or make it writable."
            ),
        ):
            Path(self.path).touch()
            # NumPy fills it up with zeros, which pass no check: "not measured".
            self.table: np.ndarray = np.memmap(self.path, np.int32, mode="r+", shape=shape)

    def __reduce__(self) -> tuple:
        return type(self), (self.count, self.path, self.run)

    def unknown(self, indices: np.ndarray) -> np.ndarray:
        """Return those of the indices that are not measured yet."""
        return indices[~self._known(np.asarray(self.table[indices]))]

    def _known(self, rows: np.ndarray) -> np.ndarray:
        valid = np.bitwise_xor.reduce(rows, axis=1) == CHECK
        return valid & ((rows[:, 0] >= 0) | np.isin(rows[:, 3], (0, self.run)))

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Return int64 [len(indices), 4]: `Size` of measured records; tokens < 0: left out."""
        return np.asarray(self.table[indices][:, :4], np.int64)

    def kept(self, indices: np.ndarray) -> np.ndarray:
        """Return those of the measured indices whose records are not left out."""
        rows = np.asarray(self.table[indices])
        return indices[self._known(rows) & (rows[:, 0] >= 0)]

    def put(self, index: int, size: Size) -> None:
        """Write a record's size."""
        self.table[index] = (*size, CHECK ^ np.bitwise_xor.reduce(size))

    def drop(self, index: int, reason: str, lasting: bool = False) -> None:
        """Write that a record is left out: for good, or as far as this run is concerned."""
        self.put(index, Size(-1 - REASONS.index(reason), 0, 0, 0 if lasting else self.run))

    def forget(self, index: int) -> None:
        """Let a record be measured again, by the next one who asks for it."""
        self.table[index] = 0

    def reasons(self) -> dict[str, np.ndarray]:
        """Return {reason: indices} of the records known to be left out."""
        table = np.asarray(self.table)
        known = self._known(table)
        return {
            reason: np.flatnonzero(known & (table[:, 0] == -1 - code))
            for code, reason in enumerate(REASONS)
            if (known & (table[:, 0] == -1 - code)).any()
        }


class StreamMeasures(Measures):
    """Sizes in memory, per process: of a stream's records, whose number is unknown, or a sample."""

    def _map(self) -> None:
        self.table = np.zeros((1024, len(COLUMNS)), np.int32)

    def unknown(self, indices: np.ndarray) -> np.ndarray:
        self.count = max(self.count, int(indices.max(initial=-1)) + 1)
        if self.count > len(self.table):
            self.table = np.pad(self.table, ((0, max(self.count, len(self.table))), (0, 0)))
        return super().unknown(indices)


def measures_file(place: str | Path | None, content: str | None, settings: Any) -> Path | None:
    """Return where sizes of records of this content under these settings are kept.

    place: the data file or directory; the file lies in `.vlm_jax` beside it, or, where nothing
    can be written there, in the user's cache. settings: JSON-able; all that sizes depend on.
    None where the records' content has no identity (rows that are not plain values): then nothing
    is kept.
    """
    if place is None or content is None:
        return None
    key = hashlib.blake2b(
        json.dumps([VERSION, content, settings], sort_keys=True).encode(), digest_size=12
    ).hexdigest()
    place = Path(place).expanduser()
    name, folders = "records", [cache_directory() / "sizes"]
    if place.exists():
        name = place.name
        folders.insert(0, (place if place.is_dir() else place.parent) / ".vlm_jax")
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder / f"{name}-{key}.sizes"
    raise UserError(
        f"The sizes of the records of '{place}' cannot be kept: "
        f"{' and '.join(map(repr, map(str, folders)))} cannot be written. Make one of them "
        f"writable."
    )
