"""The record: the one form of every example before encoding.

A canonical record is
    {"id": str, "index": int, "folder": str | None,
     "messages": [{"role", "content": [{"type": "text", "text"} | {"type": "image" | "video"}]}],
     "images": [path, bytes, PIL image, ...: one for each image part, in order],
     "videos": [path, list of frames, dict, ...: one for each video part, in order]}
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data.records.formats import IMAGES, VIDEOS, check_order, read_turns, rename_columns
from vlm_jax.data.records.grounding import place_objects
from vlm_jax.data.records.placeholders import refuse_foreign, refuse_inline
from vlm_jax.data.records.unread_keys import is_given, is_nothing, refuse_unread
from vlm_jax.errors import UserError

Record = dict[str, Any]
MARKERS = {"image": "<image>", "video": "<video>"}
CANONICAL = {"id", "index", "folder", "messages", "images", "videos"}
FRAME_FILE = r"\S.*\.(jpe?g|png|webp|bmp|tiff?)"


class BadExample(UserError):
    """An example that cannot be trained on; `reason` is a key of the report's counts."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:  # or it would not come back from a worker process
        return BadExample, (self.reason, str(self))


def describe(record: Record) -> str:
    """Return how errors call a record: by its index, and its id where it has one."""
    named = "" if record["id"] == str(record["index"]) else f" (id {record['id']!r})"
    return f"record {record['index']}{named}"


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

    A row has one of the formats of `records.formats` (`conversations` of LLaVA and ShareGPT,
    `messages`, query/response, prompt/completion, question/answer, instruction/output) and, for
    pictures, `image` or `images`: one or a list; for films, `video` or `videos` likewise (a list of
    image files under `video` is one video's frames). What is null, empty or a struct of nulls there
    is none. In a text that is a plain string, "<image>"
    is an image's place: outside the assistant's turns, where line breaks beside it are dropped, and
    within them where nothing else names any. Images that no marker or part names come first in the
    first user turn; other programs' words for them are refused there. Content given as parts is
    taken as it is, and "<image>" in its texts is text. "<video>" is to videos what "<image>" is to
    images. `objects` are what "<ref-object>" and "<bbox>" stand for, see `data.grounding`. A
    `system` (or `system_prompt`) beside the turns becomes the first turn. A message keeps the
    "weight" that its turn has in the loss, where that is not 1, and "answers", where there are
    several right ones, of which the first is its text. Other keys are not read.
    line: where the row begins in its file, for errors. columns: {our name: the row's}.
    Raises `UserError`, naming the record, for what is malformed, for images and "<image>" markers
    that do not pair up, and for content under a key that is not read (`image_path`, `tools`, ...).
    """
    if isinstance(row, Mapping) and row.keys() in (CANONICAL, CANONICAL - {"videos"}):
        turns = row["messages"]
        if isinstance(turns, list) and all(
            isinstance(turn, Mapping) and isinstance(turn.get("content"), list) for turn in turns
        ):
            return {"videos": [], **row}
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
    media = {"image": _media(row, IMAGES, where), "video": _media(row, VIDEOS, where)}
    has_media = any(media.values()) or any(map(_brings_media, turns))
    refuse_unread(row, read, has_media, where)
    if not has_media:
        refuse_inline(turns, where)
    messages, media = _place_media(turns, media, where)
    place_objects(messages, row.get("objects"), where)
    for turn, message in zip(turns, messages, strict=True):
        message.update({key: turn[key] for key in ("weight", "answers") if key in turn})
    return {
        "id": str(index if record_id is None else record_id),
        "index": index,
        "folder": folder,
        "messages": messages,
        "images": media["image"],
        "videos": media["video"],
    }


def _media(row: Mapping[str, Any], keys: tuple[str, str], where: str) -> list[Any]:
    given = [key for key in keys if is_given(row, key)]
    if len(given) == 2:
        raise UserError(f"{where} has both {' and '.join(keys)}. Leave one of them out.")
    value = row[given[0]] if given else []
    if not isinstance(value, list | tuple):
        return [value]
    found = [one for one in value if not is_nothing(one)]
    if given == ["video"] and all(map(_is_frame, found)):
        return [list(value)]  # the frames of one, each of which must be there
    return found


def _is_frame(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(FRAME_FILE, value.strip(), re.IGNORECASE) is not None
    return not isinstance(value, bytes | list | tuple | Mapping)


def _brings_media(turn: dict[str, Any]) -> bool:
    parts = turn["content"] if isinstance(turn["content"], list | tuple) else ()
    kinds = [str(part.get("type")) for part in parts if isinstance(part, Mapping)]
    return any("image" in kind or "video" in kind for kind in kinds)


def _place_media(
    turns: list[dict[str, Any]], media: dict[str, list[Any]], where: str
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Return messages whose content is parts, and the image or video of each part of its kind."""
    messages: list[dict[str, Any]] = []
    # A part's own image or video, or None where it takes the next of the record's.
    named: dict[str, list[Any]] = {kind: [] for kind in MARKERS}
    in_answers = [kind for kind in MARKERS if _is_answered(turns, kind, len(media[kind]))]
    for turn in turns:
        content = turn["content"]
        if isinstance(content, str) and turn["role"] == "assistant":
            parts = _split_answer(content, in_answers)
        elif isinstance(content, str):
            parts = _split_markers(content)
        elif isinstance(content, list | tuple):
            parts = list(content)
        else:
            raise UserError(
                f"{where} has content that is neither text nor a list: {content!r:.80}."
            )
        clean = []
        for part in parts:
            kind, value = _part(part, where)
            if kind in named:
                named[kind].append(value)
                clean.append({"type": kind})
            else:
                clean.append({"type": "text", "text": value})
        messages.append({"role": turn["role"], "content": clean})
    placed = {kind: _pair(kind, media[kind], named[kind], where) for kind in MARKERS}
    for kind in reversed(MARKERS):  # what nothing names: images first, then videos
        if not named[kind] and placed[kind]:
            refuse_foreign(turns, kind, len(placed[kind]), where)
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is None:
                raise UserError(f"{where} has {kind}s but no user turn to show them in.")
            first["content"][:0] = [{"type": kind} for _ in placed[kind]]
    return messages, placed


def _pair(kind: str, given: list[Any], named: list[Any], where: str) -> list[Any]:
    """Return what stands at each part of a kind: its own, or the next of the record's."""
    wanted, marker = sum(value is None for value in named), MARKERS[kind]
    if not named:
        return given
    if wanted == 0 and given:
        raise UserError(
            f"{where} has {len(given)} {kind}s beside its messages, but every {kind} part "
            f"has its own. Remove one of the two."
        )
    if wanted != len(given):
        raise UserError(
            f"{where} has {len(given)} {kind}s, but its turns name {wanted} (by '{marker}' or "
            f"{kind} parts). There must be one for each; a '{marker}' that is meant as text "
            f'belongs in a text part: "content": [{{"type": "text", "text": …}}], and {kind}s of '
            f"an answer in parts {{'type': '{kind}'}}, where others are placed too."
        )
    rest = iter(given)
    return [next(rest) if value is None else value for value in named]


def _is_answered(turns: list[dict[str, Any]], kind: str, given: int) -> bool:
    """Return whether answers have the only places: a marker for each, and no other names any."""
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    named = sum(text.count(MARKERS[kind]) for text in answers if isinstance(text, str))
    return named == given > 0 and not any(
        _names(turn["content"], kind, turn["role"] != "assistant") for turn in turns
    )


def _names(content: Any, kind: str, asked: bool) -> bool:
    if isinstance(content, str):
        return asked and MARKERS[kind] in content
    parts = content if isinstance(content, list | tuple) else ()
    return any(isinstance(part, Mapping) and kind in str(part.get("type")) for part in parts)


def _split_answer(text: str, kinds: Sequence[str]) -> list[dict[str, str]]:
    """Return an answer's text with images or videos in it, to the last space as it is written."""
    if not kinds:
        return [{"type": "text", "text": text}]
    pieces = re.split("|".join(f"({MARKERS[kind]})" for kind in kinds), text)
    return [
        {"type": piece[1:-1]} if piece in MARKERS.values() else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]


def _split_markers(text: str) -> list[dict[str, str]]:
    """Return text, image and video parts.

    The line break LLaVA writes beside a marker is no content, nor is white space at the turn's
    ends; a space within a sentence, "a <image> b", is.
    """
    pieces = re.split("|".join(MARKERS.values()), text)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    kinds = [kind[1:-1] for kind in re.findall("|".join(MARKERS.values()), text)]
    texts = [number for number, piece in enumerate(pieces) if piece.strip()]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": kinds[number - 1]})
        if number in texts:
            piece = re.sub(r"^\s*\n\s*|\s*\n\s*$", "", piece)
            piece = piece.lstrip() if number == texts[0] else piece
            piece = piece.rstrip() if number == texts[-1] else piece
            parts.append({"type": "text", "text": piece})
    return parts


def _part(part: Any, where: str) -> tuple[str, Any]:
    """Return ("text", the text), or ("image" or "video", its own source or None)."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    if kind in ("image", "image_url"):
        keys = ("image", "image_url", "url", "path", "base64", "bytes")
        value = next((part[key] for key in keys if is_given(part, key)), None)
        if isinstance(source := part.get("source"), Mapping):  # Anthropic's
            value = source.get("url") or source.get("data")
        value = value["url"] if isinstance(value, Mapping) and "url" in value else value
        return "image", None if is_nothing(value) else value
    if kind in ("video", "video_url"):
        return "video", _video_part(part)
    raise UserError(
        f"{where} has the content part {part!r:.80}; expected "
        f"{{'type': 'text', 'text': …}}, {{'type': 'image'}} or {{'type': 'video'}}."
    )


def _video_part(part: Mapping[str, Any]) -> Any:
    """Return a video part's own source, with what it says about sampling, or None."""
    keys = ("video", "video_url", "url", "path", "bytes")
    said = {key: part[key] for key in part if is_given(part, key) and key != "type"}
    found = next((key for key in keys if key in said), None)
    value = said.pop(found) if found else None
    value = value["url"] if isinstance(value, Mapping) and "url" in value else value
    if said and isinstance(value, Mapping):
        return {**said, **value}
    return {**said, "video": value} if said else value
