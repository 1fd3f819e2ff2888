"""Objects and boxes of a record, written in the text format of a model family."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from vlm_jax.data.records.grounding import BOX, REF, UNITS, WORDS, Object
from vlm_jax.data.records.record import BadExample, Record, describe
from vlm_jax.errors import UserError
from vlm_jax.models.family import Grounding

Size = tuple[int, int]  # height, width


def has_objects(record: Record) -> bool:
    """Return whether a canonical record has objects that are not written into its texts yet."""
    return any("objects" in part for m in record["messages"] for part in m["content"])


def fill(
    record: Record,
    known: Grounding | None,
    model_type: str,
    tokenizer: Any,
    sizes: Sequence[Size],
    resized: Callable[[], Sequence[Size]],
) -> Record:
    """Return a canonical record with its objects written into its texts; most have none.

    known: how the family writes them. sizes, resized: of the images that objects count, as files
    and as the model sees them. Raises `BadExample` where the family has no format of boxes, and for
    a box outside its picture.
    """
    if not has_objects(record):
        return record
    try:
        grounding = _grounding(known, model_type, tokenizer)
        side = grounding.side
        seen = resized() if side is None else [(side, side)] * len(sizes)
        pictures = list(zip(sizes, seen, strict=True))
        messages = [
            {**m, "content": [_filled(part, grounding, pictures) for part in m["content"]]}
            for m in record["messages"]
        ]
    except UserError as error:
        raise BadExample("record", f"{describe(record)}: {error}") from error
    return {**record, "messages": messages}


def _grounding(known: Grounding | None, model_type: str, tokenizer: Any) -> Grounding:
    if known is None:
        raise UserError(
            f"It has 'objects' and the words '{REF}' or '{BOX}', but how a {model_type} model "
            f"writes objects and boxes is not known. Write them into the texts as the model is to "
            f"write them, and remove 'objects'."
        )
    names = tokenizer.get_added_vocab()
    for name in re.findall(r"<\|\w+\|>", known.ref + known.box):
        if name not in names:
            raise UserError(
                f"Its 'objects' are written with the token {name!r}, which the tokenizer in "
                f"'{tokenizer.name_or_path}' does not have. Copy the checkpoint's own, or write "
                f"the boxes into the texts."
            )
    return known


def _filled(
    part: dict[str, Any], grounding: Grounding, pictures: Sequence[tuple[Size, Size]]
) -> dict[str, Any]:
    if "objects" not in part:
        return part
    written = iter([_written(one, grounding, pictures) for one in part["objects"]])
    return {"type": "text", "text": WORDS.sub(lambda _: next(written), part["text"])}


def _written(one: Object, grounding: Grounding, pictures: Sequence[tuple[Size, Size]]) -> str:
    if "ref" in one:
        return grounding.ref.format(one["ref"])
    unit, side, number = UNITS[one["unit"]], grounding.side, one["image"]
    if None in (unit, side) and number >= len(pictures):
        way = "'image_id', or bbox_type norm1" if side else "'image_id'"
        raise UserError(
            f"It has a box of image {number} in 'objects', but {len(pictures)} images: a box in "
            f"pixels, as it is given or as the model writes it, belongs to one, counted from 0. "
            f"Give {way}."
        )
    file, seen = pictures[number] if None in (unit, side) else ((unit, unit), (side, side))
    height, width = (unit, unit) if unit else file
    written = []
    for box in one["boxes"]:
        points = [
            # As ms-swift computes it, to the rounding.
            (round(x / width * seen[1]), round(y / height * seen[0]))
            for x, y in zip(box[::2], box[1::2], strict=True)
        ]
        if not all(0 <= x <= seen[1] and 0 <= y <= seen[0] for x, y in points):
            raise UserError(
                f"It has the box {box} in 'objects', outside of its picture of {width} x "
                f"{height} (bbox_type {one['unit']}). Correct the box, or its bbox_type: pixels "
                f"are 'real', 'norm1' counts to 1, 'norm1000' to 1000."
            )
        corners = grounding.between.join(grounding.point.format(*point) for point in points)
        written.append(grounding.box.format(corners))
    return "".join(written)
