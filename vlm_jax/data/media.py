"""A record's images and videos: their headers, the patch grids they get, their pixel values."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.access import Access
from vlm_jax.data.images import image_size, read_image
from vlm_jax.data.processors import Grid, ImageProcessor
from vlm_jax.data.records import BadExample, Record, describe
from vlm_jax.data.video import open_video
from vlm_jax.data.video_processor import VideoProcessor
from vlm_jax.errors import UserError

KINDS = ("image", "video")
Headers = dict[str, list[Any]]  # (height, width) of each image, the opened `Video` of each video
Grids = dict[str, list[Grid]]


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
        return limits[0], max(limits[1], self.video_processor.patches.max_pixels)

    def limited(self, max_pixels: int | None) -> "Media":
        """Return the media with at most so many pixels an image or frame; None: as they are."""
        if max_pixels is None:
            return self
        image, video = self.processor, self.video_processor
        return dataclasses.replace(
            self,
            processor=image and image.limited(max_pixels),
            video_processor=video and video.limited(max_pixels),
        )

    def headers(self, record: Record) -> Headers:
        """Return what the files' headers tell; no pixel is decoded."""

        def film(source: Any, folder: str | None) -> Any:
            assert self.video_processor is not None
            return open_video(source, folder, self.access, self.video_processor.sampling)

        return {
            "image": self._each(record, "image", lambda s, f: image_size(s, f, self.access)),
            "video": self._each(record, "video", film),
        }

    def grids(self, record: Record, headers: Headers) -> Grids:
        """Return the patch grid of each image and video."""

        def image(number: int, *_: Any) -> Grid:
            assert self.processor is not None
            return self.processor.grid(*headers["image"][number])

        def video(number: int, *_: Any) -> Grid:
            assert self.video_processor is not None
            return self.video_processor.grid(headers["video"][number])

        return {
            kind: [
                self._read(record, kind, n, lambda *_, n=n, grid=grid: grid(n))
                for n in range(len(headers[kind]))
            ]
            for kind, grid in (("image", image), ("video", video))
        }

    def values(self, record: Record, grids: Grids) -> dict[str, np.ndarray | None]:
        """Return the pixel values of all images and of all videos, decoded; None: there is none.

        Raises `BadExample` where pixels are not what the header promised.
        """

        def image(source: Any, folder: str | None) -> Any:
            assert self.processor is not None
            return self.processor(read_image(source, folder, self.access))

        def video(source: Any, folder: str | None) -> Any:
            processor = self.video_processor
            assert processor is not None
            return processor(open_video(source, folder, self.access, processor.sampling))

        found: dict[str, np.ndarray | None] = {}
        for kind, read in (("image", image), ("video", video)):
            pairs = self._each(record, kind, read)
            for number, ((_, real), grid) in enumerate(zip(pairs, grids[kind], strict=True)):
                if real != grid:
                    raise BadExample(
                        "changed",
                        f"{kind.capitalize()} {number} of {describe(record)} decodes to the patch "
                        f"grid {real}, but its header promised {grid}: the file is damaged, or was "
                        f"replaced since it was measured.",
                    )
            found[kind] = _stack([value for value, _ in pairs], grids[kind])
        return found

    def _each(self, record: Record, kind: str, read: Callable[..., Any]) -> list[Any]:
        return [self._read(record, kind, i, read) for i in range(len(record[f"{kind}s"]))]

    def _read(self, record: Record, kind: str, number: int, read: Callable[..., Any]) -> Any:
        """Return `read(source, folder)` of one image or video; errors name record and number."""
        source = record[f"{kind}s"][number]
        if kind == "video" and not self.takes_video:
            raise BadExample(
                "video",
                f"{describe(record)} has a video, but '{self.directory}' is a {self.model_type} "
                f"model, which takes images only. Train a Qwen2-VL, or give single frames as "
                f"images.",
            )
        if (self.processor if kind == "image" else self.video_processor) is None:
            files = "preprocessor_config.json, or processor_config.json with 'image_processor'"
            raise UserError(
                f"{describe(record)} has {kind}s, but '{self.directory}' has no {kind} settings "
                f"({files}). Copy the file of the checkpoint there."
            )
        try:
            return read(source, record["folder"] or self.folder)
        except UserError as error:
            name = (
                f" '{source}'" if isinstance(source, str | Path) and len(str(source)) < 300 else ""
            )
            raise BadExample(
                kind, f"{kind.capitalize()} {number}{name} of {describe(record)}: {error}"
            ) from error


def _stack(values: Sequence[np.ndarray], grids: Sequence[Grid]) -> np.ndarray | None:
    if not values:
        return None
    return np.stack(values) if grids[0] is None else np.concatenate(values)
