"""A directory of images with captions: a metadata file beside them, or a text file each."""

import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data.records.formats import FORMATS, has_all
from vlm_jax.data.records.jsonl import FileRows, index_lines
from vlm_jax.data.records.tables import CAPTION, IMAGE, index_table
from vlm_jax.errors import UserError, refuse
from vlm_jax.files.file_types import refuse_lost

PROMPT = "Describe this image."
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
# What the user says where a row has that and a caption, which is then the answer.
ASKED = ("question", "query", "prompt", "instruction")


def read_captions(folder: Path, prompt: str, taken: Collection[str] = ()) -> Sequence[Any] | None:
    """Return the rows of a directory of captioned images, or None where it is none.

    A metadata file comes first, then text files of the images' names, then the one CSV there.
    taken: columns that `data.columns` names.
    """
    found = [name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"The directory '{folder}' has both {' and '.join(found)}: keep one.")
    if found:
        path = folder / found[0]
        refuse_lost(path, f"The data file '{path}'")
        rows = index_lines(path) if path.suffix == ".jsonl" else index_table(path)
        return captioned(rows, prompt, taken)
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if any(path.with_suffix(".txt").is_file() for path in pictures):
        return Pairs(folder, [str(path.relative_to(folder)) for path in pictures], prompt)
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv"))
    if len(tables) > 1:
        raise UserError(
            f"The directory '{folder}' has {len(tables)} tables "
            f"({', '.join(path.name for path in tables[:3])}): give one of them by its own path."
        )
    return captioned(index_table(tables[0]), prompt, taken) if tables else None


def captioned(rows: FileRows, prompt: str, taken: Collection[str] = ()) -> FileRows:
    """Return rows of a table of images (`image`, `file_name` or `path`) as question and answer.

    A row that has turns of its own (`messages`, `question` and `answer`, ...) keeps them. Else its
    `text` or `caption` is the answer, to a `question`, `query`, `prompt` or `instruction` of its
    own or to `prompt`. taken: columns that `data.columns` names; they are left as they are.
    """
    made = copy.copy(rows)
    made.parse = functools.partial(
        as_turns, parse=rows.parse, prompt=prompt, taken=frozenset(taken)
    )
    made.fingerprint = f"{rows.fingerprint} {prompt}"
    return made


def as_turns(
    data: bytes,
    where: str,
    *,
    parse: Callable[[bytes, str], Any],
    prompt: str,
    taken: Collection[str],
) -> dict[str, Any]:
    """Return a row of `captioned` with its image and its turns under names that are read."""
    row = parse(data, where)
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is {type(row).__name__}, not a JSON object.")
    rest = dict(row)

    def take(names: Sequence[str]) -> Any:
        """Return and take out what stands under one of the names."""
        given = [name for name in names if name not in taken and rest.get(name) is not None]
        if len(given) > 1:
            raise UserError(
                f"{where} has both {' and '.join(given)}: keep one, or name it in data.columns."
            )
        return rest.pop(given[0]) if given else None

    image = take(IMAGE) or None
    made = {} if image is None else {"image": image}
    if any(has_all(rest, form.needed) for form in FORMATS.values()):
        return {**rest, **made}
    # A table has the columns of its format in each row.
    formats = [form.needed for form in FORMATS.values() if rest.keys() >= set(form.needed)]
    empty = next(
        (n for names in (CAPTION, *formats) for n in names if n in rest and rest[n] is None), None
    )
    answer = take(CAPTION)
    refuse(
        (
            answer is None and empty,
            f"{where} has an empty '{empty}'. Fill it, or remove the row.",
        ),
        (
            answer is not None and image is None and "images" not in rest,
            f"{where} has no 'file_name', which says which image it is about.",
        ),
    )
    if answer is None:
        return {**rest, **made}  # no format that is known, which says so itself
    asked = take(ASKED)
    return {**rest, **made, "question": prompt if asked is None else asked, "answer": answer}


class Pairs(Sequence):
    """Images that have their caption in a text file of the same name: `a.jpg`, `a.txt`."""

    def __init__(self, folder: Path, names: Sequence[str], prompt: str):
        self.folder, self.names, self.prompt = folder, list(names), prompt

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        name = self.names[index]
        path = (self.folder / name).with_suffix(".txt")
        try:
            answer = path.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            raise UserError(
                f"The image '{self.folder / name}' has no caption: expected the text "
                f"file '{path.name}' beside it. Write it, or move the image elsewhere."
            ) from None
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"The caption '{path}' cannot be read as UTF-8: {error}.") from error
        return {"id": name, "image": name, "question": self.prompt, "answer": answer}
