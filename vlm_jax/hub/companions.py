"""Companion files of an export: copied from the base and from a loaded adapter."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.files.atomic import write_json
from vlm_jax.files.limits import read_json

IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
TEMPLATE = ("chat_template*", "additional_chat_templates")  # the latter a directory
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken"),
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
COPIED = ("*.json", "*.jinja", "*.txt", *TOKENIZER, *TEMPLATE)
# What is written again, or belongs to how the weights came to be.
OTHERS = {
    *("config.json", "adapter_config.json", "trainer_state.json", "quantize_config.json"),
    *("quant_config.json",),
}
# Settings -> their key in processor_config.json, which readers look into first.
NESTED = {IMAGES: "image_processor", VIDEOS: "video_processor"}


def companions(base: Path, adapter: Path | None) -> list[Path]:
    """Return the tokenizer, processor and generation files of a checkpoint.

    Of an adapter's directory its tokenizer and its chat template stand in their place.
    """
    found = _found(base)
    if adapter is None:
        return found
    for kind in (TOKENIZER, TEMPLATE):
        theirs = spoken(adapter, kind)
        if theirs or (
            kind is TEMPLATE and _key(adapter / "tokenizer_config.json", "chat_template")
        ):
            found = [path for path in found if path not in _of(kind, found)] + theirs
    return found


def spoken(adapter: Path, *kinds: Sequence[str]) -> list[Path]:
    """Return the files of an adapter's tokenizer (if it is whole) and chat template."""
    found = _found(adapter)
    has_tokenizer = any(path.name in VOCABULARIES for path in found)
    return [
        path
        for kind in kinds or (TOKENIZER, TEMPLATE)
        for path in _of(kind, found)
        if has_tokenizer or kind is TEMPLATE
    ]


def copy_all(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)


def adapter_settings(adapter: Path, name: str) -> dict[str, Any] | None:
    """Return the settings of images or videos that an adapter's directory holds, or None."""
    nested = _key(adapter / "processor_config.json", NESTED[name])
    return nested or (read_json(adapter / name) if (adapter / name).is_file() else None)


def _key(file: Path, key: str) -> Any:
    """Return a value of a JSON file; None where there is no such file or key."""
    return read_json(file).get(key) if file.is_file() else None


def write_settings(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Write settings wherever the base's files hold any: readers differ in which is first."""
    file, combined = folder / name, folder / "processor_config.json"
    nested = read_json(combined) if combined.exists() else {}
    key = NESTED[name]
    if key in nested:
        write_json(combined, {**nested, key: {**nested[key], **settings}})
    if file.exists() or key not in nested:
        write_json(file, {**(read_json(file) if file.exists() else {}), **settings})


def _found(directory: Path) -> list[Path]:
    found = {path for pattern in COPIED for path in directory.glob(pattern)}
    return sorted(p for p in found if p.name not in OTHERS and not p.name.endswith(".index.json"))


def _of(kind: Sequence[str], paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if any(map(path.match, kind))]
