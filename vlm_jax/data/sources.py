"""Where records come from, and the one form they all take.

A canonical record is
    {"id": str, "index": int, "folder": str | None,
     "messages": [{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}],
     "images": [path, bytes, PIL image, ...: one for each image part, in order]}
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError, nearest

Record = dict[str, Any]
MARKER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
}


class Records(Sequence):
    """Raw rows that become canonical when they are asked for.

    name: the file or data set, for errors. folder: where relative image paths start.
    """

    def __init__(self, rows: Any, name: str, folder: str | None):
        self.rows, self.name, self.folder = rows, name, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        return canonical(self.rows[index], index, self.folder, self.name)


def read_records(
    source: Any, image_folder: str | Path | None = None, split: str | None = None
) -> Records:
    """Return the records of a file, a data set, or rows in memory.

    source: a .json file (a list), a .jsonl file, a .parquet file, a directory that
    `datasets.save_to_disk` wrote, a data set's id on the Hugging Face hub, a `datasets.Dataset`,
    or a sequence of dicts. image_folder: where relative image paths start, by default the data
    file's folder. split: of a data set that has several, by default "train".
    Raises `UserError` for a missing file, bad JSON (with its line) or an empty source.
    """
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    folder = str(image_folder) if image_folder else None
    if image_folder and not Path(image_folder).expanduser().is_dir():
        raise UserError(f"The image folder '{image_folder}' does not exist.")
    if isinstance(source, Records):
        return source
    if path is not None and path.is_file():
        suffix = path.suffix.lower()
        if suffix not in READERS:
            raise UserError(
                f"The data file '{path}' has the suffix '{suffix}'; expected one of "
                f"{', '.join(READERS)}."
            )
        rows = READERS[suffix](path)
        folder = folder or str(path.parent)
    elif path is not None and path.is_dir():
        rows, folder = _from_disk(path, split), folder or str(path)
    elif path is not None:
        rows = _from_hub(str(source), split)
    elif isinstance(source, Mapping):
        rows = _pick_split(source, name, split)
    elif isinstance(source, Iterable):
        rows = source if hasattr(source, "__getitem__") else list(source)
    else:
        raise UserError(f"Records are a path, a data set or a sequence of dicts, not {name}.")
    rows = _encoded_images(rows)
    if len(rows) == 0:
        raise UserError(f"The data '{name}' holds no records.")
    return Records(rows, name, folder)


# Files


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        hint = " One object a line makes a .jsonl file: rename it." if "Extra" in error.msg else ""
        raise UserError(
            f"The data file '{path}' is not valid JSON: line {error.lineno}, column "
            f"{error.colno}: {error.msg}.{hint}"
        ) from error
    if not isinstance(rows, list):
        raise UserError(
            f"The data file '{path}' holds a JSON {type(rows).__name__}; expected a list of records."
        )
    return rows


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"The data file '{path}' is not valid JSONL: line {number}, column {error.colno}: "
                f"{error.msg}. Each line must be one whole JSON object."
            ) from error
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The data file '{path}' is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from error


def _read_parquet(path: Path) -> Any:
    from datasets import Dataset

    try:
        return Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow and datasets have no common ancestor of theirs
        raise UserError(f"The data file '{path}' is not readable parquet: {error}") from error


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


# Data sets


def _from_disk(path: Path, split: str | None) -> Any:
    import datasets

    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _pick_split(datasets.load_from_disk(str(path)), str(path), split)
    if not any(path.rglob("*.parquet")):
        raise UserError(
            f"The directory '{path}' is no data set: expected what datasets.save_to_disk writes "
            f"(state.json or dataset_dict.json) or *.parquet files. Give a .json or .jsonl file "
            f"by its own path."
        )
    return _pick_split(datasets.load_dataset(str(path)), str(path), split)


def _from_hub(name: str, split: str | None) -> Any:
    looks_local = name.startswith((".", "/", "~")) or Path(name).suffix.lower() in READERS
    if looks_local or name.count("/") != 1:
        raise UserError(
            f"There is no data file or directory '{name}'. Paths start at the working directory, "
            f"'{Path.cwd()}'."
        )
    import datasets

    try:
        return _pick_split(datasets.load_dataset(name), name, split)
    except UserError:
        raise
    except Exception as error:  # network, gating and builders raise many unrelated types
        raise UserError(
            f"'{name}' is no local file, and the Hugging Face hub did not give a data set of that "
            f"name: {(str(error).splitlines() or [''])[0]}"
        ) from error


def _pick_split(data: Any, name: str, split: str | None) -> Any:
    """Return one split of a `DatasetDict`; anything else as it is."""
    if not isinstance(data, Mapping):
        return data
    wanted = split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
    if wanted not in data:
        raise UserError(
            f"The data set '{name}' has no split '{wanted}'{nearest(wanted, data)}; it has "
            f"{', '.join(data)}."
        )
    return data[wanted]


def _encoded_images(rows: Any) -> Any:
    """Return a data set whose image columns give bytes or paths: a planner must not decode."""
    features = getattr(rows, "features", None)
    if not features:
        return rows
    from datasets import Image, Sequence

    for column, feature in features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            kind = type(feature) if not isinstance(feature, Sequence) else Sequence
            rows = rows.cast_column(column, kind(Image(decode=False)))
    return rows


# One record


def canonical(
    row: Any, index: int = 0, folder: str | None = None, name: str = "the record"
) -> Record:
    """Return the canonical record of a raw row, or the row itself where it already is one.

    A row has `conversations` (LLaVA, ShareGPT: from/value) or `messages` (role/content) and, for
    pictures, `image` or `images`: one or a list. In `conversations`, and in `messages` whose
    content is a plain string, "<image>" outside the assistant's turns is an image's place and the
    white space around it is dropped; images that no marker or part names come first in the first
    user turn. Content given as parts is taken as it is, and "<image>" in its texts is text.
    Raises `UserError` naming the record.
    """
    if isinstance(row, Mapping) and {"messages", "images", "index", "folder"} <= row.keys():
        return dict(row)
    where = f"Record {index} of '{name}'"
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is {type(row).__name__}, not a JSON object.")
    if row.get("id") is not None:
        where += f" (id {row['id']!r})"
    for key, turns_of in FORMATS.items():
        if row.get(key) is not None:
            turns = turns_of(row[key], where)
            break
    else:
        raise UserError(
            f"{where} has the keys {sorted(map(str, row))}; expected one of {', '.join(FORMATS)}, "
            f"as in LLaVA's JSON or in chat messages."
        )
    given = [row[key] for key in ("images", "image") if row.get(key) is not None]
    if row.get("videos") or row.get("video"):
        raise UserError(f"{where} has a video; only images can be trained on for now.")
    images = list(given[0]) if given and isinstance(given[0], list | tuple) else given[:1]
    messages, images = _place_images(turns, images, where)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where} has no assistant turn: there is nothing to learn from it.")
    record_id = row.get("id")
    return {
        "id": str(index if record_id is None else record_id),
        "index": index,
        "folder": folder,
        "messages": messages,
        "images": images,
    }


def _turns(value: Any, where: str, role_key: str, text_key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where} holds no list of turns: {value!r:.80}.")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping) or role_key not in turn or turn.get(text_key) is None:
            raise UserError(
                f"{where}: turn {number} is {turn!r:.80}; expected an object with '{role_key}' and "
                f"'{text_key}'."
            )
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise UserError(
                f"{where}: turn {number} has the role {turn[role_key]!r}"
                f"{nearest(turn[role_key], ROLES)}; expected one of {', '.join(ROLES)}."
            )
        turns.append({"role": role, "content": turn[text_key]})
    return turns


# A row's key -> how its turns are read.
FORMATS: dict[str, Callable[[Any, str], list[dict[str, Any]]]] = {
    "messages": functools.partial(_turns, role_key="role", text_key="content"),
    "conversations": functools.partial(_turns, role_key="from", text_key="value"),
}


def _place_images(
    turns: list[dict[str, Any]], images: list[Any], where: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return messages whose content is parts, and the image of each image part."""
    messages: list[dict[str, Any]] = []
    named: list[Any] = []  # a part's own image, or None where it takes the next of the record's
    marked = bool(images)
    for turn in turns:
        content = turn["content"]
        if isinstance(content, str):
            split = marked and turn["role"] != "assistant"
            parts = _split_markers(content) if split else [{"type": "text", "text": content}]
        elif isinstance(content, list | tuple):
            parts = list(content)
        else:
            raise UserError(
                f"{where} has content that is neither text nor a list: {content!r:.80}."
            )
        clean = []
        for part in parts:
            kind, value = _part(part, where)
            if kind == "image":
                named.append(value)
                clean.append({"type": "image"})
            else:
                clean.append({"type": "text", "text": value})
        messages.append({"role": turn["role"], "content": clean})
    wanted = sum(value is None for value in named)
    if wanted == 0 and images:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise UserError(f"{where} has images but no user turn to show them in.")
        if named:
            raise UserError(
                f"{where} has {len(images)} images beside its messages, but every image part "
                f"brings its own. Leave one of the two out."
            )
        first["content"][:0] = [{"type": "image"} for _ in images]
        return messages, images
    if wanted != len(images):
        raise UserError(
            f"{where} has {len(images)} images, but its turns name {wanted} (by '{MARKER}' or image "
            f"parts). There must be one for each."
        )
    rest = iter(images)
    return messages, [next(rest) if value is None else value for value in named]


def _split_markers(text: str) -> list[dict[str, str]]:
    """Return text and image parts; the line break LLaVA writes beside a marker is no content."""
    pieces = text.split(MARKER)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _part(part: Any, where: str) -> tuple[str, Any]:
    """Return ("text", the text) or ("image", its own source or None)."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    if kind in ("image", "image_url"):
        keys = ("image", "image_url", "url", "path", "base64", "bytes")
        value = next((part[key] for key in keys if part.get(key) is not None), None)
        return "image", value.get("url") if isinstance(value, Mapping) and "url" in value else value
    raise UserError(
        f"{where} has the content part {part!r:.80}; expected "
        f"{{'type': 'text', 'text': …}} or {{'type': 'image'}}."
    )
