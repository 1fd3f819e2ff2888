"""Streams: data sets read from front to back, never as a whole."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.records.captions import PROMPT, as_turns
from vlm_jax.data.records.formats import check_columns
from vlm_jax.data.records.jsonl import Lines, json_lines
from vlm_jax.data.records.record import Record, canonical
from vlm_jax.data.records.sources import READERS, encoded_images, pick_split, reporting
from vlm_jax.data.records.tables import table_lines
from vlm_jax.errors import UserError
from vlm_jax.files.file_types import refuse_lost

END = object()


class Stream:
    """Canonical records in the order of rows that come one by one; they have no length.

    The order is the stream's own and the same each time: `records_from(n)` gives what comes behind
    the first n records. A planner goes through it window by window, in each worker process again;
    of the last windows a record is given by its number. Pickled with the data set's description,
    not its data.
    """

    HELD = 3  # windows: a step may begin in one and end in the next

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
        self._held: dict[int, Record | UserError] = {}
        self._rest: Iterator[Record | UserError] | None = None
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": {}, "_rest": None}

    def __getitem__(self, index: int) -> Record:
        record = self._held[int(index)]
        if isinstance(record, UserError):
            raise record
        return record

    def records_from(self, skip: int = 0) -> Iterator[Record | UserError]:
        """Yield the records behind the first `skip`; in a bad one's place, what is wrong with it.

        A record's "index" counts from the stream's beginning. Raises `UserError` where the stream
        itself cannot continue (a damaged file, a connection that is lost).
        """
        rows = iter(self.rows.skip(skip) if skip else self.rows)
        for index in itertools.count(skip):
            with reporting(
                f"The stream '{self.name}' breaks behind record {index - 1}", ". Repair it there."
            ):
                row: Any = next(rows, END)
            if row is END:
                return
            try:
                row = row() if callable(row) else row  # of `Lines`
                record: Record | UserError = canonical(
                    row, index, self.folder, self.name, columns=self.columns
                )
            except UserError as error:
                record = error
            yield record

    def windows(self, cursor: int, size: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield (numbers of the records of a window, whether the stream ends with it)."""
        last = False
        while not last:
            if self._rest is None or self._next != cursor:
                self._rest, self._next, self._held = self.records_from(cursor), cursor, {}
            # One more, to know whether this is all; it stays for the next window.
            found = [self._held[cursor]] if cursor in self._held else []
            found += itertools.islice(self._rest, size + 1 - len(found))
            members = np.arange(cursor, cursor + min(size, len(found)))
            self._held.update(enumerate(found, start=cursor))
            oldest = cursor - (self.HELD - 1) * size
            self._held = {i: record for i, record in self._held.items() if i >= oldest}
            last = len(found) <= size
            cursor = self._next = cursor + len(members)
            if len(members):
                yield members, last

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
    if isinstance(source, list | tuple):
        raise UserError("A list of sources cannot be streamed: leave data.streaming out.")
    rows = source
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_file():
            folder = folder or str(path.parent)
            refuse_lost(path, f"The data file '{path}'")
            read = functools.partial(
                as_turns,
                prompt=caption_prompt or PROMPT,
                taken=frozenset((columns or {}).values()),
            )
            table = functools.partial(table_lines, read=read)
            readers: dict[str, Any] = {
                **{".jsonl": json_lines, ".ndjson": json_lines},
                **{".csv": table, ".tsv": table},
            }
            if path.suffix.lower() in readers:
                lines = Lines(path, readers[path.suffix.lower()])
                return Stream(lines, name, folder, columns)
            if path.suffix != ".parquet":
                raise UserError(
                    f"The data file '{path}' cannot be streamed; expected .jsonl, .csv, .tsv or "
                    f".parquet. Leave data.streaming out: other files are read without it."
                )
            options = {"path": "parquet", "data_files": str(path), "split": "train"}
        else:
            if path.suffix in READERS or (not path.is_dir() and name.count("/") != 1):
                raise UserError(f"There is no data file or directory '{name}'.")
            folder = folder or (str(path) if path.is_dir() else None)
            options = {"path": str(source)}
        with reporting(f"'{name}' cannot be opened as a stream"):
            rows = datasets.load_dataset(**options, streaming=True)
    rows = pick_split(rows, name, split)
    if not isinstance(rows, datasets.IterableDataset):
        raise UserError(f"A stream is an IterableDataset or a name of one, not {name}.")
    return Stream(rows, name, folder, columns)
