"""A command's output: atomic files, and lines on a terminal."""

import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from vlm_jax.errors import refuse
from vlm_jax.files.file_types import head_of


def writable(name: str, option: str, mark: bytes | None = None) -> Path:
    """Return the path of a file to write, or raise before any work where it cannot be.

    mark: what the beginning of such a file holds; another file of that name is not replaced.
    """
    file = Path(name).expanduser()
    refuse(
        (
            file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK),
            f"{option} '{file}' cannot be written: it must name a file in a directory that is "
            f"there and can be written. Make '{file.parent}', or choose another path.",
        ),
        (
            mark is not None and file.is_file() and mark not in (head_of(file) or mark),
            f"{option} '{file}' exists, and is not a file of this kind. Delete it, or choose "
            f"another path.",
        ),
    )
    return file


def write(file: Path, text: str, what: str) -> None:
    """Write a file in one step, and say so, and whether another one went for it."""
    from vlm_jax.files.atomic import write_whole  # not before a command needs it: it takes a second

    content = text.encode(errors="backslashreplace")  # of a half surrogate pair, as in JSON
    instead = ", in place of the file that was there" if file.is_file() else ""
    if file.is_symlink() or (file.exists() and not file.is_file()):  # /dev/stdout
        file.write_bytes(content)
    else:
        write_whole(file, content)
    print(f"Wrote {what} to '{file}'{instead}.", file=sys.stderr)


def wrapped(text: str, stream: Any) -> str:
    """Return a paragraph in lines that end at words where a terminal shows it; else as it is."""
    if not stream.isatty():
        return text
    return textwrap.fill(
        text, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False
    )
