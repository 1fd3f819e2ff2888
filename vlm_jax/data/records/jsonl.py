"""Rows of JSON files: indexed in one pass, parsed on access."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.errors import UserError, explained

CHUNK = 1 << 24
BLANK = b" \t\r\n\f\v"
IS_BLANK = np.isin(np.arange(256), np.frombuffer(BLANK, np.uint8))  # by byte
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


@dataclasses.dataclass(frozen=True)
class Lines:
    """The rows of a file from front to back, each as a call that parses it; nothing is indexed.

    rows: from an opened file and its name, (line it begins on, what parses it, given what errors
    call it) of each row. Pickled by path.
    """

    path: Path
    rows: Callable[[BinaryIO, str], Iterator[tuple[int, Callable[[str], Any]]]]
    start: int = 0

    def skip(self, count: int) -> "Lines":
        """Return the rows behind the next `count`."""
        return dataclasses.replace(self, start=self.start + count)

    def __iter__(self) -> Iterator[Callable[[], Any]]:
        with open(self.path, "rb") as file:
            rows = enumerate(self.rows(file, str(self.path)))
            for index, (line, parse) in itertools.islice(rows, self.start, None):
                yield functools.partial(parse, f"Record {index} of '{self.path}', line {line},")


def json_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, Callable[[str], Any]]]:
    """Yield the rows of a JSONL file for `Lines`: blank lines are none."""
    check_utf8(os.pread(file.fileno(), 2, 0), name)
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip(BLANK):
            yield number, functools.partial(parse_row, line)


class FileRows(Sequence):
    """The rows of one file: where each begins and ends, and the line it begins on.

    spans: int64 [N, 3], bytes from start to end, and lines from 1. fingerprint: BLAKE2b of the
    file. name: what errors call the file (a compressed file is read from its plain copy). parse:
    gives the value of a row of bytes, or raises `UserError` that begins with what errors call it.
    Thread-safe: rows are read by `pread`. Pickled by path: other processes open it again.
    """

    def __init__(
        self,
        path: Path,
        spans: Sequence[tuple[int, int, int]] | np.ndarray,
        fingerprint: str,
        name: str,
        parse: Callable[[bytes, str], Any] = parse_row,
    ):
        self.path, self.name, self.fingerprint = str(path.resolve()), name, fingerprint
        self.spans, self.parse = np.asarray(spans, np.int64).reshape(-1, 3), parse
        self._stamp = _stamp(os.stat(self.path))

    def __len__(self) -> int:
        return len(self.spans)

    def line(self, index: int) -> int:
        """Return the line, from 1, on which a row begins."""
        return int(self.spans[index, 2])

    def __getitem__(self, index: Any) -> Any:
        """Return one row; raises `UserError`, naming file and line, where it is not JSON."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start, end, line = self.spans[index].tolist()
        data = os.pread(self._file, end - start, start)
        where = f"Record {index} of '{self.name}', line {line},"
        if len(data) < end - start:
            raise UserError(
                f"{where} is no longer whole: the file became shorter since it was opened. Leave "
                f"data files as they are while they are read, and start again."
            )
        return self.parse(data, where)

    @functools.cached_property
    def _file(self) -> int:
        """The descriptor; two threads may each open one, which does no harm."""
        with explained(
            OSError,
            lambda e: f"The data file '{self.path}' cannot be opened any more: {e.strerror}.",
        ):
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        if _stamp(os.fstat(file)) != self._stamp:
            os.close(file)
            raise UserError(
                f"The data file '{self.path}' was changed after it was indexed. Leave data files "
                f"as they are while they are read, and start again."
            )
        weakref.finalize(self, os.close, file)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_file"}


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def index_lines(path: Path, name: str | None = None) -> FileRows:
    """Return the rows of a JSONL file, one a line, without parsing any: blank lines are none.

    A UTF-8 byte order mark at the start is passed over.
    """
    digest = hashlib.blake2b(digest_size=16)
    spans = [np.zeros((0, 3), np.int64)]
    # The end of the last line so far, and its number. The byte before the file counts as one.
    newline, number, base = -1, 0, 0
    with open(path, "rb") as file, ThreadPoolExecutor(1) as pool:
        head = os.pread(file.fileno(), len(BOM), 0)
        check_utf8(head[:2], name or str(path))
        newline = len(BOM) - 1 if head == BOM else -1
        while chunk := file.read(CHUNK):
            hashed = pool.submit(digest.update, chunk)  # in a thread, while lines are looked for
            found = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + base
            if len(found):
                begin = np.concatenate([[newline], found[:-1]]) + 1
                numbers = np.arange(number + 1, number + 1 + len(found))
                keep = begin < found
                _drop_blank(file, chunk, base, begin, found, keep)
                spans.append(np.stack([begin, found, numbers], axis=1)[keep])
                newline, number = int(found[-1]), number + len(found)
            base += len(chunk)
            hashed.result()
        if newline + 1 < base and os.pread(file.fileno(), base, newline + 1).strip(BLANK):
            spans.append(np.array([[newline + 1, base, number + 1]]))
    return FileRows(path, np.concatenate(spans), digest.hexdigest(), name or str(path))


def check_utf8(mark: bytes, name: str) -> None:
    """Raise `UserError` for a file that begins as UTF-16 text does."""
    if mark in NOT_UTF8:
        raise UserError(
            f"The data file '{name}' is {NOT_UTF8[mark]}, not UTF-8 text: save it as UTF-8."
        )


def _drop_blank(
    file: Any,
    chunk: bytes,
    base: int,
    begin: np.ndarray,
    end: np.ndarray,
    keep: np.ndarray,
) -> None:
    """Clear `keep` for lines of white space: only one that begins with some is looked at."""
    data = np.frombuffer(chunk, np.uint8)
    inside = np.maximum(begin - base, 0)  # the first line may begin in the chunk before
    suspects = np.flatnonzero(keep & (IS_BLANK[data[inside]] | (begin < base)))
    for i in suspects.tolist():
        a, b = begin[i], end[i]
        text = chunk[a - base : b - base] if a >= base else os.pread(file.fileno(), b - a, a)
        keep[i] = bool(text.strip(BLANK))


def index_list(path: Path, name: str | None = None) -> FileRows:
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
        raise UserError(
            f"The data file '{name}' holds a JSON {type(json.loads(text)).__name__}; expected a "
            f"list."
        )
    rows, place, line = [], 0, 1
    for begin, end in spans:
        start = byte + len(text[place:begin].encode(errors="surrogateescape"))
        byte = start + len(text[begin:end].encode(errors="surrogateescape"))
        line += text.count("\n", place, begin)
        rows.append((start, byte, line))
        line += text.count("\n", begin, end)
        place = end
    return FileRows(path, rows, fingerprint, name)


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
    while text[place : place + 1] != "]":
        if spans:
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = skip(place + 1)
        end = decode(text, place)[1]
        spans.append((place, end))
        place = skip(end)
    if skip(place + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, skip(place + 1))
    return spans
