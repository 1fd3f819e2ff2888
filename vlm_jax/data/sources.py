"""Where records come from: files, data sets, rows in memory."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data.records import canonical
from vlm_jax.errors import UserError, nearest


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
        raise UserError(f"The image folder '{image_folder}' does not exist or is no directory.")
    if isinstance(source, Records):
        return source
    if path is not None and path.is_file():
        suffix = path.suffix.lower()
        if suffix not in READERS:
            raise UserError(
                f"The data file '{path}' has the suffix '{suffix}'; expected one of "
                f"{', '.join(READERS)}."
            )
        if split:
            raise UserError(
                f"The data file '{path}' has no splits, so there is no '{split}' in it."
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
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5,000 digits
        raise UserError(f"The data file '{path}' cannot be read: {error}.") from error
    if not isinstance(rows, list):
        raise UserError(
            f"The data file '{path}' holds a JSON {type(rows).__name__}; expected a list."
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
        except (RecursionError, ValueError) as error:
            raise UserError(
                f"The data file '{path}', line {number}, cannot be read: {error}."
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
    import pyarrow.parquet
    from datasets import Dataset

    try:
        pyarrow.parquet.read_schema(path)  # or datasets would log its own error first
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
