"""File types by their first bytes, and the remedy for a wrong one."""

import re
from pathlib import Path
from typing import NamedTuple

from vlm_jax.errors import UserError, explained

HEAD = 1024  # bytes that are looked at


class Kind(NamedTuple):
    """A kind of file; name and remedy make a sentence: "the file is NAME: REMEDY".

    medium: image or video where it is read as such, text, other, or lost: what was meant is not
    in the file at all. The remedy of an image is for where a video was meant, and the other way.
    """

    medium: str
    name: str
    remedy: str


AGAIN = "download it again, from an address that needs no login and gives the file itself"
UNPACK = "unpack it, and give the path of the file that is in it"
NETWORK = "give the video's own file; what other files or addresses a list names is not opened"


def _image(name: str) -> Kind:
    return Kind(
        "image",
        f"a still image ({name})",
        "give it as an image; a video of frame files is a list of them",
    )


def _video(name: str) -> Kind:
    return Kind("video", f"a video ({name})", "give it as a video")


def _unread(name: str, remedy: str = "export it as PNG") -> Kind:
    return Kind("other", f"{name}, which is not read", remedy)


SPACE = rb"(?:\xef\xbb\xbf)?\s*"
# Of HTML and XML. Atomic: comments can be told apart in many ways, which none may try.
COMMENTS = rb"(?>(?:<!--.*?-->\s*)*)"
PROLOGUE = rb"(?i)" + SPACE + rb"(?:<\?xml[^>]*>\s*)?" + COMMENTS
HEIC = Kind(
    "image",
    "a HEIC picture, as phones write them",
    "pip install 'vlm_jax[heic]', or convert it to JPEG",
)
TEXT, JSON = (
    Kind("text", name, "copy or download again what was meant") for name in ("text", "JSON text")
)

# First row wins; each matches from the first byte on.
KINDS: tuple[tuple[bytes, Kind], ...] = (
    (rb"\Z", Kind("lost", "empty", "copy or download it again")),
    (
        rb"version https://(?:git-lfs|hawser)\.github\.com/spec/",  # hawser: its first name
        Kind(
            "lost",
            "a Git LFS pointer, which stands for a file that was not fetched",
            "run `git lfs pull` in its repository",
        ),
    ),
    (
        PROLOGUE + rb"(?:<!doctype svg[^>]*>\s*)?" + COMMENTS + rb"<svg\b",
        _unread("an SVG drawing"),
    ),
    (
        PROLOGUE + rb"<(?:!doctype html|html|head|body|title|script|meta)\b",
        Kind("lost", "a web page (HTML), as a download that failed leaves it", AGAIN),
    ),
    (PROLOGUE + rb"<MPD\b", _unread("a DASH playlist", NETWORK)),
    (
        PROLOGUE + rb"<(?:Error|AuthenticationFailed)\b",
        Kind("lost", "a server's error message (XML), as a download that failed leaves it", AGAIN),
    ),
    (SPACE + rb"<\?xml\b", _unread("an XML document")),
    (rb"#EXTM3U", _unread("an HLS playlist", NETWORK)),
    (rb"ffconcat version", _unread("a list of videos (ffconcat)", NETWORK)),
    (rb"v=0\r?\no=", _unread("a description of a stream (SDP)", NETWORK)),
    (rb"%!PS|\xc5\xd0\xd3\xc6|\x04%!PS", _unread("PostScript")),
    (rb"%PDF-", _unread("a PDF document", "export its pages as PNG")),
    (rb"\x89PNG\r\n\x1a\n", _image("PNG")),
    (rb"\xff\xd8\xff", _image("JPEG")),
    (rb"GIF8[79]a", _image("GIF")),
    (rb"RIFF....WEBP", _image("WebP")),
    (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", _image("BMP")),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", _image("TIFF")),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", _image("JPEG 2000")),
    (rb"P[1-7fF]\s", _image("PPM")),
    (rb"....ftypavi[fs]|....ftypm[is]f1.{0,64}avi[fs]", _image("AVIF")),
    (rb"....ftyp(?:hei[cxms]|hev[cxms]|mif[12]|miaf|msf1)", HEIC),
    (rb"\0\0\0\x0cJXL |\xff\x0a", _unread("a JPEG XL picture")),
    (rb"8BPS\0", _unread("a Photoshop document")),
    (rb"\0\0[\x01\x02]\0[\x01-\xff]\0", _unread("an icon (ICO)")),
    (rb".{128}DICM", _unread("a DICOM picture")),
    (rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)", _video("MP4 or QuickTime")),
    (rb"\x1a\x45\xdf\xa3", _video("Matroska or WebM")),
    (rb"RIFF....AVI ", _video("AVI")),
    (rb"FLV\x01", _video("FLV")),
    (rb"OggS", _video("Ogg")),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _video("WMV")),
    (rb"\0\0\x01[\xba\xb3]", _video("MPEG")),
    (rb"G.{187}G.{187}G|.{4}G.{191}G", _video("MPEG transport stream")),
    (rb"ID3|fLaC|RIFF....WAVE|\xff[\xf2\xf3\xfa\xfb]", _unread("a sound file", "remove it")),
    (rb"PK[\x03\x05]", _unread("a ZIP archive", UNPACK)),
    (rb"\x1f\x8b", _unread("gzip-compressed", UNPACK)),
    (rb"\x28\xb5\x2f\xfd", _unread("zstd-compressed", UNPACK)),
    (rb"BZh|\xfd7zXZ\0|7z\xbc\xaf\x27\x1c|Rar!\x1a|.{257}ustar", _unread("an archive", UNPACK)),
    (rb"\x93NUMPY", _unread("a NumPy array", "save it as PNG, or give the array itself")),
    (rb"\x89HDF\r\n", _unread("an HDF5 file")),
    (rb"PAR1", _unread("a Parquet table", "give it as the data file")),
    (SPACE + rb"[\[{]", JSON),
)


