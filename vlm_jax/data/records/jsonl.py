"""Rows of JSON files: indexed in one pass, parsed on access."""

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.errors import UserError

CHUNK = 1 << 24
BLANK = b" \t\r\n\f\v"
NOT_UTF8 = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
BOM = b"\xef\xbb\xbf"


def parse_row(data: bytes, where: str) -> Any:
    """Return the value of one row; raises `UserError`, which begins with `where`, for bad JSON."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start} of the row): save it as UTF-8"
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON: column {error.colno}: {error.msg}"
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5,000 digits
        problem = f"cannot be read: {error}"
    raise UserError(f"{where} {problem}. Each row must be one whole JSON object.")


class JsonLines:
    """The rows of a JSONL file from front to back: blank lines are none, nothing is indexed.

    A line that is not JSON comes as the `UserError` that says so, in its own place.
    """

    def __init__(self, path: Path, start: int = 0):
        self.path, self.start = path, start

    def skip(self, count: int) -> "JsonLines":
        """Return the rows behind the next `count`."""
        return JsonLines(self.path, self.start + count)

    def __iter__(self) -> Iterator[Any]:
        index = 0
        with open(self.path, "rb") as file:
            check_utf8(os.pread(file.fileno(), 2, 0), str(self.path))
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(BOM) if number == 1 else line
                if not line.strip(BLANK):
                    continue
                if index >= self.start:
                    try:
                        row = parse_row(line, f"Record {index} of '{self.path}', line {number},")
                    except UserError as error:
                        row = error
                    yield row
                index += 1


class JsonRows(Sequence):
    """The rows of one file: where each begins and ends, and the line it begins on.

    starts, ends: int64 [N], bytes. lines: int32 [N], counted from 1. fingerprint: BLAKE2b of the
    file. name: what errors call the file (a compressed file is read from its plain copy).
    Thread-safe: rows are read by `pread`. Pickled by path: other processes open it again.
    """

    def __init__(
        self,
        path: Path,
        starts: np.ndarray,
        ends: np.ndarray,
        lines: np.ndarray,
        fingerprint: str,
        name: str,
    ):
        self.path, self.name, self.fingerprint = str(path.resolve()), name, fingerprint
        self.starts, self.ends, self.lines = starts, ends, lines
        self._stamp = _stamp(os.stat(self.path))
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, index: int) -> int:
        """Return the line, from 1, on which a row begins."""
        return int(self.lines[index])

    def __getitem__(self, index: Any) -> Any:
        """Return one row; raises `UserError`, naming file and line, where it is not JSON."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = int(self.starts[index]), int(self.ends[index])
        data = os.pread(self._open(), end - start, start)
        where = f"Record {index} of '{self.name}', line {self.line(index)},"
        if len(data) < end - start:
            raise UserError(
                f"{where} is no longer whole: the file became shorter since it was opened. Leave "
                f"data files as they are while they are read, and start again."
            )
        return self.parse(data, where)

    def parse(self, data: bytes, where: str) -> Any:
        """Return the value of one row; raises `UserError` that begins with `where`."""
        return parse_row(data, where)

    def _open(self) -> int:
        if self._file is None:
            try:
                file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(
                    f"The data file '{self.path}' cannot be opened any more: {error.strerror}."
                ) from error
            if _stamp(os.fstat(file)) != self._stamp:
                os.close(file)
                raise UserError(
                    f"The data file '{self.path}' was changed after it was indexed. Leave data "
                    f"files as they are while they are read, and start again."
                )
            weakref.finalize(self, os.close, file)
            self._file = file  # two threads may each open it: one descriptor more, no harm
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def index_lines(path: Path, name: str | None = None) -> JsonRows:
    """Return the rows of a JSONL file, one a line, without parsing any: blank lines are none.

    A UTF-8 byte order mark at the start is passed over.
    """
    name = name or str(path)
    digest = hashlib.blake2b(digest_size=16)
    starts, ends, lines = [], [], []
    # The end of the last line so far, and its number. The byte before the file counts as one.
    newline, number, base = -1, 0, 0
    blank_lead = np.isin(np.arange(256), np.frombuffer(BLANK, np.uint8))
    with open(path, "rb") as file, ThreadPoolExecutor(1) as pool:
        head = os.pread(file.fileno(), len(BOM), 0)
        check_utf8(head[:2], name)
        newline = len(BOM) - 1 if head == BOM else -1
        for chunk in _ahead(file, pool, digest):
            found = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + base
            if len(found):
                begin = np.concatenate([[newline], found[:-1]]) + 1
                numbers = np.arange(number + 1, number + 1 + len(found))
                keep = begin < found
                _drop_blank(file, chunk, base, begin, found, keep, blank_lead)
                starts.append(begin[keep])
                ends.append(found[keep])
                lines.append(numbers[keep].astype(np.int32))
                newline, number = int(found[-1]), number + len(found)
            base += len(chunk)
        if newline + 1 < base and os.pread(file.fileno(), base, newline + 1).strip(BLANK):
            starts.append(np.array([newline + 1]))
            ends.append(np.array([base]))
            lines.append(np.array([number + 1], np.int32))
    empty = [np.zeros(0, np.int64)]
    return JsonRows(
        path,
        np.concatenate(starts or empty).astype(np.int64, copy=False),
        np.concatenate(ends or empty).astype(np.int64, copy=False),
        np.concatenate(lines or empty).astype(np.int32, copy=False),
        digest.hexdigest(),
        name,
    )


