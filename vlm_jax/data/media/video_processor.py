"""A checkpoint's video settings, and patches of frames.

Resizing is Pillow's, frame by frame, as for images: the reference resizes by torchvision, whose
bicubic filter differs from Pillow's in the last bit of some values. Sizes, order and numbers are
those of transformers' `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.media.frame_sampling import Sampling, Video
from vlm_jax.data.media.image_settings import (
    IGNORED,
    IMAGE_FILES,
    PROCESSORS,
    check_keys,
    make_processor,
    read_first,
)
from vlm_jax.data.media.processors import Patches, smart_resize
from vlm_jax.errors import UserError, nearest, refuse
from vlm_jax.files.limits import number

FILES = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", ""),
)
IMAGE_NAME = "Qwen2VLImageProcessor"


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one video processor differs from the others.

    defaults: what a file may leave out. together: whether sizes bound the pixels of all frames, not
    of each. whole: see `Sampling`.
    """

    defaults: dict[str, Any]
    together: bool
    whole: bool


KINDS = {
    "Qwen2VLVideoProcessor": Kind(
        {
            "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
            "max_video_tokens": 128000,
        },
        together=False,
        whole=True,
    ),
    "Qwen3VLVideoProcessor": Kind(
        {
            "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
            "patch_size": 16,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_video_tokens": 768,
        },
        together=True,
        whole=False,
    ),
}
OWN: dict[str, Any] = {  # settings that images do not have
    "fps": None,
    "num_frames": None,
    "min_frames": 4,
    "max_frames": 768,
    "do_sample_frames": False,  # here frames are always sampled, as Qwen's utilities do first
    "cap_pixels_per_frame": None,
    "max_video_tokens": None,
}
NO_EFFECT = IGNORED | {"video_processor_type", "return_metadata", "video_metadata"}


