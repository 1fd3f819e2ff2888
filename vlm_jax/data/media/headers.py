"""Images and videos of a record: headers, patch grids, pixels."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from vlm_jax.data.media.access import Access, quoted
from vlm_jax.data.media.image_settings import ImageProcessor
from vlm_jax.data.media.images import image_size, read_rgb
from vlm_jax.data.media.video import open_video
from vlm_jax.data.media.video_processor import VideoProcessor
from vlm_jax.data.records.record import BadExample, Record, describe
from vlm_jax.errors import UserError
from vlm_jax.models.family import Grid

KINDS = ("image", "video")
Headers = dict[str, list[Any]]  # (height, width) of each image, the opened `Video` of each video
Grids = dict[str, list[Grid]]
Source = tuple[Any, str | None, Access]  # with the folder of relative paths


@dataclasses.dataclass(frozen=True)
class Media:
    """What a checkpoint's processors make of a record's images and videos.

    directory, model_type: for errors. processor, video_processor: None where the checkpoint has no
    settings for them. folder: the media root of records that have none of their own.
    """

    directory: str
    model_type: str
    takes_video: bool
    processor: ImageProcessor | None
    video_processor: VideoProcessor | None
    access: Access
    folder: str | None

    @property
    def pixels(self) -> tuple[int, int] | None:
        """The least and most pixels an image or frame may get; None where they cannot change."""
        limits = None if self.processor is None else self.processor.pixels
        if limits is None or self.video_processor is None:
            return limits
        film = self.video_processor
        return min(limits[0], film.least), max(limits[1], film.patches.max_pixels)

    def limited(self, max_pixels: int | None) -> "Media":
        """Return the media with at most so many pixels an image or frame; None: as they are."""
        if max_pixels is None:
            return self
        return dataclasses.replace(
            self,
            processor=self.processor and self.processor.limited(max_pixels),
            video_processor=self.video_processor and self.video_processor.limited(max_pixels),
        )

    def headers(self, record: Record) -> Headers:
        """Return what the files' headers tell; no pixel is decoded."""
        return {
            "image": self._each(record, "image", lambda processor, n, file: image_size(*file)),
            "video": self._each(
                record, "video", lambda processor, n, file: open_video(*file, processor.sampling)
            ),
        }

    def grids(self, record: Record, headers: Headers) -> Grids:
        """Return the patch grid of each image and video."""
        sizes, films = headers["image"], headers["video"]
        return {
            "image": self._each(
                record, "image", lambda processor, n, file: processor.grid(*sizes[n])
            ),
            "video": self._each(
                record, "video", lambda processor, n, file: processor.grid(films[n])
            ),
        }

    def sizes(self, record: Record, headers: Headers) -> list[tuple[int, int]]:
        """Return the (height, width) in pixels that each image is resized to."""
        sizes = headers["image"]
        return self._each(record, "image", lambda processor, n, file: processor.size(*sizes[n]))

    def tables(self) -> dict[str, np.ndarray]:
        """Return the value of each byte of each channel, float32 [3, 256], of each kind."""
        return {
            kind: one.table
            for kind, one in zip(KINDS, (self.processor, self.video_processor), strict=True)
            if one is not None
        }

    def cut(
        self, record: Record, grids: Grids, still: bool = False
    ) -> dict[str, np.ndarray | None]:
        """Return the bytes of all images and of all videos, decoded; None: there is none.

        They are laid out as pixel values are; `tables` says what each of them stands for. still:
        an image's patches are given one frame, which stands for all. Raises `BadExample` where
        pixels are not what the header promised.
        """
        images: np.ndarray | None = None
        parts: list[np.ndarray] = []
        if grids["image"] and self.processor is not None:
            images = self.processor.empty(grids["image"], still)
            sizes = [1 if grid is None else math.prod(grid) for grid in grids["image"]]
            parts = np.split(images, np.cumsum(sizes)[:-1])
        decoded = {
            "image": self._each(
                record, "image", lambda image, n, file: image.cut(read_rgb(*file), parts[n])
            ),
            "video": self._each(
                record,
                "video",
                lambda video, n, file: video.cut(open_video(*file, video.sampling)),
            ),
        }
        for kind, found in decoded.items():
            for number, ((_, real), grid) in enumerate(zip(found, grids[kind], strict=True)):
                if real != grid:
                    raise BadExample(
                        "changed",
                        f"{kind.capitalize()} {number} of {describe(record)} decodes to the patch "
                        f"grid {real}, but its header promised {grid}: the file is damaged, or was "
                        f"replaced since it was measured.",
                    )
        films = [cut for cut, _ in decoded["video"]]
        return {"image": images, "video": np.concatenate(films) if films else None}

    def _each(
        self, record: Record, kind: str, read: Callable[[Any, int, Source], Any]
    ) -> list[Any]:
        """Return `read(processor, number, (source, folder, access))` of each image or video.

        Errors name record and number.
        """
        sources = record[f"{kind}s"]
        processor = self.processor if kind == "image" else self.video_processor
        if sources and kind == "video" and not self.takes_video:
            raise BadExample(
                "video",
                f"{describe(record)} has a video, but '{self.directory}' is a {self.model_type} "
                f"model, which takes images only. Train a Qwen model, or give single frames as "
                f"images.",
            )
        if sources and processor is None:
            raise UserError(
                f"{describe(record)} has {kind}s, but '{self.directory}' has no {kind} settings "
                f"(preprocessor_config.json, or processor_config.json with 'image_processor'). "
                f"Copy the file of the checkpoint there."
            )
        found = []
        for number, source in enumerate(sources):
            try:
                file = source, record["folder"] or self.folder, self.access
                found.append(read(processor, number, file))
            except UserError as error:
                raise BadExample(
                    kind,
                    f"{kind.capitalize()} {number}{quoted(source)} of {describe(record)}: {error}",
                ) from error
        return found
