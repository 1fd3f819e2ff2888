"""Digests by which a run knows its files again, wherever they lie."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SAMPLE_BYTES = 1 << 10  # of a tensor, three times
FILE_SAMPLE_BYTES = 1 << 20  # of a file that has no tensors, three times
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit: a longer one is no safetensors file


def base_identity(directory: str | Path) -> dict[str, str]:
    """Return {file: digest} of what makes a base checkpoint this one, wherever it lies.

    config.json counts whole; of a weights file its header and three samples of each tensor, so
    that a base of many gigabytes is told in a moment from one in which a LoRA is merged.
    """
    directory = Path(directory)
    identity = {}
    for path in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        digest = hashlib.sha256()
        # A file system may want buffers of many mebibytes, which each sample would fill.
        with open(path, "rb", buffering=SAMPLE_BYTES) as file:
            digest.update(str(path.stat().st_size).encode())
            for start, length in _samples(file):
                file.seek(start)
                digest.update(file.read(length))
        identity[path.name] = digest.hexdigest()
    return identity


def _samples(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of the bytes that stand for a file, see `base_identity`.

    Files that are called safetensors may be none, such as Git LFS pointers of weights that were
    not fetched: they are sampled as one piece.
    https://huggingface.co/docs/safetensors/index#format
    """
    data = 8 + int.from_bytes(file.read(8), "little")
    try:
        entries = json.loads(file.read(min(data, LONGEST_HEADER) - 8))
        entries.pop("__metadata__", None)
        offsets = sorted(entry["data_offsets"] for entry in entries.values())
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        length, spans = FILE_SAMPLE_BYTES, [(0, os.fstat(file.fileno()).st_size)]
    else:
        length, spans = SAMPLE_BYTES, [(data + start, data + end) for start, end in offsets]
        yield 0, data
    for start, end in spans:
        for at in (start, (start + end) // 2, max(start, end - length)):
            yield at, min(length, end - at)


def file_identity(path: str | Path) -> str:
    """Return the digest of a file's bytes, or "" for what is no file (a directory, a hub id)."""
    path = Path(path)
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
