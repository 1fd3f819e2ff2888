"""Unread keys of a record that look like content: refused, lest data be lost.

Real data has many columns beside its turns (source, category, score, width, image_id, task_id),
which are no content and may be there. But where a picture, a video or tools stand under a name that
is not read, a model would learn something else than the file says.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

import PIL.Image

from vlm_jax.errors import UserError, refuse

# Names count in lower case without punctuation: "image_path", "imagePath" and "Image-Path" are one.
HELD_AS = "(paths?|files?|filepaths?|filenames?|names?|urls?|uris?|base64|b64|bytes|data|list)?"
IMAGE = rf"(image|img|picture|photo|pic)s?{HELD_AS}"
ONE_OF_SEVERAL = rf"{IMAGE}[0-9]+"
VIDEO = rf"videos?{HELD_AS}[0-9]*"
OTHER_MEDIA = rf"audios?{HELD_AS}[0-9]*"
ADDRESS = ("url", "uri", "name", "id")
IMAGE_FILE = r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?)"


def is_nothing(value: Any) -> bool:
    """Return whether a value only fills a place: null, "", or a list or struct of such alone.

    Arrow makes a struct of nulls of a null, and pads lists with nulls. No bytes are not nothing but
    a damaged image.
    """
    if isinstance(value, Mapping):
        return all(map(is_nothing, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_nothing, value))
    return value is None or (isinstance(value, str) and not value)


def is_given(row: Mapping[str, Any], key: str) -> bool:
    """Return whether a row has something under a key: columns that only others use are empty."""
    return not is_nothing(row.get(key))


def refuse_unread(row: Mapping[str, Any], read: Set[str], has_images: bool, where: str) -> None:
    """Raise `UserError` for a row's content under a key that is not in `read`.

    has_images: the row has images or videos under a key that is read; another form of them (their
    paths, their addresses) beside it is then no loss.
    """
    for key in ("kto_tag", "label"):  # false: an answer as it should not be
        if row.get(key) is False and ("messages" in row or "conversations" in row):
            raise UserError(
                f"{where} has the {key} false, which says that its answer is not wanted, and "
                f"answers are trained on. Remove such rows, or the key if it means something else."
            )
    for key, name, value in _others(row, read):
        listed = isinstance(value, list | tuple | Mapping)
        is_address = has_images and name.endswith(ADDRESS)
        for is_content, instead in (
            (re.fullmatch(ONE_OF_SEVERAL, name), "all images in 'images', a list"),
            (not has_images and re.fullmatch(IMAGE, name), "'image', or 'images' for a list"),
            (
                listed
                and re.fullmatch(
                    "((message|conversation|dialog|dialogue|chat|turn)s?|history)", name
                ),
                "all turns in one list, 'messages' or 'conversations'",
            ),
            (  # of preference data: TRL, LLaMA-Factory, ms-swift
                re.fullmatch(
                    "(chosen|rejected|positive|negative)(response|answer|message|image|video)?s?",
                    name,
                ),
                "the one answer to train on, in the turns",
            ),
            (  # of single rows: ms-swift
                re.fullmatch("(chattemplate|mmprocessor)kwargs", name),
                "settings for all rows, in the config (data.max_pixels, ...)",
            ),
            (
                re.fullmatch("system(message|instruction)s?", name),
                "'system', or a system turn",
            ),
            (
                re.fullmatch("(tool|function)s?", name)
                and (listed or str(value).lstrip().startswith(("[{", "{"))),
                "tools written into the turns",
            ),
            (not is_address and re.fullmatch(VIDEO, name), "'video', or 'videos' for a list"),
            (
                not is_address and re.fullmatch(OTHER_MEDIA, name),
                "images and videos, which are all that can be trained on",
            ),
            (
                not has_images and key != "id" and _is_image(value),
                "'image', or 'images' for a list",
            ),
        ):
            if is_content:
                raise UserError(
                    f"{where} has '{key}', which is not read: expected {instead}. Rename the key, "
                    f"or remove it if it is not to be trained on."
                )


def _is_image(value: Any) -> bool:
    """Return whether a value can only be a picture, or several, whatever its key is called."""
    if isinstance(value, list | tuple):
        return any(map(_is_image, value))
    if isinstance(value, str):
        return re.fullmatch(IMAGE_FILE, value.strip(), re.IGNORECASE) is not None
    # A struct as a data set's Image column has it.
    is_struct = isinstance(value, Mapping) and {"bytes", "path"} <= value.keys()
    return is_struct or isinstance(value, bytes | PIL.Image.Image)


def refuse_unread_in_turn(turn: Mapping[str, Any], read: Set[str], where: str) -> None:
    """Raise `UserError` for content of one turn under a key that is not in `read`."""
    for key, name, _ in _others(turn, read):
        refuse(
            (
                re.fullmatch(rf"{ONE_OF_SEVERAL}|{IMAGE}|{VIDEO}|{OTHER_MEDIA}", name),
                f"{where} has '{key}', which is not read in a turn: expected 'image', "
                f"'images' or 'videos' beside the turns, or parts of that type in its content.",
            ),
            (
                re.fullmatch("toolcalls?|functioncall|reasoningcontent", name),
                f"{where} has '{key}', which is not read: the turn would be trained on without it. "
                f"Write it into the turn's text as the model is to write it, or remove it.",
            ),
        )


def _others(row: Mapping[str, Any], read: Set[str]) -> list[tuple[str, str, Any]]:
    """Return (key, its bare name, value) of what else a row has; a number is no content."""
    return [
        (str(key), re.sub(r"[^a-z0-9]", "", str(key).lower()), value)
        for key, value in row.items()
        if key not in read and is_given(row, key) and not isinstance(value, bool | int | float)
    ]