@dataclasses.dataclass(frozen=True)
class VideoProcessor:
    """Frames to uint8 [P, C] and (frames, height, width) in patches.

    patches: how one frame is cut. sampling: which frames, where a record does not say.
    cap: whether all frames share `max_video_tokens`, so that many frames become small ones; of
    bounds on all frames: whether one has at most so many. name: a key of `KINDS`. each: the least
    and most pixels of a frame beside such bounds, None where nothing asks for any.
    """

    patches: Patches
    sampling: Sampling
    cap: bool
    max_video_tokens: int
    name: str
    each: tuple[int | None, int | None] = (None, None)
    limit: float = math.inf  # pixels of a frame, as far as the least allows

    def limited(self, max_pixels: int) -> "VideoProcessor":
        """Return the processor whose frames have at most so many pixels, or their least."""
        return dataclasses.replace(self, limit=max_pixels)

    def size(self, video: Video) -> tuple[int, int]:
        """Return the (height, width) in pixels that the video's frames are resized to."""
        raw = self.patches.raw
        factor = raw["patch_size"] * raw["merge_size"]
        if KINDS[self.name].together:
            return self._size_together(video, factor)
        least = video.pixels.get("min_pixels", self.patches.min_pixels)
        most = video.pixels.get("max_pixels", self.patches.max_pixels)
        if most < max(least, factor * factor):
            raise UserError(
                f"a frame may have {least} to {most} pixels: max_pixels must be at least "
                f"min_pixels and one token's {factor * factor} pixels."
            )
        if self.cap:
            budget = int(self.max_video_tokens * factor * factor * 0.9)
            share = budget * raw["temporal_patch_size"] // video.count
            most = max(min(most, share), int(least * 1.05))
        most = max(least, factor * factor, min(most, self.limit))
        return smart_resize(video.height, video.width, factor, least, int(most))

    def _size_together(self, video: Video, factor: int) -> tuple[int, int]:
        """By bounds on the pixels of all frames, and those of one that a record or option sets."""
        frames, cell = video.count, factor * factor
        least: float = self.patches.min_pixels
        most: float = self.patches.max_pixels
        if self.cap:
            share = max(min(self.max_video_tokens * cell, most // frames), int(least * 1.05))
            most = share * frames
        low = video.pixels.get("min_pixels", self.each[0])
        high = video.pixels.get("max_pixels", self.each[1])
        refuse(
            (
                high is not None and high < max(low or 0, cell),
                f"a frame may have {low or 0} to {high} pixels: max_pixels must be at least "
                f"min_pixels and one token's {cell} pixels.",
            ),
            (
                (low or 0) * frames > most,
                f"its {frames} frames of {low} pixels or more would have more than the {most:.0f} "
                f"that the video settings allow all together: lower min_pixels, or take fewer.",
            ),
        )
        least = least if low is None else low * frames
        most = min(most, (math.inf if high is None else high) * frames, self.limit * frames)
        most = max(most, cell * frames)
        return fit_together(
            frames, video.height, video.width, self.sampling.factor, factor,
            int(min(least, most)), int(most),
        )  # fmt: skip

    def grid(self, video: Video) -> tuple[int, int, int]:
        """Return (frames, height, width) in patches, from the header alone."""
        height, width = self.size(video)
        patch, frames = self.patches.raw["patch_size"], self.sampling.factor
        return -(-video.count // frames), height // patch, width // patch

    @property
    def least(self) -> int:
        """The least pixels a frame may be made to have, whose record sets nothing itself."""
        raw = self.patches.raw
        cell = int(raw["patch_size"] * raw["merge_size"]) ** 2
        return (
            max(self.each[0] or 0, cell) if KINDS[self.name].together else self.patches.min_pixels
        )

    @property
    def largest(self) -> int:
        """The most patches a video may have whose record sets nothing itself."""
        depth = -(-self.sampling.max_frames // self.sampling.factor)
        if KINDS[self.name].together:
            return max(self.patches.largest, depth * self.patches.raw["merge_size"] ** 2)
        return depth * self.patches.largest

    def settings(self) -> dict[str, Any]:
        """Return the `video_preprocessor_config.json` that serves videos as they are cut here."""
        sampling, frame = self.sampling, self.patches.settings()
        count = {"num_frames": sampling.nframes} if sampling.nframes else {"fps": sampling.fps}
        return {
            **{key: value for key, value in frame.items() if key != "image_processor_type"},
            "video_processor_type": self.name,
            **count,
            "min_frames": sampling.min_frames,
            "max_frames": sampling.max_frames,
            "cap_pixels_per_frame": self.cap,
            "max_video_tokens": self.max_video_tokens,
        }

    @property
    def table(self) -> np.ndarray:
        """float32 [3, 256]: the value of each byte of each channel."""
        return self.patches.table

    def cut(self, video: Video) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Return (bytes uint8 [P, C], grid); frames are decoded, resized and let go one by one.

        The last frame is repeated where their number is not a multiple of a patch's frames.
        """
        raw, depth, number = self.patches.raw, self.sampling.factor, -1
        size, grid = self.size(video), self.grid(video)
        cut = np.empty((grid[0], grid[1] * grid[2], 3, depth, raw["patch_size"] ** 2), np.uint8)
        for number, frame in enumerate(video.frames()):
            self.patches.frame(frame, size, cut[number // depth, :, :, number % depth])
        if number + 1 != video.count:
            raise UserError(f"it has {number + 1} frames, but {video.count} were expected.")
        last = number % depth
        cut[-1, :, :, last + 1 :] = cut[-1, :, :, last : last + 1]
        return cut.reshape(int(np.prod(grid)), -1), grid


def fit_together(
    frames: int, height: int, width: int, depth: int, factor: int, least: int, most: int
) -> tuple[int, int]:
    """Return the (height, width) in pixels, multiples of `factor`, of frames with a bound on all.

    depth: the frames of one patch, of which a multiple counts. `smart_resize` of transformers'
    `Qwen3VLVideoProcessor`. Raises `UserError` for fewer frames than that, and for sides that
    differ more than 200 times.
    """
    if frames < depth:
        raise UserError(f"it has {frames} frame, and a patch holds {depth}: give {depth} or more.")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise UserError(
            f"a frame has {width} x {height} pixels: one side is more than 200 times the other."
        )
    high, wide = (round(side / factor) * factor for side in (height, width))
    count = round(frames / depth) * depth
    if count * high * wide > most:
        shrink = math.sqrt(frames * height * width / most)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if count * high * wide < least:
        grow = math.sqrt(least / (frames * height * width))
        return (
            math.ceil(height * grow / factor) * factor,
            math.ceil(width * grow / factor) * factor,
        )
    return high, wide


def read_video_settings(*directories: str | Path) -> dict[str, Any] | None:
    """Return the video settings of the first directory that has some, or None.

    `processor_config.json` with "video_processor" comes before `video_preprocessor_config.json`;
    where no directory has either, the image settings hold for video too, as in transformers.
    """
    return read_first(directories, FILES) or read_first(directories, IMAGE_FILES)


def make_video_processor(
    raw: Mapping[str, Any],
    *,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    default: str = "Qwen2VLVideoProcessor",
) -> VideoProcessor:
    """Return the video processor that settings describe; arguments replace what they say.

    min_pixels, max_pixels: of a frame. default: the kind where the settings are those of images.
    Raises `UserError` for an unknown type or key.
    """
    named = raw.get("video_processor_type") or raw.get("image_processor_type")
    name = str(named or "").removesuffix("Fast").removesuffix("Pil")
    own_kind = name in KINDS
    if not own_kind and name != IMAGE_NAME:
        raise UserError(
            f"The video settings have the type {named!r}, which is not supported"
            f"{nearest(name, KINDS)}. Supported: {', '.join(KINDS)}."
        )
    name = name if own_kind else default
    kind, cut = KINDS[name], PROCESSORS[IMAGE_NAME][1]
    check_keys("video", raw, name, [*cut, *OWN], NO_EFFECT)
    frames = {key: raw[key] for key in cut if raw.get(key) is not None}
    if own_kind or kind.together:
        left_out = {key: value for key, value in kind.defaults.items() if key in cut}
        frames = {
            **left_out,
            **frames,
            "size": {**kind.defaults["size"], **frames.get("size", {})},
        }
    processor = make_processor(
        {**frames, "image_processor_type": IMAGE_NAME},
        min_pixels=None if kind.together else min_pixels,
        max_pixels=None if kind.together else max_pixels,
    )
    assert isinstance(processor, Patches)
    defaults = {key: value for key, value in kind.defaults.items() if key in OWN}
    own = {**OWN, **defaults, **{key: raw[key] for key in OWN if raw.get(key) is not None}}
    numbers = ("fps", "num_frames", "min_frames", "max_frames", "max_video_tokens")
    for key, value in ((key, own[key]) for key in numbers if own[key] is not None):
        if not (isinstance(value, int | float) and value > 0):
            raise UserError(f"The video settings have {key}={value!r:.80}; expected a number > 0.")
        number(key, value, "file of video settings")
    sampling = Sampling(
        fps=float(fps or own["fps"] or Sampling.fps),
        min_frames=min_frames or own["min_frames"],
        max_frames=max_frames or own["max_frames"],
        nframes=None if fps else own["num_frames"],
        factor=processor.raw["temporal_patch_size"],
        whole=kind.whole,
    )
    if sampling.max_frames < max(sampling.min_frames, sampling.factor):
        raise UserError(
            f"A video may have {sampling.min_frames} to {sampling.max_frames} frames: "
            f"data.video_max_frames must be at least data.video_min_frames and {sampling.factor}."
        )
    cap, most = bool(own["cap_pixels_per_frame"]), own["max_video_tokens"]
    each = (min_pixels, max_pixels) if kind.together else (None, None)
    return VideoProcessor(processor, sampling, cap, most, name, each)
