"""Image processors equal to the checkpoints' own, with numpy and Pillow alone.

Bit for bit what transformers' PIL processors return. Letters: P patches, C values a patch
(channels x frames x patch x patch).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.errors import UserError, refuse
from vlm_jax.files.limits import IMAGE_PIXELS
from vlm_jax.models.family import Grid

Pixels = np.ndarray | Image.Image  # RGB, uint8 [H, W, 3]


def value_table(raw: Mapping[str, Any]) -> np.ndarray:
    """Return float32 [3, 256]: what each 8-bit value of each channel becomes.

    The reference multiplies in float64, rounds to float32, then subtracts and divides in
    float32; every pixel is one of 256 values, so doing it once per value is the same numbers.
    """
    values = np.arange(256).astype(np.float64) * (raw["rescale_factor"] if raw["do_rescale"] else 1)
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if raw["do_normalize"]:
        mean, std = (
            np.broadcast_to(np.array(raw[key], np.float32), (3,))[:, None]
            for key in ("image_mean", "image_std")
        )
        table = (table - mean) / std
    return table


def look_up(table: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return the float32 values of uint8 [N, C] or [N, channels, ...]; C begins with channels."""
    channels = pixels.reshape(len(pixels), len(table), -1)
    values = np.empty(channels.shape, np.float32)
    for channel, own in enumerate(table):
        values[:, channel] = own.take(channels[:, channel])
    return values.reshape(pixels.shape)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the (height, width) that Qwen2-VL resizes to: multiples of `factor`, the aspect ratio
    nearly kept, the area within [min_pixels, max_pixels] (https://arxiv.org/abs/2409.12191, §2.1).

    Raises `UserError` for an aspect ratio above 200, as the reference does.
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(
            f"an image of {height} x {width} pixels is longer than 200 times its width."
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def picture(pixels: Pixels) -> Image.Image:
    """Return the image as Pillow's, which copies an array."""
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


@dataclasses.dataclass(frozen=True)
class Patches:
    """Qwen2-VL: resize to multiples of merge x patch, then cut into patches in merge blocks.

    Cuts uint8 [P, C] and the grid (1, height, width) in patches; a still image fills all
    `temporal_patch_size` frames of its patch. table: float32 [3, 256], the value of each byte of
    each channel, see `value_table`.
    """

    raw: dict[str, Any]
    min_pixels: int
    max_pixels: int
    table: np.ndarray = dataclasses.field(repr=False, compare=False)

    @classmethod
    def from_settings(
        cls,
        raw: dict[str, Any],
        min_pixels: int | None,
        max_pixels: int | None,
        image_resolution: int | None,
    ) -> "Patches":
        size = raw["size"] or {}
        if not isinstance(size, Mapping) or any(
            size[key]
            for key in size.keys() - {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}
        ):
            raise UserError(
                f"The image settings have size={size!r}, but {raw['image_processor_type']} keeps "
                f"each image's aspect ratio. Give the least and the largest area in pixels: "
                f"min_pixels and max_pixels, or size with shortest_edge and longest_edge."
            )
        low, high = (
            given or raw[key] or size.get(edge) or size.get(key) or default
            for given, key, edge, default in (
                (min_pixels, "min_pixels", "shortest_edge", 56 * 56),
                (max_pixels, "max_pixels", "longest_edge", 28 * 28 * 1280),
            )
        )
        factor = raw["patch_size"] * raw["merge_size"]
        refuse(
            (
                not raw["do_resize"],
                "The image settings have do_resize=false, which no patch grid allows.",
            ),
            (
                high < low or high < factor * factor,
                f"The image settings allow {low} to {high} pixels: max_pixels must be at least "
                f"min_pixels and at least one token's {factor * factor} pixels.",
            ),
        )
        if image_resolution is not None:  # limits alone, since a served image knows no more
            low = high = (max(1, round(image_resolution / factor)) * factor) ** 2
        if low > IMAGE_PIXELS:
            raise UserError(
                f"Each image is to be enlarged to at least {low:,} pixels, by the image settings "
                f"(preprocessor_config.json), data.min_pixels or data.image_resolution; expected "
                f"at most {IMAGE_PIXELS:,}."
            )
        return cls(raw, int(low), int(high), value_table(raw))

    @property
    def merged(self) -> int:
        """How many neighbouring patches follow each other, to become one image feature."""
        return self.raw["merge_size"] ** 2

    @property
    def largest(self) -> int:
        """The most patches an image may have; None where all have one size."""
        # Enlarging to min_pixels rounds both sides up, which may end above max_pixels.
        merge = self.raw["merge_size"]
        least = self.min_pixels / (self.raw["patch_size"] * merge) ** 2
        enlarged = max(
            long * (math.floor(least / (long - 1)) + 1)
            for long in range(
                max(1, math.floor(math.sqrt(least))) + 1, math.ceil(math.sqrt(200 * least)) + 2
            )
        )
        return max(self.max_pixels // self.raw["patch_size"] ** 2, enlarged * merge**2)

    @property
    def pixels(self) -> tuple[int, int]:
        """The least and most pixels an image may get; None where all have one size."""
        return self.min_pixels, self.max_pixels

    def limited(self, max_pixels: int) -> "Patches":
        """Return the processor with a lower most, as far as its least allows."""
        return dataclasses.replace(
            self, max_pixels=max(self.min_pixels, min(self.max_pixels, max_pixels))
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) in pixels that an image of this size is resized to."""
        factor = self.raw["patch_size"] * self.raw["merge_size"]
        return smart_resize(height, width, factor, self.min_pixels, self.max_pixels)

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (frames, height, width) in patches of an image of this size; None if fixed."""
        new_height, new_width = self.size(height, width)
        return 1, new_height // self.raw["patch_size"], new_width // self.raw["patch_size"]

    def empty(self, grids: Sequence[Grid], still: bool = False) -> np.ndarray:
        """Return room for the bytes of images of these grids; still: for one frame of each."""
        count = sum(int(np.prod(grid)) for grid in grids if grid is not None)
        frames = 1 if still else self.raw["temporal_patch_size"]
        return np.empty((count, 3 * frames * self.raw["patch_size"] ** 2), np.uint8)

    def cut(self, pixels: Pixels, out: np.ndarray | None = None) -> tuple[np.ndarray, Grid]:
        """Return (bytes uint8, grid) of an RGB image, laid out as its values are.

        out: where the bytes are written, a part of `empty`; where the grid does not fit it,
        nothing is.
        """
        pixels = picture(pixels)
        grid, patch = self.grid(pixels.height, pixels.width), self.raw["patch_size"]
        out = self.empty([grid]) if out is None else out
        if len(out) == grid[1] * grid[2]:
            frames = out.reshape(len(out), 3, -1, patch**2)
            self.frame(pixels, (grid[1] * patch, grid[2] * patch), frames[:, :, 0])
            frames[:, :, 1:] = frames[:, :, :1]
        return out, grid

    def frame(self, pixels: Pixels, size: tuple[int, int], out: np.ndarray) -> None:
        """Write an image resized to `size` into `out` uint8 [P, 3, patch x patch], in merge blocks.

        The last axis of `out` is contiguous. A line of a patch moves as one item: numpy moves
        single bytes several times slower.
        """
        patch, merge = self.raw["patch_size"], self.raw["merge_size"]
        h, w = size[0] // patch // merge, size[1] // patch // merge
        lines = out.view(f"V{patch}").reshape(h, w, merge, merge, 3, patch)
        bands = picture(pixels).resize(size[::-1], resample=self.raw["resample"]).split()
        for channel, band in enumerate(bands):
            own = np.frombuffer(band.tobytes(), f"V{patch}").reshape(h, merge, patch, w, merge)
            lines[:, :, :, :, channel] = own.transpose(0, 3, 1, 4, 2)

    def settings(self) -> dict[str, Any]:
        """Return what `preprocessor_config.json` must hold to serve images the same way."""
        limits = {  # in both spellings: 4.x reads the first two, 5.x the last
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
        }
        return {
            **{k: v for k, v in self.raw.items() if v is not None and k not in limits},
            **limits,
        }
