"""Sources of records: files, data sets, rows in memory, and lists of them."""

import contextlib
import copy
import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data.cache import COMPRESSED, decompress, download, is_remote
from vlm_jax.data.records.captions import PROMPT, captioned, read_captions
from vlm_jax.data.records.formats import check_columns
from vlm_jax.data.records.jsonl import index_lines, index_list
from vlm_jax.data.records.mixture import Mixture, Part, Records
from vlm_jax.data.records.tables import index_table
from vlm_jax.errors import UserError, explained, first_line, nearest, refuse
from vlm_jax.files.file_types import refuse_lost

# The keys of one source of a list.
SOURCE = (
    *("path", "split", "image_folder", "columns", "caption_prompt"),
    *("weight", "epochs", "name"),
)


def read_records(
    source: Any,
    image_folder: str | Path | None = None,
    split: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    caption_prompt: str | None = None,
) -> Records | Mixture:
    """Return the records of a file, a data set, rows in memory, or a list of such sources.

    source: a .json file (a list), a .jsonl, .csv or .tsv file (indexed, not loaded), any of them as
    .gz or .zst, a .parquet or .arrow file, a gs://, s3:// or hf:// address of one, a directory that
    `datasets.save_to_disk` wrote or that holds captioned images, a data set's id on the Hugging
    Face hub, a `datasets.Dataset`, or a sequence of dicts. Or a list of sources: each one of
    these, or {"path": source} with `split`, `image_folder`, `columns`, `caption_prompt`, `name`
    and either `weight` or `epochs`; see `Mixture`.
    image_folder: where relative image paths start, by default the data file's folder. split: of a
    data set that has several, by default "train". columns: {our name: the data's}.
    caption_prompt: what the user says where images have captions only.
    Raises `UserError` for a missing file, a file of another kind, or an empty source. A row that
    is not JSON raises when it is asked for, and hinders no other.
    """
    if isinstance(source, Records | Mixture):
        return source
    if is_list_of_sources(source):
        return _mixture(
            source,
            {
                "image_folder": image_folder,
                "split": split,
                "columns": columns,
                "caption_prompt": caption_prompt,
            },
        )
    if (
        image_folder
        and not is_remote(image_folder)
        and not Path(image_folder).expanduser().is_dir()
    ):
        raise UserError(f"The image folder '{image_folder}' does not exist or is not a directory.")
    check_columns(columns or {})
    prompt, taken = caption_prompt or PROMPT, (columns or {}).values()
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    folder = None
    if is_remote(source):
        folder = source.rpartition("/")[0]
        rows = _from_file(download(source), source, split, prompt, taken)
    elif path is None:
        rows = pick_split(source, name, split)
    elif path.is_file():
        folder, rows = str(path.parent), _from_file(path, str(path), split, prompt, taken)
    elif path.is_dir():
        folder, rows = str(path), _from_disk(path, split, prompt, taken)
    else:
        rows = _from_hub(name, split)
    refuse(
        (
            type(rows).__name__ in ("IterableDataset", "IterableDatasetDict"),
            f"The data '{name}' is a stream, which has no length and cannot be read by index: set "
            f"data.streaming, or load it without streaming=True.",
        ),
        (
            not isinstance(rows, Iterable),
            f"Records are a path, a data set or a sequence of dicts, not {name}.",
        ),
    )
    rows = rows if hasattr(rows, "__getitem__") else list(rows)
    rows = encoded_images(rows)
    if len(rows) == 0:
        raise UserError(f"The data '{name}' holds no records.")
    return Records(
        rows,
        name,
        str(image_folder) if image_folder else folder,
        columns,
        fingerprint=getattr(rows, "fingerprint", None) or getattr(rows, "_fingerprint", None),
    )


# Lists


def is_list_of_sources(source: Any) -> bool:
    """Return whether this is a list of sources and not of rows: paths, or dicts with a path."""
    return isinstance(source, list | tuple) and any(
        isinstance(one, str | Path)
        or (isinstance(one, Mapping) and "path" in one and not {"id", "messages"} & one.keys())
        for one in source
    )


def _mixture(sources: Sequence[Any], options: dict[str, Any]) -> Records | Mixture:
    parts: list[Part] = []
    for number, one in enumerate(sources):
        given = dict(one) if isinstance(one, Mapping) else {"path": one}
        where = f"Source {number} of the list"
        for key in given:
            if key not in SOURCE:
                raise UserError(
                    f"{where} has the key '{key}'{nearest(key, SOURCE)}, which is not read; "
                    f"expected {', '.join(SOURCE)}."
                )
        path = given.pop("path", None)
        if path is None:
            raise UserError(f"{where} has no 'path': the file, directory or data set to read.")
        shares = {key: _number(given.pop(key, None), key, where) for key in ("weight", "epochs")}
        name = given.pop("name", None)
        records = read_records(path, **{**options, **given})
        assert isinstance(records, Records)  # of one path
        if name is None:
            name = str(path).rstrip("/").rpartition("/")[2].partition(".")[0]
            taken = sum(part.name.partition("#")[0] == name for part in parts)
            name += f"#{taken + 1}" if taken else ""
        parts.append(Part(str(name), records, **shares))
    is_path = len(parts) == 1 and not isinstance(sources[0], Mapping)
    return parts[0].records if is_path else Mixture(parts)


