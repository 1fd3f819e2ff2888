"""Objects and boxes of a record, written in the text format of a model family."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from vlm_jax.data.records.grounding import BOX, REF, UNITS, WORDS, Object
from vlm_jax.data.records.record import BadExample, Record, describe
from vlm_jax.errors import UserError
from vlm_jax.models.family import Grounding


def fill(
    record: Record,
    known: Grounding | None,
    model_type: str,
    tokenizer: Any,
    sizes: Callable[[], Sequence[tuple[int, int]]],
) -> Record:
    """Return a canonical record with its objects written into its texts; most have none.

    known: how the family writes them. sizes: gives the height and width of each image. Raises
    `BadExample` where the family has no format of boxes, and for a box outside its picture.
    """
    if not any("objects" in part for m in record["messages"] for part in m["content"]):
        return record
    sides = sizes()
    try:
        grounding = _grounding(known, model_type, tokenizer)
        messages = [
            {**m, "content": [_filled(part, grounding, sides) for part in m["content"]]}
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
    part: dict[str, Any], grounding: Grounding, sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    if "objects" not in part:
        return part
    written = iter([_written(one, grounding, sizes) for one in part["objects"]])
    return {"type": "text", "text": WORDS.sub(lambda _: next(written), part["text"])}


def _written(one: Object, grounding: Grounding, sizes: Sequence[tuple[int, int]]) -> str:
    if "ref" in one:
        return grounding.ref.format(one["ref"])
    unit, number = UNITS[one["unit"]], one["image"]
    if unit is None and number >= len(sizes):
        raise UserError(
            f"It has a box of image {number} in 'objects', but {len(sizes)} images: a box in "
            f"pixels belongs to one, counted from 0. Give 'image_id', or bbox_type norm1."
        )
    height, width = (unit, unit) if unit else sizes[number]
    written = []
    for box in one["boxes"]:
        sides = [width, height] * (len(box) // 2)
        # As ms-swift computes it, to the rounding.
        values = [round(n / side * grounding.side) for n, side in zip(box, sides, strict=True)]
        if not all(0 <= value <= grounding.side for value in values):
            raise UserError(
                f"It has the box {box} in 'objects', outside of its picture of {width} x "
                f"{height} (bbox_type {one['unit']}). Correct the box, or its bbox_type: pixels "
                f"are 'real', 'norm1' counts to 1, 'norm1000' to 1000."
            )
        points = zip(values[::2], values[1::2], strict=True)
        written.append(grounding.box.format(",".join(f"({x},{y})" for x, y in points)))
    return "".join(written)