def check_utf8(mark: bytes, name: str) -> None:
    """Raise `UserError` for a file that begins as UTF-16 text does."""
    if mark in NOT_UTF8:
        raise UserError(
            f"The data file '{name}' is {NOT_UTF8[mark]}, not UTF-8 text: save it as UTF-8."
        )


def _ahead(file: Any, pool: ThreadPoolExecutor, digest: Any) -> Iterator[bytes]:
    """Yield the file's chunks; each is hashed in the pool's thread while the caller has it."""
    while chunk := file.read(CHUNK):
        hashed = pool.submit(digest.update, chunk)
        yield chunk
        hashed.result()


def _drop_blank(
    file: Any,
    chunk: bytes,
    base: int,
    begin: np.ndarray,
    end: np.ndarray,
    keep: np.ndarray,
    blank_lead: np.ndarray,
) -> None:
    """Clear `keep` for lines of white space: only one that begins with some is looked at."""
    data = np.frombuffer(chunk, np.uint8)
    inside = np.maximum(begin - base, 0)  # the first line may begin in the chunk before
    suspects = np.flatnonzero(keep & (blank_lead[data[inside]] | (begin < base)))
    for i in suspects.tolist():
        a, b = int(begin[i]), int(end[i])
        text = chunk[a - base : b - base] if a >= base else os.pread(file.fileno(), b - a, a)
        keep[i] = bool(text.strip(BLANK))


def index_list(path: Path, name: str | None = None) -> JsonRows:
    """Return the rows of a JSON file that holds one list.

    The file is read whole once, to find where its rows are; none of them is kept.
    Raises `UserError` where it is not a JSON list, naming the line.
    """
    name = name or str(path)
    data = path.read_bytes()
    fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
    check_utf8(data[:2], name)
    byte = len(BOM) if data.startswith(BOM) else 0
    # A row that is not UTF-8 says so itself when it is asked for.
    text = data[byte:].decode(errors="surrogateescape")
    del data
    try:
        spans = _elements(text)
    except json.JSONDecodeError as error:
        hint = " One object a line makes a .jsonl file: rename it." if "Extra" in error.msg else ""
        raise UserError(
            f"The data file '{name}' is not valid JSON: line {error.lineno}, column "
            f"{error.colno}: {error.msg}.{hint}"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5,000 digits
        raise UserError(f"The data file '{name}' cannot be read: {error}.") from error
    if spans is None:
        kind = type(json.loads(text)).__name__
        raise UserError(f"The data file '{name}' holds a JSON {kind}; expected a list.")
    starts, ends, lines = np.zeros((3, len(spans)), np.int64)
    place, line, ascii_only = 0, 1, text.isascii()
    for i, (a, b) in enumerate(spans):
        between = text[place:a]
        row = text[a:b]
        byte += len(between) if ascii_only else len(between.encode(errors="surrogateescape"))
        line += between.count("\n")
        starts[i], lines[i] = byte, line
        byte += len(row) if ascii_only else len(row.encode(errors="surrogateescape"))
        line += row.count("\n")
        ends[i], place = byte, b
    return JsonRows(path, starts, ends, lines.astype(np.int32), fingerprint, name)


def _elements(text: str) -> list[tuple[int, int]] | None:
    """Return where the elements of a JSON list stand, or None where it is another value."""
    decode, space = json.JSONDecoder().raw_decode, json.decoder.WHITESPACE  # type: ignore[attr-defined]

    def skip(place: int) -> int:
        return space.match(text, place).end()

    place = skip(0)
    if text[place : place + 1] != "[":
        json.loads(text)  # raises for what is no JSON at all
        return None
    place = skip(place + 1)
    spans: list[tuple[int, int]] = []
    closed = text[place : place + 1] == "]"
    while not closed:
        end = decode(text, place)[1]
        spans.append((place, end))
        place = skip(end)
        mark = text[place : place + 1]
        if mark not in (",", "]") or not mark:
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        closed = mark == "]"
        place = place if closed else skip(place + 1)
    if skip(place + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, skip(place + 1))
    return spans