def kind_of(head: bytes) -> Kind | None:
    """Return what a file with these first bytes is; None: nothing that the table lists."""
    matches = (kind for pattern, kind in KINDS if re.match(pattern, head, re.DOTALL))
    return next(matches, TEXT if _is_text(head) else None)


def _is_text(head: bytes) -> bool:
    # A character may be cut at the end. Other bytes than UTF-8 become surrogates: not printable.
    text = head.decode("utf-8", errors="surrogateescape" if len(head) < HEAD else "ignore")
    return all(character.isprintable() or character.isspace() for character in text)


def head_of(file: Path | bytes) -> bytes:
    """Return the first bytes of a file, or of what it holds; raise `UserError` where none can."""
    if isinstance(file, bytes):
        return file[:HEAD]
    unreadable = explained(OSError, lambda error: f"the file cannot be read: {error.strerror}.")
    with unreadable, open(file, "rb") as opened:
        return opened.read(HEAD)


def sentence(kind: Kind | None, head: bytes, subject: str = "the file") -> str:
    """Return what a file is and what to do, as one sentence without its first capital."""
    if kind is None:
        return f"{subject} is of no known kind (its first bytes are {head[:8].hex(' ')})."
    words = head.decode(errors="ignore").split() if kind.medium == "text" else []
    start = f" ('{' '.join(words)[:60]}')" if words else ""
    return f"{subject} is {kind.name}{start}: {kind.remedy}."


def lost(file: Path | str) -> str:
    """Return " The file is ...", where it is not such a file but what a failed fetch left; else "".

    For errors about files that could not be read as what they are by name.
    """
    try:
        head = head_of(Path(file))
    except UserError:
        return ""
    kind = kind_of(head)
    return f" T{sentence(kind, head)[1:]}" if kind is not None and kind.medium == "lost" else ""


def refuse_lost(file: Path, name: str) -> None:
    """Raise `UserError` for a file that is empty, a Git LFS pointer or a web page, see `lost`."""
    if reason := lost(file):
        raise UserError(f"{name} cannot be read.{reason}")
