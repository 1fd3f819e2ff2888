"""A directory of images with captions: a metadata file beside them, or a text file each."""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data.jsonl import JsonRows, index_lines
from vlm_jax.errors import UserError
from vlm_jax.magic import refuse_lost

PROMPT = "Describe this image."
METADATA = ("metadata.jsonl", "metadata.csv")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
CAPTIONS = ("text", "caption")


def read_captions(folder: Path, prompt: str) -> Sequence[Any] | None:
    """Return the rows of a directory of captioned images, or None where it is none."""
    found = [name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"The directory '{folder}' has both {' and '.join(found)}: keep one.")
    if found:
        path = folder / found[0]
        refuse_lost(path, f"The data file '{path}'")
        rows: Any = index_lines(path) if path.suffix == ".jsonl" else CsvRows(path)
        return Metadata(rows, prompt)
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if any(path.with_suffix(".txt").is_file() for path in pictures):
        return Pairs(folder, [str(path.relative_to(folder)) for path in pictures], prompt)
    return None


EXTRA = "fields beyond the header's"


class CsvRows(Sequence):
    """The rows of a CSV file with a header, held in memory."""

    def __init__(self, path: Path):
        self.name = str(path)
        try:
            data = path.read_bytes()
            text = io.StringIO(data.decode("utf-8-sig"), newline="")
            reader = csv.DictReader(text, restkey=EXTRA, strict=True)
            self.rows, self.lines, before = [], [], 1
            for row in reader:
                self.rows.append(row)
                self.lines.append(before + 1)
                before = reader.line_num
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"The data file '{path}' is not UTF-8 CSV: {error}.") from error
        self.fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        if EXTRA in row or None in row.values():
            raise UserError(
                f"Record {index} of '{self.name}', line {self.line(index)}, has "
                f"{'more' if EXTRA in row else 'fewer'} fields than the header: put a text that "
                f"holds a comma in quotes."
            )
        return row

    def line(self, index: int) -> int:
        """Return the line, from 1, on which a row begins."""
        return self.lines[index]


class Metadata(Sequence):
    """Rows of a metadata file (`file_name`, `text` or `caption`), as question and answer.

    A row that has turns of its own (`messages`, `question`, ...) keeps them and gets the image.
    """

    def __init__(self, rows: JsonRows | CsvRows, prompt: str):
        self.rows, self.prompt, self.line = rows, prompt, rows.line
        self.fingerprint = f"{rows.fingerprint} {prompt}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        where = f"Record {index} of '{self.rows.name}', line {self.line(index)},"
        name = row.get("file_name") if isinstance(row, Mapping) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{where} has no 'file_name', which says which image it is about.")
        rest = {key: value for key, value in row.items() if key != "file_name"}
        given = [key for key in CAPTIONS if isinstance(row.get(key), str)]
        if len(given) != 1:
            if not given:
                return {**rest, "image": row["file_name"]}  # a format of its own, or none: refused
            raise UserError(f"{where} has both {' and '.join(given)}: keep one.")
        answer = rest.pop(given[0])
        return {**rest, "image": row["file_name"], "question": self.prompt, "answer": answer}


class Pairs(Sequence):
    """Images that have their caption in a text file of the same name: `a.jpg`, `a.txt`."""

    def __init__(self, folder: Path, names: Sequence[str], prompt: str):
        self.folder, self.names, self.prompt = folder, list(names), prompt

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        path = (self.folder / self.names[index]).with_suffix(".txt")
        try:
            answer = path.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            raise UserError(
                f"The image '{self.folder / self.names[index]}' has no caption: expected the text "
                f"file '{path.name}' beside it. Write it, or move the image elsewhere."
            ) from None
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"The caption '{path}' cannot be read as UTF-8: {error}.") from error
        name = self.names[index]
        return {"id": name, "image": name, "question": self.prompt, "answer": answer}
