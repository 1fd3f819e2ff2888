"""Rows of CSV and TSV files: indexed in one pass, parsed on access."""

import csv
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vlm_jax.data.records.formats import READ
from vlm_jax.data.records.jsonl import BOM, FileRows, check_utf8
from vlm_jax.errors import UserError, explained
from vlm_jax.files.limits import CSV_ROW_BYTES

IMAGE = ("image", "file_name", "path")  # the column that names a row's picture
CAPTION = ("text", "caption")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# Columns whose cells may be JSON lists: a cell itself is always text.
LISTS = ("image", "images", "video", "videos", "messages", "conversations", "history", "objects")


class _Reader:
    """A file's header, and its rows front to back: (place in bytes, line from 1, bytes).

    Lines of nothing but separators are none.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name, self.digest = file, name, hashlib.blake2b(digest_size=16)
        self.place, self.line = 0, 1
        head = os.pread(file.fileno(), 1 << 16, 0)
        check_utf8(head[:2], name)
        if head.startswith(BOM):
            self.place = file.seek(len(BOM))
        if excel := re.match(rb"sep=([,;\t])\r?\n", head.removeprefix(BOM)):
            self.place, self.line = file.seek(self.place + excel.end()), 2
        first = re.split(rb"[\r\n]", head[self.place :], maxsplit=1)[0].decode(errors="replace")
        self.separator = excel[1].decode() if excel else _separator(first, name)
        # The module's own limit, for the whole process, is 128 KiB; a row is bounded below.
        csv.field_size_limit(max(csv.field_size_limit(), CSV_ROW_BYTES))
        self.rows = self._read()
        _, _, data = next(self.rows, (0, 0, b""))
        if not data:
            raise UserError(f"The data file '{name}' is empty: its first row names the columns.")
        self.header = _Header(data, self.separator, name)

    def _read(self) -> Iterator[tuple[int, int, bytes]]:
        held: list[bytes] = []

        def lines() -> Iterator[str]:
            size = 0
            while line := self.file.readline(CSV_ROW_BYTES + 1):
                size = len(line) + (size if held else 0)
                if size > CSV_ROW_BYTES:
                    raise UserError(
                        f"The data file '{self.name}' has a row of more than {CSV_ROW_BYTES} "
                        f"bytes, which begins on line {self.line}: probably a quote there is not "
                        f"closed."
                    )
                held.append(line)
                self.digest.update(line)
                yield line.decode(errors="surrogateescape")

        with explained(
            csv.Error,
            lambda error: (
                f"The data file '{self.name}' is not CSV: the row that begins on line {self.line}: "
                f"{error}. Save it as CSV in UTF-8."
            ),
        ):
            for cells in csv.reader(lines(), delimiter=self.separator):
                data, count = b"".join(held), len(held)
                held.clear()
                if any(cells):
                    yield self.place, self.line, data
                self.place, self.line = self.place + len(data), self.line + count


def _separator(header: str, name: str) -> str:
    """Return what separates the columns: what names most that are read, then most at all."""
    if Path(name.removesuffix(".gz").removesuffix(".zst")).suffix.lower() == ".tsv":
        return "\t"
    known = {*READ, *IMAGE, *CAPTION}

    def fit(separator: str) -> tuple[int, int]:
        names = next(csv.reader([header], delimiter=separator), [])
        return len(known.intersection(map(str.strip, names))), len(names)

    return max(SEPARATORS, key=fit)


class _Header:
    """The columns of a file, and a row of them by its bytes."""

    def __init__(self, data: bytes, separator: str, name: str):
        self.separator, self.name = separator, name
        self.columns = [cell.strip() for cell in self._cells(data, f"The header of '{name}'")]
        if twice := {c for c in self.columns if c and self.columns.count(c) > 1}:
            raise UserError(
                f"The data file '{name}' has the column '{min(twice)}' twice: keep one of them."
            )

    def _cells(self, data: bytes, where: str) -> list[str]:
        try:
            text = io.StringIO(data.decode(), newline="")
            return next(csv.reader(text, delimiter=self.separator, strict=True), [])
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 text (byte {error.start} of the row): save it as UTF-8"
        except csv.Error as error:
            problem = f"is not CSV: {error}"
        raise UserError(f"{where} {problem}.")

    def row(self, data: bytes, where: str) -> dict[str, Any]:
        """Return {column: text}, None for an empty cell; errors begin with `where`."""
        cells = self._cells(data, where)
        if len(cells) != len(self.columns):
            raise UserError(
                f"{where} has {'more' if len(cells) > len(self.columns) else 'fewer'} fields than "
                f"the header ({len(cells)} and {len(self.columns)}, separated by "
                f"{SEPARATORS[self.separator]}): put a text that holds a separator in quotes."
            )
        return {
            column: _value(column, cell)
            for column, cell in zip(self.columns, cells, strict=True)
            if column  # pandas writes its index under no name
        }


def _value(column: str, cell: str) -> Any:
    if column in LISTS and cell.startswith(("[", "{")):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell if cell.strip() else None


def index_table(path: Path, name: str | None = None) -> FileRows:
    """Return the rows of a .csv or .tsv file whose first row names the columns.

    Columns are separated by commas, semicolons or tabs, whichever the header has.
    """
    with open(path, "rb") as file:
        reader = _Reader(file, name or str(path))
        spans = [(place, place + len(data), line) for place, line, data in reader.rows]
    return FileRows(
        path,
        spans,
        fingerprint=f"{reader.digest.hexdigest()} {reader.separator}",
        name=reader.name,
        parse=reader.header.row,
    )


def table_lines(
    file: BinaryIO, name: str, read: Callable[..., Any]
) -> Iterator[tuple[int, Callable[[str], Any]]]:
    """Yield the rows of a CSV file for `jsonl.Lines`, each as `read(data, where, parse=...)`.

    parse: gives {column: text} of the same bytes and place.
    """
    reader = _Reader(file, name)
    for _, line, data in reader.rows:
        yield line, functools.partial(read, data, parse=reader.header.row)
