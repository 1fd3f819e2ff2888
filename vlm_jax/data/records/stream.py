"""Streams: data sets read from front to back, never as a whole."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.records.captions import PROMPT, as_turns
from vlm_jax.data.records.formats import check_columns
from vlm_jax.data.records.jsonl import JsonLines
from vlm_jax.data.records.record import Record, canonical
from vlm_jax.data.records.sources import READERS, encoded_images, pick_split
from vlm_jax.data.records.tables import CsvLines
from vlm_jax.errors import UserError
from vlm_jax.files.file_types import refuse_lost


class Stream:
    """Canonical records in the order of rows that come one by one; they have no length.

    The order is the stream's own and the same each time: `records_from(n)` gives what comes behind
    the first n records. Pickled with the data set's description, not its data.
    """

    def __init__(
        self,
        rows: Any,
        name: str,
        folder: str | None = None,
        columns: Mapping[str, str] | None = None,
    ):
        check_columns(columns or {})
        self.rows, self.name, self.folder = encoded_images(rows), name, folder
        self.columns = dict(columns or {})

    def records_from(self, skip: int = 0) -> Iterator[Record | UserError]:
        """Yield the records behind the first `skip`; in a bad one's place, what is wrong with it.

        A record's "index" counts from the stream's beginning. Raises `UserError` where the stream
        itself cannot continue (a damaged file, a connection that is lost).
        """
        rows = enumerate(self.rows.skip(skip) if skip else self.rows, start=skip)
        index = skip - 1
        while True:
            try:
                index, row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # network, builders and casts raise many unrelated types
                raise UserError(
                    f"The stream '{self.name}' breaks behind record {index}: "
                    f"{(str(error).splitlines() or [''])[0]}. Repair it there."
                ) from error
            if isinstance(row, UserError):
                yield row
                continue
            try:
                yield canonical(row, index, self.folder, self.name, columns=self.columns)
            except UserError as error:
                yield error

    def place(self, index: int) -> str:
        """Return where a record stands, for errors."""
        return f"'{self.name}', record {index}"


def open_stream(
    source: Any,
    image_folder: str | Path | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    caption_prompt: str | None = None,
) -> Stream:
    """Return the stream of an `IterableDataset`, a .jsonl, .csv, .tsv or .parquet file, or a hub
    data set; the other options are those of `read_records`.

    Raises `UserError` where the source cannot be streamed.
    """
    import datasets

    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    folder = str(image_folder) if image_folder else None
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    if isinstance(source, list | tuple):
        raise UserError("A list of sources cannot be streamed: leave data.streaming out.")
    try:
        if path is not None and path.is_file():
            folder = folder or str(path.parent)
            refuse_lost(path, f"The data file '{path}'")
            if path.suffix in (".jsonl", ".ndjson"):
                return Stream(JsonLines(path), name, folder, columns)
            if path.suffix.lower() in (".csv", ".tsv"):
                prompt, taken = caption_prompt or PROMPT, tuple((columns or {}).values())
                read = functools.partial(as_turns, prompt=prompt, taken=taken)
                return Stream(CsvLines(path, read), name, folder, columns)
            if path.suffix != ".parquet":
                raise UserError(
                    f"The data file '{path}' cannot be streamed; expected .jsonl, .csv, .tsv or "
                    f".parquet. Leave data.streaming out: other files are read without it."
                )
            rows = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True
            )
        elif path is not None:
            if path.suffix in READERS or (not path.is_dir() and name.count("/") != 1):
                raise UserError(f"There is no data file or directory '{name}'.")
            rows = datasets.load_dataset(str(source), streaming=True)
            folder = folder or (str(path) if path.is_dir() else None)
        else:
            rows = source
    except UserError:
        raise
    except Exception as error:  # network, gating and builders raise many unrelated types
        raise UserError(
            f"'{name}' cannot be opened as a stream: {(str(error).splitlines() or [''])[0]}"
        ) from error
    rows = pick_split(rows, name, split)
    if not isinstance(rows, datasets.IterableDataset):
        raise UserError(f"A stream is an IterableDataset or a name of one, not {name}.")
    return Stream(rows, name, folder, columns)


class StreamRecords:
    """The records of a stream by number, as far as they are at hand: those of the last windows.

    What the planner has instead of `Records`: it goes through a stream window by window, in each
    worker process again. Pickles without what it holds.
    """

    fingerprint = None
    HELD = 3  # windows: a step may begin in one and end in the next

    def __init__(self, stream: Stream):
        self.stream, self.name, self.folder = stream, stream.name, stream.folder
        self._begin()

    def _begin(self) -> None:
        self._held: dict[int, Record | UserError] = {}
        self._rest: Iterator[Record | UserError] | None = None
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __getitem__(self, index: int) -> Record:
        record = self._held[int(index)]
        if isinstance(record, UserError):
            raise record
        return record

    def windows(self, cursor: int, size: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield (numbers of the records of a window, whether the stream ends with it)."""
        while True:
            if self._rest is None or self._next != cursor:
                self._rest, self._next, self._held = self.stream.records_from(cursor), cursor, {}
            # One more, to know whether this is all; it stays for the next window.
            found = [self._held[cursor]] if cursor in self._held else []
            found += itertools.islice(self._rest, size + 1 - len(found))
            members = np.arange(cursor, cursor + min(size, len(found)))
            self._held.update(zip(range(cursor, cursor + len(found)), found, strict=True))
            for old in [i for i in self._held if i < cursor - (self.HELD - 1) * size]:
                del self._held[old]
            last = len(found) <= size
            cursor = self._next = cursor + len(members)
            if last:
                self._rest = None
            if len(members):
                yield members, last
            if last:
                return

    def place(self, index: int) -> str:
        """Return where a record stands, for errors."""
        return self.stream.place(index)
