"""The one form that every record takes.

A canonical record is
    {"id": str, "index": int, "folder": str | None,
     "messages": [{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}],
     "images": [path, bytes, PIL image, ...: one for each image part, in order]}
"""

import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.data.formats import IMAGES, check_order, read_turns, rename_columns
from vlm_jax.data.keys import is_given, refuse_unread
from vlm_jax.errors import UserError

Record = dict[str, Any]
MARKER = "<image>"


def canonical(
    row: Any,
    index: int = 0,
    folder: str | None = None,
    name: str = "the record",
    *,
    line: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Record:
    """Return the canonical record of a raw row, or the row itself where it already is one.

    A row has one of the formats of `vlm_jax.data.formats` (`conversations` of LLaVA and ShareGPT,
    `messages`, query/response, prompt/completion, question/answer, instruction/output) and, for
    pictures, `image` or `images`: one or a list. In a text that is a plain string, "<image>"
    outside the assistant's turns is an image's place, and line
    breaks beside it are dropped; images that no marker or part names come first in the first
    user turn. Content given as parts is taken as it is, and "<image>" in its texts is text. A
    `system` (or `system_prompt`) beside the turns becomes the first turn. A message keeps the
    "weight" that its turn has in the loss, where that is not 1. Other keys are not read.
    line: where the row begins in its file, for errors. columns: {our name: the row's}.
    Raises `UserError`, naming the record, for what is malformed, for images and "<image>" markers
    that do not pair up, and for content under a key that is not read (`image_path`, `tools`, ...).
    """
    if isinstance(row, Mapping) and {"id", "messages", "images", "index", "folder"} == row.keys():
        return dict(row)
    where = f"Record {index} of '{name}'" + ("" if line is None else f", line {line}")
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is {type(row).__name__}, not a JSON object.")
    if columns:
        row = rename_columns(row, columns, where)
    record_id = row.get("id")
    if record_id is not None:
        where += f" (id {record_id!r})"
    turns, read = read_turns(row, where, columns or {})
    check_order(turns, where)
    images = _images(row, where)
    has_images = bool(images) or any(map(_brings_image, turns))
    refuse_unread(row, read, has_images, where)
    messages, images = _place_images(turns, images, where)
    for turn, message in zip(turns, messages, strict=True):
        if "weight" in turn:
            message["weight"] = turn["weight"]
    return {
        "id": str(index if record_id is None else record_id),
        "index": index,
        "folder": folder,
        "messages": messages,
        "images": images,
    }


def _images(row: Mapping[str, Any], where: str) -> list[Any]:
    given = [row[key] for key in IMAGES if is_given(row, key)]
    if len(given) == 2:
        raise UserError(f"{where} has both {' and '.join(IMAGES)}. Leave one of them out.")
    return list(given[0]) if given and isinstance(given[0], list | tuple) else given


def _brings_image(turn: dict[str, Any]) -> bool:
    parts = turn["content"] if isinstance(turn["content"], list | tuple) else ()
    return any(isinstance(part, Mapping) and "image" in str(part.get("type")) for part in parts)


def _place_images(
    turns: list[dict[str, Any]], images: list[Any], where: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return messages whose content is parts, and the image of each image part."""
    messages: list[dict[str, Any]] = []
    named: list[Any] = []  # a part's own image, or None where it takes the next of the record's
    for turn in turns:
        content = turn["content"]
        if isinstance(content, str):
            asked = turn["role"] != "assistant"  # an answer's "<image>" is text
            parts = _split_markers(content) if asked else [{"type": "text", "text": content}]
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
            f"{where} has {len(images)} images, but its turns name {wanted} (by '{MARKER}' or "
            f"image parts). There must be one for each; a '{MARKER}' that is meant as text belongs "
            f'in a text part: "content": [{{"type": "text", "text": …}}].'
        )
    rest = iter(images)
    return messages, [next(rest) if value is None else value for value in named]


def _split_markers(text: str) -> list[dict[str, str]]:
    """Return text and image parts; the line break LLaVA writes beside a marker is no content.

    Nor is white space at the turn's ends; a space within a sentence, "a <image> b", is.
    """
    pieces = text.split(MARKER)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    texts = [number for number, piece in enumerate(pieces) if piece.strip()]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
        if number in texts:
            piece = re.sub(r"^\s*\n\s*|\s*\n\s*$", "", piece)
            piece = piece.lstrip() if number == texts[0] else piece
            piece = piece.rstrip() if number == texts[-1] else piece
            parts.append({"type": "text", "text": piece})
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
