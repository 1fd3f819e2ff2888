"""The image processor of towers with one input size: CLIP, SigLIP, LLaVA. See `processors`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.data.media.processors import Pixels, picture, value_table
from vlm_jax.errors import UserError, refuse
from vlm_jax.files.limits import IMAGE_PIXELS
from vlm_jax.models.family import Grid


@dataclasses.dataclass(frozen=True)
class Fixed:
    """CLIP, SigLIP and LLaVA: every image becomes one size, uint8 [1, 3, height, width].

    In this order, each where the settings ask for it: pad to a square in the mean colour, resize
    (to `size`, or its shorter side to it), crop the centre, rescale, normalise. What the
    properties and methods give is said at those of `Patches`.
    """

    raw: dict[str, Any]
    table: np.ndarray = dataclasses.field(repr=False, compare=False)
    # Of what has one size there is no other.
    largest = pixels = None
    merged = 1

    @classmethod
    def from_settings(
        cls,
        raw: dict[str, Any],
        min_pixels: int | None,
        max_pixels: int | None,
        image_resolution: int | None,
    ) -> "Fixed":
        size, crop, sides = raw["size"], raw["crop_size"], {"height", "width"}
        if isinstance(size, int):
            edges = ("height", "width") if raw["default_to_square"] else ("shortest_edge",)
            size = dict.fromkeys(edges, size)
        if isinstance(crop, int):
            crop = dict.fromkeys(("height", "width"), crop)
        processor = cls({**raw, "size": size, "crop_size": crop}, value_table(raw))
        resized = {key: value for key, value in size.items() if value}
        cropped = {key: value for key, value in (crop or {}).items() if value}
        resizes, crops = raw["do_resize"], raw["do_center_crop"]
        refuse(
            (
                min_pixels is not None or max_pixels is not None,
                f"min_pixels and max_pixels have no effect on this checkpoint: its image processor "
                f"({raw['image_processor_type']}) gives every image one size. Remove them.",
            ),
            (
                resizes and resized.keys() not in ({"shortest_edge"}, sides),
                f"The image settings have size {size}; expected shortest_edge alone, or height and "
                f"width.",
            ),
            (
                crops and not sides <= cropped.keys(),
                f"The image settings have do_center_crop=true and crop_size {crop}; expected an "
                f"object with height and width.",
            ),
            (
                not crops and not (resizes and resized.keys() == sides),
                f"The image settings (size {size}, no centre crop) leave images of different "
                f"sizes, but the vision tower takes one. Set crop_size, or height and width.",
            ),
            (
                max([*resized.values(), *cropped.values()], default=1) ** 2 > IMAGE_PIXELS,
                f"The image settings have size {size} and crop_size {crop}; a side may have "
                f"{math.isqrt(IMAGE_PIXELS):,} pixels at most.",
            ),
        )
        if image_resolution not in (None, processor.output[0]):
            raise UserError(
                f"data.image_resolution is {image_resolution}, but this checkpoint's vision tower "
                f"takes {processor.output[0]} x {processor.output[1]} pixels only. Remove it."
            )
        return processor

    @property
    def output(self) -> tuple[int, int]:
        """(height, width) that every image becomes."""
        target = self.raw["crop_size"] if self.raw["do_center_crop"] else self.raw["size"]
        return target["height"], target["width"]

    def limited(self, max_pixels: int) -> "Fixed":
        return self

    def grid(self, height: int, width: int) -> Grid:
        if self.raw["do_resize"]:
            self._resized(height, width)  # raises
        return None

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image is resized to, before it is cropped."""
        if self.raw["do_pad"]:
            height = width = max(height, width)
        short = self.raw["size"].get("shortest_edge")
        if not short:
            return self.raw["size"]["height"], self.raw["size"]["width"]
        long = int(short * max(height, width) / min(height, width))
        if long * short > IMAGE_PIXELS:
            raise UserError(
                f"an image of {height} x {width} pixels, resized to {short} on its shorter side, "
                f"would have {long * short:,} pixels; expected at most {IMAGE_PIXELS:,}."
            )
        return (long, short) if width <= height else (short, long)

    def empty(self, grids: Sequence[Grid], still: bool = False) -> np.ndarray:
        return np.empty((len(grids), 3, *self.output), np.uint8)

    def cut(self, pixels: Pixels, out: np.ndarray | None = None) -> tuple[np.ndarray, Grid]:
        raw, image = self.raw, picture(pixels)
        if raw["do_pad"]:
            image = pad_to_square(image, tuple(int(mean * 255) for mean in raw["image_mean"]))
        if raw["do_resize"]:
            image = image.resize(self._resized(image.height, image.width)[::-1], raw["resample"])
        if raw["do_center_crop"]:
            height, width = self.output
            # Cropping rounds down, padding up, as the reference does; what lies outside is black.
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        out = self.empty([None]) if out is None else out
        out[:] = np.asarray(image).transpose(2, 0, 1)
        return out, None

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in self.raw.items() if value is not None}


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Return the image in the middle of a square of `color` as long as its longer side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
