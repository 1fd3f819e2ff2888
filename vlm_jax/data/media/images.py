"""Reads an image from any source in a record: size from the header alone, or RGB pixels."""

import base64
import contextlib
import functools
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vlm_jax.data.media.access import SAFE, Access, check_pixels, find, located
from vlm_jax.errors import UserError, explained, first_line, refuse
from vlm_jax.files.file_types import HEIC, head_of, kind_of, sentence
from vlm_jax.files.limits import IMAGE_FORMATS


@contextlib.contextmanager
def open_image(
    source: Any, folder: str | Path | None = None, access: Access = SAFE
) -> Iterator[Image.Image]:
    """Give the image with only its header read, of an animation its first frame; close its file.

    source: a path (relative ones against `folder`), bytes, a `data:` URI or bare base64, a PIL
    image, a uint8 array [H, W] or [H, W, C], or a dict with `bytes` or `path` as `datasets` has.
    access: what may be read, see `find`. Raises `UserError` that says what the source is, also
    where it turns out to be damaged inside; the caller adds whose image it is.
    """
    image = _open_any(source, folder, access)
    # Leaving Pillow's own context keeps the pixels, where `close` destroys them.
    with contextlib.nullcontext() if image is source else image:
        check_pixels(*image.size, access)
        with explained(
            DAMAGED,
            lambda error: (
                f"it is damaged or truncated and cannot be decoded ({first_line(error)})."
            ),
        ):
            yield image


def _open_any(source: Any, folder: str | Path | None, access: Access) -> Image.Image:
    if isinstance(source, Image.Image):
        if source.format not in (None, *IMAGE_FORMATS, "HEIF"):  # it may not be decoded yet
            raise UserError(
                f"a PIL image of the format {source.format} is not read: save it as PNG, or give "
                f"image.convert('RGB')."
            )
        return source
    if isinstance(source, np.ndarray):
        refuse(
            (
                source.dtype != np.uint8,
                f"an image array must be uint8, this one is {source.dtype}.",
            ),
            (
                source.ndim != 2 and not (source.ndim == 3 and source.shape[2] in range(1, 5)),
                f"an image array must be [H, W] or [H, W, 1 to 4], this one is {source.shape}.",
            ),
        )
        return Image.fromarray(source[:, :, 0] if source.shape[2:] == (1,) else source)
    if isinstance(source, Mapping):
        value = source.get("bytes") or source.get("path")
        if not value:
            raise UserError(f"an image dict needs 'bytes' or 'path'; it has {sorted(source)}.")
        return _open_any(value, folder, access)
    if not isinstance(source, str | Path | bytes | bytearray):
        raise UserError(
            f"an image is a path, bytes, a data URI, a PIL image or an array, "
            f"not {type(source).__name__}."
        )
    if isinstance(source, str) and source.startswith("data:"):
        wrong = f"the data URI '{source[:40]}…' does not hold base64."
        return _open(_from_base64(source.partition(",")[2], wrong), "the data URI")
    if found := find(source, folder, access):
        return _open(*found)
    text = str(source)
    path = located(text, folder) if len(text) < 300 else f"{text[:60]}…"
    wrong = f"there is no file '{path}'."
    if len(text) <= 64:
        raise UserError(wrong)
    return _open(_from_base64(text, wrong), "the base64 string")


def _from_base64(text: str, wrong: str) -> bytes:
    with explained(ValueError, lambda _: wrong):
        return base64.b64decode("".join(text.split()), validate=True)


# What Pillow raises for damaged and for suspiciously large files.
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def _open(file: Path | bytes, subject: str) -> Image.Image:
    """Open a file or its bytes; subject: what errors call it."""
    given = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        return Image.open(given, formats=_formats())
    except DAMAGED as error:
        head = head_of(file)
        kind = kind_of(head)
        if kind is HEIC and _reads_heic():
            with contextlib.suppress(*DAMAGED):
                return Image.open(given, formats=("HEIF",))
        elif kind is None or kind.medium != "image" or kind is HEIC:
            raise UserError(sentence(kind, head, subject)) from error
        what = kind.name.removeprefix("a still image ").strip("()")
        is_limit = isinstance(error, ValueError | Image.DecompressionBombError)  # Pillow's own
        why = f"and Pillow does not open it ({first_line(error)}): write it again"
        raise UserError(
            f"{subject} is {what}, {why if is_limit else 'damaged or cut short: copy it again'}."
        ) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `IMAGE_FORMATS` that Pillow opens under their own name (MPO as JPEG)."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


@functools.cache
def _reads_heic() -> bool:
    """Return whether pillow-heif is installed; Pillow has learned to use it then."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def read_image(source: Any, folder: str | Path | None = None, access: Access = SAFE) -> np.ndarray:
    """Return uint8 [H, W, 3]: the image turned upright by its EXIF tag, in RGB.

    Transparency lies on white, as transformers' processors have it; 16-bit grey keeps its upper
    eight bits (Pillow's own conversion clips it to white). `source` as in `open_image`.
    Raises `UserError` for an unreadable or truncated image.
    """
    return np.array(read_rgb(source, folder, access))


def read_rgb(source: Any, folder: str | Path | None = None, access: Access = SAFE) -> Image.Image:
    """Return what `read_image` does as a Pillow image, which spares copies where it is resized."""
    with open_image(source, folder, access) as image:
        if image is not source:
            ImageOps.exif_transpose(image, in_place=True)
        rgb = to_rgb(ImageOps.exif_transpose(image) if image is source else image)
        rgb.load()
        return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image in RGB, itself where it is; see `read_image`."""
    if image.mode == "F":
        raise UserError("a floating-point image has no agreed range: save it as 8-bit RGB.")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:  # Pillow opens some 16-bit files as 32-bit
            raise UserError("a 32-bit grey image has no agreed range: save it as 8-bit RGB.")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def image_size(
    source: Any, folder: str | Path | None = None, access: Access = SAFE
) -> tuple[int, int]:
    """Return (height, width) of what `read_image` gives, from the header and tags alone."""
    with open_image(source, folder, access) as image:
        return upright_size(image)


TAGS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # that may hold an orientation


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return an opened image's (height, width) once it is turned by its tag; nothing is decoded.

    The exception is a PNG that has the tag behind its pixels, which is found by decoding it.
    """
    width, height = image.size
    # Pillow's size of a TIFF is the upright one.
    done = ExifTags.Base.Orientation in getattr(image, "tag_v2", {})
    tagged = not done and (not image.info.keys().isdisjoint(TAGS) or _has_late_tag(image))
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if tagged else 1
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _has_late_tag(image: Image.Image) -> bool:
    """Return whether a PNG that is not decoded yet has a tag behind its pixels."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None:
        return False
    place = file.tell()
    try:
        file.seek(8)
        while len(start := file.read(8)) == 8 and start[4:] != b"IEND":
            length, key = int.from_bytes(start[:4]), b""
            if start[4:] in (b"tEXt", b"zTXt", b"iTXt"):
                key = file.read(min(length, 80)).partition(b"\0")[0]
                file.seek(-min(length, 80), 1)
            if start[4:] == b"eXIf" or key.decode("latin-1") in TAGS:
                return True
            file.seek(length + 4, 1)  # a check sum is behind each
        return False
    finally:
        file.seek(place)