def _number(value: Any, key: str, where: str) -> float | None:
    with explained(
        (TypeError, ValueError),
        lambda _: f"{where} has the {key} {value!r}; expected a number.",
    ):
        return None if value is None or isinstance(value, bool) else float(value)


# Files


def _from_file(
    path: Path, name: str, split: str | None, prompt: str, taken: Collection[str]
) -> Any:
    """Return the rows of a data file; name: what errors call it."""
    packed = path.suffix.lower() in COMPRESSED
    wanted = (Path(path.stem) if packed else path).suffix.lower()
    # What is a table of columns is compressed inside.
    refuse(
        (
            wanted not in READERS or (packed and READERS[wanted] is _read_table),
            f"The data file '{name}' has the suffix '{path.suffix.lower()}'; expected one of "
            f"{', '.join(READERS)}, or of a text file with {' or '.join(COMPRESSED)} behind it.",
        ),
        (split, f"The data file '{name}' has no splits, so there is no '{split}' in it."),
    )
    refuse_lost(path, f"The data file '{name}'")
    rows = READERS[wanted](decompress(path) if packed else path, name)
    return captioned(rows, prompt, taken) if READERS[wanted] is index_table else rows


def _read_table(path: Path, name: str) -> Any:
    """Return a parquet or arrow file as a data set in memory maps."""
    import pyarrow.parquet
    from datasets import Dataset

    kind = path.suffix.lower().removeprefix(".")
    with reporting(f"The data file '{name}' is not readable {kind}"):
        if kind == "parquet":
            pyarrow.parquet.read_schema(path)  # or datasets would log its own error first
            rows = Dataset.from_parquet(str(path))
        else:
            rows = Dataset.from_file(str(path))
    with open(path, "rb") as file:
        rows.fingerprint = hashlib.file_digest(
            file, lambda: hashlib.blake2b(digest_size=16)
        ).hexdigest()
    return rows


def reporting(problem: str, remedy: str = "") -> contextlib.AbstractContextManager[None]:
    """Raise `UserError` with the problem, the first line of what is raised inside, the remedy."""
    return explained(
        Exception,  # network, gating, builders and casts raise many unrelated types
        lambda error: f"{problem}: {first_line(error)}{remedy}",
    )


READERS: dict[str, Callable[[Path, str], Any]] = {
    ".json": index_list,
    ".jsonl": index_lines,
    ".ndjson": index_lines,
    ".csv": index_table,
    ".tsv": index_table,
    ".parquet": _read_table,
    ".arrow": _read_table,
}


# Data sets


def _from_disk(path: Path, split: str | None, prompt: str, taken: Collection[str]) -> Any:
    import datasets

    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return pick_split(datasets.load_from_disk(str(path)), str(path), split)
    tables = sorted(path.rglob("*.parquet"))
    captions = None if tables else read_captions(path, prompt, taken)
    if captions is not None:
        if split:
            raise UserError(
                f"The directory '{path}' of captioned images has no splits, so there is no "
                f"'{split}' in it: give the directory of one split."
            )
        return captions
    for table in tables:
        refuse_lost(table, f"The data file '{table}'")
    if not tables:
        raise UserError(
            f"The directory '{path}' is not a data set: expected what datasets.save_to_disk writes "
            f"(state.json or dataset_dict.json), *.parquet files, or images with captions "
            f"(metadata.jsonl, metadata.csv, one other .csv or .tsv, or a .txt file beside each). "
            f"Give a .json or .jsonl file by its own path."
        )
    return pick_split(datasets.load_dataset(str(path)), str(path), split)


def _from_hub(name: str, split: str | None) -> Any:
    if (
        Path(name).suffix.lower() in READERS
        or name.startswith((".", "/", "~"))
        or name.count("/") != 1
    ):
        raise UserError(
            f"There is no data file or directory '{name}'. Paths start at the working directory, "
            f"'{Path.cwd()}'."
        )
    import datasets

    with reporting(
        f"'{name}' is not a local file, and the Hugging Face hub did not give a data set of that "
        f"name"
    ):
        data = datasets.load_dataset(name)
    return pick_split(data, name, split)


def pick_split(data: Any, name: str, split: str | None) -> Any:
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


def encoded_images(rows: Any) -> Any:
    """Return a data set whose pictures and films, however deep, are bytes or paths, not decoded.

    A planner must not decode; and `datasets` would let Pillow open them as whatever they say they
    are, see `limits.IMAGE_FORMATS`. Nothing is copied.
    """
    features = getattr(rows, "features", None)
    if not features:
        return rows
    if hasattr(rows, "decode"):  # a stream
        return rows.decode(False)
    given = copy.deepcopy(rows)  # of the description: the table is shared
    given.info.features = _encoded(features)
    return given


def _encoded(feature: Any) -> Any:
    """Return a feature of `datasets`, or a tree of them, that gives what is stored."""
    if isinstance(feature, Mapping):
        made: Any = type(feature)  # Features, or a dict within them
        return made({name: _encoded(one) for name, one in feature.items()})
    if isinstance(feature, list | tuple):
        return [_encoded(one) for one in feature]
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_encoded(feature.feature))
    return dataclasses.replace(feature, decode=False) if hasattr(feature, "decode") else feature
