"""The record: the one form of every example before encoding.

A canonical record is
    {"id": str, "index": int, "folder": str | None,
     "messages": [{"role", "content": [{"type": "text", "text"} | {"type": "image" | "video"}]}],
     "images": [path, bytes, PIL image, ...: one for each image part, in order],
     "videos": [path, list of frames, dict, ...: one for each video part, in order]}
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlm_jax.data.records.formats import IMAGES, VIDEOS, check_order, read_turns, rename_columns
from vlm_jax.data.records.grounding import place_objects
from vlm_jax.data.records.placeholders import refuse_foreign, refuse_inline
from vlm_jax.data.records.unread_keys import is_given, is_nothing, refuse_unread
from vlm_jax.errors import UserError

Record = dict[str, Any]
MARKERS = {"image": "<image>", "video": "<video>"}
SOURCES = {  # of a part of its own
    "image": ("image", "image_url", "url", "path", "base64", "bytes"),
    "video": ("video", "video_url", "url", "path", "bytes"),
}
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
    index, name = record["index"], record["id"]
    return f"record {index}" if name == str(index) else f"record {index} (id {name!r})"


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
    if (
        isinstance(row, Mapping)
        and row.keys() in (CANONICAL, CANONICAL - {"videos"})
        and isinstance(row["messages"], list)
        and all(
            isinstance(m, Mapping) and isinstance(m.get("content"), list) for m in row["messages"]
        )
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
    has_media = any(media.values()) or any(
        _names(turn["content"], kind, in_text=False) for turn in turns for kind in MARKERS
    )
    refuse_unread(row, read, has_media, where)
    if not has_media:
        refuse_inline(turns, where)
    messages, media = _place_media(turns, media, where)
    place_objects(messages, row.get("objects"), where)
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
    # Frames are those of one video, and each of them must be there.
    return [list(value)] if given == ["video"] and all(map(_is_frame, found)) else found


def _is_frame(value: Any) -> bool:
    return not isinstance(value, bytes | list | tuple | Mapping) and (
        not isinstance(value, str) or bool(re.fullmatch(FRAME_FILE, value.strip(), re.IGNORECASE))
    )


def _place_media(
    turns: list[dict[str, Any]], media: dict[str, list[Any]], where: str
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Return messages whose content is parts, and the image or video of each part of its kind."""
    in_answers = [kind for kind in MARKERS if _is_answered(turns, kind, len(media[kind]))]
    messages: list[dict[str, Any]] = []
    # A part's own image or video, or None where it takes the next of the record's.
    named: dict[str, list[Any]] = {kind: [] for kind in MARKERS}
    for turn in turns:
        clean: list[dict[str, str]] = []
        for kind, value in (_part(part, where) for part in _parts(turn, in_answers, where)):
            if kind in named:
                named[kind].append(value)
            clean.append({"type": kind} if kind in named else {"type": kind, "text": value})
        messages.append({**turn, "content": clean})
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
    named = sum(
        turn["content"].count(MARKERS[kind])
        for turn in turns
        if turn["role"] == "assistant" and isinstance(turn["content"], str)
    )
    return named == given > 0 and not any(
        _names(turn["content"], kind, in_text=turn["role"] != "assistant") for turn in turns
    )


def _names(content: Any, kind: str, in_text: bool) -> bool:
    """Return whether content has a part of a kind, or in_text a marker."""
    if isinstance(content, str):
        return in_text and MARKERS[kind] in content
    return isinstance(content, list | tuple) and any(
        isinstance(part, Mapping) and kind in str(part.get("type")) for part in content
    )


def _parts(turn: dict[str, Any], in_answers: Collection[str], where: str) -> Sequence[Any]:
    """Return the parts of a turn; in_answers: the kinds whose markers are read in answers."""
    content = turn["content"]
    if isinstance(content, list | tuple):
        return content
    if not isinstance(content, str):
        raise UserError(f"{where} has content that is neither text nor a list: {content!r:.80}.")
    is_answer = turn["role"] == "assistant"
    markers = [MARKERS[kind] for kind in (in_answers if is_answer else MARKERS)]
    # The texts around the markers, and the markers, by turns.
    pieces = re.split(f"({'|'.join(markers)})", content) if markers else [content]
    if len(pieces) == 1:
        return pieces
    if not is_answer:
        pieces = _trimmed(pieces)
    return [{"type": p[1:-1]} if n % 2 else p for n, p in enumerate(pieces) if p]


def _trimmed(pieces: Sequence[str]) -> list[str]:
    """Return texts and markers without what is no content; an answer keeps it.

    The line break LLaVA writes beside a marker is none, nor is white space at the turn's ends; a
    space within a sentence, "a <image> b", is.
    """
    kept = [re.sub(r"^\s*\n\s*|\s*\n\s*$", "", p) if p.strip() else "" for p in pieces]
    texts = [number for number in range(0, len(kept), 2) if kept[number]]
    if texts:
        kept[texts[0]] = kept[texts[0]].lstrip()
        kept[texts[-1]] = kept[texts[-1]].rstrip()
    return kept


def _part(part: Any, where: str) -> tuple[str, Any]:
    """Return ("text", the text), or ("image" or "video", its own source or None)."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    for medium in MARKERS:
        if kind in (medium, f"{medium}_url"):
            return medium, _own_source(part, medium)
    raise UserError(
        f"{where} has the content part {part!r:.80}; expected "
        f"{{'type': 'text', 'text': …}}, {{'type': 'image'}} or {{'type': 'video'}}."
    )


def _own_source(part: Mapping[str, Any], kind: str) -> Any:
    """Return an image or video part's own source, or None; a video's with its sampling."""
    options = {key: part[key] for key in part if is_given(part, key) and key != "type"}
    value = options.pop(next((key for key in SOURCES[kind] if key in options), ""), None)
    if kind == "image" and isinstance(source := options.get("source"), Mapping):  # Anthropic's
        value = source.get("url") or source.get("data")
    value = value["url"] if isinstance(value, Mapping) and "url" in value else value
    if kind == "image" or not options:
        return None if is_nothing(value) else value
    return {**options, **(value if isinstance(value, Mapping) else {"video": value})}
