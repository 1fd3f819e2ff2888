"""Local uncompressed copies of compressed or remote data files."""

import errno
import gzip
import hashlib
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError, explained
from vlm_jax.files.atomic import replacing

CHUNK = 1 << 22
# How an address begins -> the Python package that fsspec needs for it, and our extra with it.
REMOTE = {
    "gs://": ("gcsfs", "gcs"),
    "gcs://": ("gcsfs", "gcs"),
    "s3://": ("s3fs", "s3"),
    "hf://": ("huggingface_hub", None),
}


def is_remote(source: Any) -> bool:
    """Return whether a source is an address that `download` takes."""
    return isinstance(source, str) and source.startswith(tuple(REMOTE))


def cache_directory() -> Path:
    """Return the user's cache directory of this library."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "vlm_jax")


def download(address: str) -> Path:
    """Return the local copy of a remote file, fetched once for each version of it.

    The version is what the file system says of the file (checksum, size and time: its `ukey`).
    Raises `UserError` for a missing package, and for what cannot be read.
    """
    import fsspec

    package, extra = next(needs for start, needs in REMOTE.items() if address.startswith(start))
    try:
        system, path = fsspec.core.url_to_fs(address)
        if not system.isfile(path):
            raise FileNotFoundError("no such file")
        folder = hashlib.blake2b(
            f"{address} {system.ukey(path)}".encode(), digest_size=8
        ).hexdigest()
        target = cache_directory() / "downloads" / folder / Path(path).name
        if not target.is_file():
            with system.open(path, "rb") as file:
                _write(target, iter(lambda: file.read(CHUNK), b""))
        return target
    except ImportError as error:
        line = f'pip install "vlm_jax[{extra}]"' if extra else f"pip install {package}"
        raise UserError(
            f"'{address}' needs the package {package}, which is not installed: {line}"
        ) from error
    except Exception as error:  # every file system has exceptions of its own
        raise UserError(
            f"The data file '{address}' cannot be read: {type(error).__name__}: {error}. Check its "
            f"address and this machine's rights to it."
        ) from error


def decompress(path: Path) -> Path:
    """Return the plain copy of a .gz or .zst file, written once for each content.

    It lies in `.vlm_jax` beside the file, or in the user's cache directory where that cannot be
    written. Raises `UserError` for a damaged file.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    places = [path.parent / ".vlm_jax", cache_directory() / "plain"]
    targets = [place / digest / path.stem for place in places]
    if copied := next(filter(Path.is_file, targets), None):
        return copied
    for place, target in zip(places, targets, strict=True):
        try:
            _write(target, _plain(path))
            return target
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno == errno.EROFS:
                continue
            raise UserError(f"'{path}' cannot be decompressed to '{place}': {error}.") from error
    raise UserError(
        f"'{path}' cannot be decompressed: neither '{places[0]}' nor '{places[1]}' can be written. "
        f"Decompress it yourself, or set XDG_CACHE_HOME to a directory that can be."
    )


def _plain(path: Path) -> Iterator[bytes]:
    import zstandard

    with explained(
        (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError),
        lambda error: f"The data file '{path}' is damaged or cut short: {error}. Copy it again.",
    ):
        yield from COMPRESSED[path.suffix.lower()](path)


def _gunzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        yield from iter(lambda: file.read(CHUNK), b"")


def _unzstd(path: Path) -> Iterator[bytes]:
    import zstandard

    frame = None
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:  # zstandard itself takes a cut frame for the end
        raise EOFError("its last frame has no end")


COMPRESSED: dict[str, Callable[[Path], Iterator[bytes]]] = {".gz": _gunzip, ".zst": _unzstd}


def _write(target: Path, chunks: Iterator[bytes]) -> None:
    """Write a file that is there whole or not at all, whoever else writes it too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".part-{secrets.token_hex(8)}")
    with replacing(target, part), open(part, "wb") as file:
        file.writelines(chunks)
