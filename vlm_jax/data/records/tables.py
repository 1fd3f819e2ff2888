"""Rows of CSV and TSV files: indexed in one pass, parsed on access."""

import csv
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
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
    """A file's rows front to back, as (place in bytes, line from 1, bytes), and what parses one.

    The header is read at once. Lines of nothing but separators are no rows.
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
        cells = _cells(data, f"The header of '{name}'", self.separator)
        columns = [cell.strip() for cell in cells]
        if twice := {column for column in columns if column and columns.count(column) > 1}:
            raise UserError(
                f"The data file '{name}' has the column '{min(twice)}' twice: keep one of them."
            )
        self.parse = functools.partial(_row, columns=columns, separator=self.separator)

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


def _cells(data: bytes, where: str, separator: str) -> list[str]:
    try:
        text = io.StringIO(data.decode(), newline="")
        return next(csv.reader(text, delimiter=separator, strict=True), [])
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start} of the row): save it as UTF-8"
    except csv.Error as error:
        problem = f"is not CSV: {error}"
    raise UserError(f"{where} {problem}.")


def _row(data: bytes, where: str, *, columns: Sequence[str], separator: str) -> dict[str, Any]:
    """Return {column: text}, None for an empty cell; errors begin with `where`."""
    cells = _cells(data, where, separator)
    if len(cells) != len(columns):
        raise UserError(
            f"{where} has {'more' if len(cells) > len(columns) else 'fewer'} fields than the "
            f"header ({len(cells)} and {len(columns)}, separated by {SEPARATORS[separator]}): put "
            f"a text that holds a separator in quotes."
        )
    return {
        column: _value(column, cell)
        for column, cell in zip(columns, cells, strict=True)
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
        parse=reader.parse,
    )


def table_lines(
    file: BinaryIO, name: str, read: Callable[..., Any]
) -> Iterator[tuple[int, Callable[[str], Any]]]:
    """Yield the rows of a CSV file for `jsonl.Lines`, each as `read(data, where, parse=...)`.

    parse: gives {column: text} of the same bytes and place.
    """
    reader = _Reader(file, name)
    for _, line, data in reader.rows:
        yield line, functools.partial(read, data, parse=reader.parse)
