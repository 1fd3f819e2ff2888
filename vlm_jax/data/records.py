"""The one form that every record takes, and the formats it is read from.

A canonical record is
    {"id": str, "index": int, "folder": str | None,
     "messages": [{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}],
     "images": [path, bytes, PIL image, ...: one for each image part, in order]}
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.data.keys import is_given, refuse_unread, refuse_unread_in_turn
from vlm_jax.errors import UserError, nearest

Record = dict[str, Any]
MARKER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
}
# A system prompt beside the turns, as ShareGPT's and LLaMA-Factory's files have it.
SYSTEM = ("system", "system_prompt")
IMAGES = ("images", "image")


def canonical(
    row: Any, index: int = 0, folder: str | None = None, name: str = "the record"
) -> Record:
    """Return the canonical record of a raw row, or the row itself where it already is one.

    A row has `conversations` (LLaVA, ShareGPT: from/value) or `messages` (role/content) and, for
    pictures, `image` or `images`: one or a list. In `conversations`, and in `messages` whose
    content is a plain string, "<image>" outside the assistant's turns is an image's place, and line
    breaks beside it are dropped; images that no marker or part names come first in the first
    user turn. Content given as parts is taken as it is, and "<image>" in its texts is text. A
    `system` (or `system_prompt`) beside the turns becomes the first turn. Other keys are not read.
    Raises `UserError`, naming the record, for what is malformed, for images and "<image>" markers
    that do not pair up, and for content under a key that is not read (`image_path`, `tools`, ...).
    """
    if isinstance(row, Mapping) and {"id", "messages", "images", "index", "folder"} == row.keys():
        return dict(row)
    where = f"Record {index} of '{name}'"
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is {type(row).__name__}, not a JSON object.")
    if row.get("id") is not None:
        where += f" (id {row['id']!r})"
    found = [
        turns_of(row[key], where) for key, turns_of in FORMATS.items() if row.get(key) is not None
    ]
    if not found:
        raise UserError(
            f"{where} has the keys {sorted(map(str, row))}; expected one of {', '.join(FORMATS)}, "
            f"as in LLaVA's JSON or in chat messages."
        )
    if found[0] != found[-1]:
        raise UserError(
            f"{where} has both {' and '.join(FORMATS)}, and they differ. Leave one of them out."
        )
    images = _images(row, where)
    has_images = bool(images) or any(map(_brings_image, found[0]))
    refuse_unread(row, {*IMAGES, *SYSTEM, *FORMATS}, has_images, where)
    messages, images = _place_images(_with_system(row, found[0], where), images, where)
    record_id = row.get("id")
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


def _with_system(
    row: Mapping[str, Any], turns: list[dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    """Return the turns with a system prompt that stands beside them as the first."""
    for key in (key for key in SYSTEM if is_given(row, key)):
        prompt = row[key]
        if not isinstance(prompt, str):
            raise UserError(f"{where} has a '{key}' that is not text: {prompt!r:.80}.")
        own = [turn["content"] for turn in turns if turn["role"] == "system"]
        if prompt.strip() and not own:
            turns = [{"role": "system", "content": prompt}, *turns]
        elif prompt.strip() and own != [prompt]:
            raise UserError(
                f"{where} has a '{key}' that differs from its system turn. Leave one of them out."
            )
    return turns


def _turns(value: Any, where: str, role_key: str, text_key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where} holds no list of turns: {value!r:.80}.")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping) or role_key not in turn or turn.get(text_key) is None:
            raise UserError(
                f"{where}: turn {number} is {turn!r:.80}; expected an object with '{role_key}' and "
                f"'{text_key}'."
            )
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise UserError(
                f"{where}: turn {number} has the role {turn[role_key]!r}"
                f"{nearest(turn[role_key], ROLES)}; expected one of {', '.join(ROLES)}."
            )
        refuse_unread_in_turn(turn, {role_key, text_key}, f"{where}: turn {number}")
        turns.append({"role": role, "content": turn[text_key]})
    return turns


# A row's key -> how its turns are read.
FORMATS: dict[str, Callable[[Any, str], list[dict[str, Any]]]] = {
    "messages": functools.partial(_turns, role_key="role", text_key="content"),
    "conversations": functools.partial(_turns, role_key="from", text_key="value"),
}


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
