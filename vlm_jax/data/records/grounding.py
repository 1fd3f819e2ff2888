"""ms-swift's grounding format: `<ref-object>` and `<bbox>` in texts, and their `objects`.

A text part of a canonical record that has such words keeps them, with their values in order:
    {"type": "text", "text": "<ref-object> at <bbox>",
     "objects": [{"ref": str}, {"boxes": [[x, y, ...]], "unit": str, "image": int}]}
What they become is the model family's, and boxes in pixels need the size of their picture:
`data.boxes` fills them in where both are known.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.errors import UserError, nearest

REF, BOX = "<ref-object>", "<bbox>"
WORDS = re.compile(f"{REF}|{BOX}")
# bbox_type, in the newer and the older form -> what one is of the picture's width or height.
UNITS = {"real": None, "norm1": 1, "norm_1": 1, "norm1000": 1000, "norm_1000": 1000}
NEWER, OLDER = {"ref", "bbox", "bbox_type", "image_id"}, {"caption", "bbox", "bbox_type", "image"}
Object = dict[str, Any]
FORM = (
    'expected {"ref": [texts], "bbox": [[x, y] or [x1, y1, x2, y2]], "bbox_type", "image_id"}, or '
    'the older list of {"caption", "bbox", "bbox_type", "image"}'
)


def place_objects(messages: Sequence[dict[str, Any]], given: Any, where: str) -> None:
    """Give the text parts of messages the objects that their words stand for, in order.

    given: a row's `objects`. Without it, and without such words beside annotations of another
    kind, nothing is done. Raises `UserError` where words and objects do not pair up.
    """
    parts = [p for m in messages for p in m["content"] if p["type"] == "text"]
    words = [word for part in parts for word in WORDS.findall(part["text"])]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = given if words else None  # a column of texts
    if not given or not (words or _is_newer(given) or _is_older(given)):
        return
    refs, boxes = _read(given, f"{where} has 'objects'")
    for word, found in ((REF, refs), (BOX, boxes)):
        count = words.count(word)
        # In the older form, a list, an object has both, and texts may use either.
        if count != len(found) and not (words and count == 0 and not isinstance(given, Mapping)):
            raise UserError(
                f"{where} has {len(found)} of what '{word}' stands for in 'objects', but its texts "
                f"have {count} of that word. There must be one for each; remove from 'objects' "
                f"what no word stands for."
            )
    rest = {REF: iter(refs), BOX: iter(boxes)}
    for part in parts:
        if found := WORDS.findall(part["text"]):
            part["objects"] = [next(rest[str(word)]) for word in found]


def _is_newer(given: Any) -> bool:
    return isinstance(given, Mapping) and given.keys() <= NEWER


def _is_older(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(
        isinstance(one, Mapping) and "bbox" in one and one.keys() <= OLDER for one in given
    )


def _read(given: Any, where: str) -> tuple[list[Object], list[Object]]:
    """Return what each `<ref-object>` and each `<bbox>` stands for."""
    if _is_newer(given):
        refs, boxes = given.get("ref") or [], given.get("bbox") or []
        images = given.get("image_id") or [0] * len(boxes)
        kinds = [given.get("bbox_type")] * len(boxes)
        lists = all(isinstance(one, list | tuple) for one in (refs, boxes, images))
        if lists and len(images) != len(boxes):
            raise UserError(
                f"{where} with {len(boxes)} in 'bbox' and {len(images)} in 'image_id': there must "
                f"be one for each."
            )
    elif _is_older(given):
        lists, refs = True, [one.get("caption") for one in given]
        boxes, images = [one["bbox"] for one in given], [one.get("image") or 0 for one in given]
        kinds = [one.get("bbox_type") for one in given]
    else:
        lists = False
    if not lists or not all(isinstance(ref, str) for ref in refs):
        raise UserError(f"{where}, which is {given!r:.120}; {FORM}.")
    made = []
    for box, kind, image in zip(boxes, kinds, images, strict=True):
        several = box if box and all(isinstance(one, list | tuple) for one in box) else [box]
        kind = kind or "real"
        if kind not in UNITS:
            raise UserError(
                f"{where} with the bbox_type {kind!r}{nearest(kind, UNITS)}; expected one of "
                f"{', '.join(UNITS)}."
            )
        if not all(map(_is_box, several)) or type(image) is not int or image < 0:
            raise UserError(f"{where} with the box {box!r:.80} (image {image!r}); {FORM}.")
        made.append({"boxes": list(map(_sorted, several)), "unit": kind, "image": image})
    return [{"ref": ref} for ref in refs], made


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list | tuple)
        and len(box) in (2, 4)
        and all(type(n) in (int, float) and math.isfinite(n) for n in box)
    )


def _sorted(box: Sequence[float]) -> list[float]:
    """Return a box with its upper left corner first, or a point as it is."""
    return [n for point in zip(sorted(box[::2]), sorted(box[1::2]), strict=True) for n in point]
