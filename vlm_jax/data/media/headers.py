"""Images and videos of a record: headers, patch grids, pixels."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.media.access import Access
from vlm_jax.data.media.images import image_size, read_rgb
from vlm_jax.data.media.processors import ImageProcessor
from vlm_jax.data.media.video import open_video
from vlm_jax.data.media.video_processor import VideoProcessor
from vlm_jax.data.records.record import BadExample, Record, describe
from vlm_jax.errors import UserError
from vlm_jax.models.family import Grid

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

    def tables(self) -> dict[str, np.ndarray]:
        """Return the value of each byte of each channel, float32 [3, 256], of each kind."""
        both = {"image": self.processor, "video": self.video_processor}
        return {kind: one.table for kind, one in both.items() if one is not None}

    def cut(
        self, record: Record, grids: Grids, still: bool = False
    ) -> dict[str, np.ndarray | None]:
        """Return the bytes of all images and of all videos, decoded; None: there is none.

        They are laid out as pixel values are; `tables` says what each of them stands for. still:
        an image's patches are given one frame, which stands for all. Raises `BadExample` where
        pixels are not what the header promised.
        """
        return {
            "image": self._images(record, grids["image"], still),
            "video": self._videos(record, grids),
        }

    def _images(self, record: Record, grids: Sequence[Grid], still: bool) -> np.ndarray | None:
        processor = self.processor
        if not grids or processor is None:
            return None
        cut, start = processor.empty(grids, still), 0
        for number, grid in enumerate(grids):
            end = start + (1 if grid is None else int(np.prod(grid)))
            out = cut[start] if grid is None else cut[start:end]

            def read(source: Any, folder: str | None, out: np.ndarray = out) -> Grid:
                return processor.cut(read_rgb(source, folder, self.access), out)[1]

            self._check(record, "image", number, self._read(record, "image", number, read), grid)
            start = end
        return cut

    def _videos(self, record: Record, grids: Grids) -> np.ndarray | None:
        def read(source: Any, folder: str | None) -> Any:
            processor = self.video_processor
            assert processor is not None
            return processor.cut(open_video(source, folder, self.access, processor.sampling))

        found = []
        for number, grid in enumerate(grids["video"]):
            cut, real = self._read(record, "video", number, read)
            self._check(record, "video", number, real, grid)
            found.append(cut)
        return np.concatenate(found) if found else None

    def _check(self, record: Record, kind: str, number: int, real: Grid, grid: Grid) -> None:
        if real != grid:
            raise BadExample(
                "changed",
                f"{kind.capitalize()} {number} of {describe(record)} decodes to the patch grid "
                f"{real}, but its header promised {grid}: the file is damaged, or was replaced "
                f"since it was measured.",
            )

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
