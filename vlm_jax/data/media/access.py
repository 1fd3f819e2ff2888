"""Access control of images and videos: the media root, other files and URLs if allowed."""

import dataclasses
import os
import re
import urllib.request
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError, explained
from vlm_jax.files.limits import FETCH_BYTES, FETCH_SECONDS, MAX_IMAGE_PIXELS


@dataclasses.dataclass(frozen=True)
class Access:
    """What reading may do; the defaults are what is safe with a data file from elsewhere.

    allow_absolute_paths: read files outside the media root. allow_urls: fetch http(s) addresses.
    max_pixels: the most pixels of an image or a frame, by its header.
    """

    allow_absolute_paths: bool = False
    allow_urls: bool = False
    max_pixels: int = MAX_IMAGE_PIXELS


SAFE = Access()


def find(
    source: str | Path | bytes | bytearray, folder: str | Path | None, access: Access
) -> tuple[Path | bytes, str] | None:
    """Return (file, what errors call it) of a path, or (bytes, ...) of an address or bytes.

    None: there is no such file. folder: the media root, where relative paths start and which no
    path may leave (by `..`, as an absolute path, or over a symbolic link). None, as for rows made
    in memory: any path goes.
    Raises `UserError` for what `access` does not allow.
    """
    if isinstance(source, bytes | bytearray):
        return bytes(source), f"its content ({len(source)} bytes)"
    text = str(source)
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE)
    if scheme and scheme[1].lower() in ("http", "https"):
        return _fetch(text, access), "what it gave"
    if scheme and scheme[1].lower() != "file":
        raise UserError(
            f"'{text}' is an address of a kind that images are not read from: download it, and "
            f"give the file's path."
        )
    path = located(text, folder)
    if not os.path.isfile(path):  # False of a long base64 string and of a null byte, too
        return None
    if folder is not None and not access.allow_absolute_paths:
        # By os.path: pathlib takes several times as long, twice for every image.
        root, real = os.path.realpath(Path(folder).expanduser()), os.path.realpath(path)
        if os.path.commonpath((root, real)) != root:
            raise UserError(
                f"'{path}' lies outside the media root '{root}' (links followed), and files "
                f"outside are not read unless data.allow_absolute_paths is true. Set it if you "
                f"trust the data file, or set data.image_folder to a directory that holds all its "
                f"images and videos."
            )
    return path, "the file"


def located(text: str, folder: str | Path | None) -> Path:
    """Return where a path of a record points: from the media root, or the home of "~/"."""
    own = Path(text.removeprefix("file://"))
    return Path(folder or "").expanduser() / (own.expanduser() if text.startswith("~/") else own)


def quoted(source: Any) -> str:
    """Return " 'PATH'" where a source is a path that errors can show, else ""."""
    return f" '{source}'" if isinstance(source, str | Path) and len(str(source)) < 300 else ""


def _fetch(address: str, access: Access) -> bytes:
    if not access.allow_urls:
        raise UserError(
            f"'{address}' is an address, which is not fetched unless data.allow_urls is true. Set "
            f"it, or download the file and give its path, which is faster and the same every epoch."
        )
    failed = explained(
        (OSError, ValueError),  # URLError and timeouts are OSErrors
        lambda error: f"'{address}' could not be fetched: {error}.",
    )
    with failed, urllib.request.urlopen(address, timeout=FETCH_SECONDS) as response:
        data = response.read(FETCH_BYTES + 1)
    if len(data) > FETCH_BYTES:
        raise UserError(
            f"'{address}' has more than {FETCH_BYTES} bytes, the most that is fetched. Download it "
            f"and give its path."
        )
    return data


def check_pixels(width: int, height: int, access: Access) -> None:
    """Raise `UserError` for a picture of more pixels than allowed, before any is decoded."""
    if width * height > access.max_pixels:
        raise UserError(
            f"it has {width} x {height} = {width * height} pixels, more than "
            f"data.max_image_pixels = {access.max_pixels}. It is not decoded: shrink the file, or "
            f"raise the limit."
        )
