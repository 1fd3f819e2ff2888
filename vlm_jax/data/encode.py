"""One record into the arrays of one example, by the files of a checkpoint directory."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.batch import Batch, Example
from vlm_jax.data.access import MAX_IMAGE_PIXELS, Access
from vlm_jax.data.chat import TRAIN_ON, Chat
from vlm_jax.data.image_settings import make_processor, read_settings
from vlm_jax.data.images import image_size, read_image
from vlm_jax.data.processors import Grid, ImageProcessor
from vlm_jax.data.records import Record, canonical
from vlm_jax.data.video import open_video
from vlm_jax.data.video_processor import (
    VideoProcessor,
    make_video_processor,
    read_video_settings,
)
from vlm_jax.errors import UserError
from vlm_jax.model import from_config

ON_BAD_EXAMPLE = ("raise", "skip")


class BadExample(UserError):
    """An example that cannot be trained on; `reason` is a key of the report's counts."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Size:
    """What an example takes of a row: tokens, patches; and how many tokens carry loss."""

    tokens: int
    patches: int
    answers: int


class Encoder:
    """Everything of a checkpoint directory that turns records into examples; thread-safe.

    directory: holds config.json, tokenizer and chat template, and image settings where records
        have images.
    max_seq_length: the most tokens an example may have, image placeholders included; None: any.
    min_pixels, max_pixels: replace the checkpoint's limits (dynamic resolution).
    image_resolution: give every image about the pixels of a square of this side instead, see
        `make_processor`; 0 or None: not set.
    train_on: "all" assistant turns carry loss, or the "last" one.
    on_bad_example: what the pipeline does about an unreadable example: "raise" or "skip".
    image_folder: the media root, where relative paths of images and videos start, where the record
        does not say.
    max_image_pixels, allow_absolute_paths, allow_urls: what may be read, see `Access`.
    video_fps, video_min_frames, video_max_frames, video_min_pixels, video_max_pixels: which frames
        of a video are taken and the pixels of each; None: the checkpoint's settings.
    Raises `UserError` where a file is missing or an option cannot be met.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        max_seq_length: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_resolution: int | None = None,
        train_on: str = "all",
        on_bad_example: str = "raise",
        image_folder: str | Path | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        allow_absolute_paths: bool = False,
        allow_urls: bool = False,
        video_fps: float | None = None,
        video_min_frames: int | None = None,
        video_max_frames: int | None = None,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
    ):
        for name, value, known in (
            ("train_on", train_on, TRAIN_ON),
            ("on_bad_example", on_bad_example, ON_BAD_EXAMPLE),
        ):
            if value not in known:
                raise UserError(f"data.{name} is {value!r}; expected one of {', '.join(known)}.")
        path = Path(directory, "config.json")
        if not path.is_file():
            raise UserError(
                f"'{directory}' is no checkpoint directory: it has no config.json. Expected the "
                f"local directory of a Hugging Face checkpoint."
            )
        try:
            self.model = from_config(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise UserError(f"'{path}' is not JSON: line {error.lineno}, {error.msg}.") from error
        self.directory = str(directory)
        self.max_seq_length = max_seq_length
        self.train_on, self.on_bad_example = train_on, on_bad_example
        self.image_folder = None if image_folder is None else str(image_folder)
        config = self.model.config
        self.chat = Chat(directory, config.image_token_id, config.video_token_id)
        settings = read_settings(directory)
        self.processor: ImageProcessor | None = None
        if settings is not None:
            self.processor = make_processor(
                settings,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                image_resolution=image_resolution or None,
            )
            self._check_processor(self.processor)
        self.access = Access(allow_absolute_paths, allow_urls, max_image_pixels)
        self.video_processor: VideoProcessor | None = None
        settings = read_video_settings(directory)
        if config.video_token_id is not None and settings is not None:
            self.video_processor = make_video_processor(
                settings,
                fps=video_fps,
                min_frames=video_min_frames,
                max_frames=video_max_frames,
                min_pixels=video_min_pixels,
                max_pixels=video_max_pixels,
            )

    def _check_processor(self, processor: ImageProcessor) -> None:
        """Raise `UserError` where the processor's pixels are not what the model takes."""
        config, family = self.model.config, self.model.family
        values, grid = processor(np.zeros((32, 32, 3), np.uint8))
        pixels = {"pixel_values": values[None] if grid is None else values}
        if grid is not None:
            pixels["image_grid_thw"] = np.array([grid], np.int64)
        merged = family.merged_patches(config)
        try:
            if processor.merged != merged:
                raise UserError(f"merge_size squared is {processor.merged}, but must be {merged}.")
            tokens = np.full(family.image_tokens(config, grid), config.image_token_id)
            family.layout(config, tokens, **pixels)
        except UserError as error:
            raise UserError(
                f"The image settings of '{self.directory}' (preprocessor_config.json) do not fit "
                f"its config.json: {error}"
            ) from error

    def encode(self, record: Record) -> dict[str, Any]:
        """Return one record's arrays, whole: nothing is ever cut off.

        tokens int32 [T], weights float32 [T] (weights[t] belongs to token t, as labels do), id;
        pixel_values float32 and image_grid_thw int64 [I, 3] as the checkpoint's processor gives
        them: Qwen2-VL [P, C]; LLaVA [I, 3, height, width] and None. Both None without images.
        pixel_values_videos and video_grid_thw: the same of videos.

        Raises `BadExample`, naming the record, for an unreadable image, an example longer than
        `max_seq_length` (its answer would be cut), one without any token that carries loss, and
        placeholders that differ from the image features.
        """
        record = canonical(record)
        values, grids = self._pixels(record)
        videos, video_grids = self._video_pixels(record)
        tokens, weights = self._tokens(record, grids, video_grids)
        return {
            "id": record["id"],
            "tokens": tokens,
            "weights": weights,
            "pixel_values": values,
            "image_grid_thw": _stack_grids(grids),
            "pixel_values_videos": videos,
            "video_grid_thw": _stack_grids(video_grids),
        }

    def example(self, record: Record) -> Example:
        """Return the record's `vlm_jax.batch.Example`, as `collate` takes it."""
        return self._example(self.encode(record))

    def prompt(self, record: Record) -> Example:
        """Return the example of a conversation up to where the assistant is to write; no weights.

        Assistant turns at the end of the record (the answer to be found) are left out.
        """
        record = canonical(record)
        messages = record["messages"]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        kinds = [part["type"] for m in messages for part in m["content"]]
        images, films = record["images"], record["videos"]
        images, films = images[: kinds.count("image")], films[: kinds.count("video")]
        record = {**record, "messages": messages, "images": images, "videos": films}
        values, grids = self._pixels(record)
        videos, video_grids = self._video_pixels(record)
        tokens = self.chat.prompt(messages, self._features(grids), self._features(video_grids))
        return self._example(
            {
                "tokens": tokens,
                "weights": np.zeros(len(tokens), np.float32),
                "pixel_values": values,
                "image_grid_thw": _stack_grids(grids),
                "pixel_values_videos": videos,
                "video_grid_thw": _stack_grids(video_grids),
            }
        )

    def measure(self, record: Record) -> Size:
        """Return the example's `Size` from its text and its images' headers: no pixel is decoded.

        Raises `BadExample` as `encode` does, as far as headers tell.
        """
        record = canonical(record)
        grids, films = self._grids(record), self._video_grids(record)
        tokens, weights = self._tokens(record, grids, films)
        patches = sum(map(self.patches, [*grids, *films]))
        return Size(len(tokens), patches, int(weights.sum()))

    def patches(self, grid: Grid) -> int:
        """Return how many patch slots of a row one image or video of this grid takes."""
        if grid is None:
            return self.model.family.patch_unit(self.model.config)
        return int(np.prod(grid))

    def most_patches(self) -> int:
        """Return how many patch slots one image takes at most, whatever its size."""
        largest = None if self.processor is None else self.processor.largest
        return self.patches(None) if largest is None else largest

    def most_video_patches(self) -> int:
        """Return how many patch slots one video takes at most, whatever its length."""
        return 0 if self.video_processor is None else self.video_processor.largest

    def collate(self, rows: Sequence[Sequence[Example]], length: int, patches: int) -> Batch:
        """Return the `Batch` of rows of examples; see `vlm_jax.batch.collate`."""
        return self.model.collate(rows, length, patches)

    def image_settings(self) -> dict[str, Any] | None:
        """Return the preprocessor_config.json that serves images as they were trained on."""
        return None if self.processor is None else self.processor.settings()

    def video_settings(self) -> dict[str, Any] | None:
        """Return the video_preprocessor_config.json of the same kind; None without video."""
        return None if self.video_processor is None else self.video_processor.settings()

    def _example(self, arrays: dict[str, Any]) -> Example:
        media = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        given = {name: arrays[name] for name in media if arrays[name] is not None}
        tokens = arrays["tokens"]
        layout = self.model.family.layout(self.model.config, tokens, **given)
        return {"tokens": tokens, "weights": arrays["weights"], **layout}

    def _features(self, grids: Sequence[Grid]) -> list[int]:
        family, config = self.model.family, self.model.config
        return [family.image_tokens(config, grid) for grid in grids]

    def _tokens(
        self, record: Record, grids: Sequence[Grid], films: Sequence[Grid]
    ) -> tuple[np.ndarray, np.ndarray]:
        try:
            tokens, weights = self.chat.encode(
                record["messages"], self._features(grids), self.train_on, self._features(films)
            )
        except UserError as error:
            raise BadExample("template", f"{describe(record)}: {error}") from error
        if self.max_seq_length is not None and len(tokens) > self.max_seq_length:
            features = sum(self._features([*grids, *films]))
            raise BadExample(
                "too_long",
                f"{describe(record)} has {len(tokens)} tokens ({features} of them for {len(grids)} "
                f"images and {len(films)} videos), more than data.max_seq_length = "
                f"{self.max_seq_length}. It is not cut: raise the limit, lower data.max_pixels, or "
                f"split the conversation.",
            )
        if not weights[1:].any():
            raise BadExample(
                "no_answer",
                f"{describe(record)} has no token that carries loss: it has no assistant turn, or "
                f"an empty one.",
            )
        return tokens, weights

    def _read(self, record: Record, kind: str, number: int, read: Any) -> Any:
        """Return `read(source, folder)` of one image or video; errors name record and number."""
        source = record[f"{kind}s"][number]
        if kind == "video" and self.model.config.video_token_id is None:
            raise BadExample(
                "video",
                f"{describe(record)} has a video, but '{self.directory}' is a "
                f"{self.model.hf_config['model_type']} model, which takes images only. Train a "
                f"Qwen2-VL, or give single frames as images.",
            )
        if (self.processor if kind == "image" else self.video_processor) is None:
            files = "preprocessor_config.json, or processor_config.json with 'image_processor'"
            raise UserError(
                f"{describe(record)} has {kind}s, but '{self.directory}' has no {kind} settings "
                f"({files}). Copy the file of the checkpoint there."
            )
        try:
            return read(source, record["folder"] or self.image_folder)
        except UserError as error:
            name = (
                f" '{source}'" if isinstance(source, str | Path) and len(str(source)) < 300 else ""
            )
            raise BadExample(
                kind, f"{kind.capitalize()} {number}{name} of {describe(record)}: {error}"
            ) from error

    def _read_all(self, record: Record, kind: str, read: Any) -> list[Any]:
        return [self._read(record, kind, i, read) for i in range(len(record[f"{kind}s"]))]

    def _pixels(self, record: Record) -> tuple[np.ndarray | None, list[Grid]]:
        def read(source: Any, folder: str | None) -> Any:
            assert self.processor is not None
            return self.processor(read_image(source, folder, self.access))

        return _stack_pixels(self._read_all(record, "image", read))

    def _grids(self, record: Record) -> list[Grid]:
        def read(source: Any, folder: str | None) -> Any:
            assert self.processor is not None
            return self.processor.grid(*image_size(source, folder, self.access))

        return self._read_all(record, "image", read)

    def _video_pixels(self, record: Record) -> tuple[np.ndarray | None, list[Grid]]:
        def read(source: Any, folder: str | None) -> Any:
            processor = self.video_processor
            assert processor is not None
            return processor(open_video(source, folder, self.access, processor.sampling))

        return _stack_pixels(self._read_all(record, "video", read))

    def _video_grids(self, record: Record) -> list[Grid]:
        def read(source: Any, folder: str | None) -> Any:
            processor = self.video_processor
            assert processor is not None
            return processor.grid(open_video(source, folder, self.access, processor.sampling))

        return self._read_all(record, "video", read)


def _stack_pixels(pairs: list[Any]) -> tuple[np.ndarray | None, list[Grid]]:
    """Return all images' pixel values in one array, and their grids."""
    if not pairs:
        return None, []
    values, grids = zip(*pairs, strict=True)
    return (np.stack(values) if grids[0] is None else np.concatenate(values)), list(grids)


def describe(record: Record) -> str:
    """Return how errors call a record: by its index, and its id where it has one."""
    named = "" if record["id"] == str(record["index"]) else f" (id {record['id']!r})"
    return f"record {record['index']}{named}"


def _stack_grids(grids: Sequence[Grid]) -> np.ndarray | None:
    return np.array(grids, np.int64) if grids and grids[0] is not None else None


def encode(model_directory: str | Path, record: Any, **options: Any) -> dict[str, Any] | None:
    """Return `Encoder(model_directory, **options).encode(record)` of one raw or canonical record.

    With on_bad_example="skip" a record that cannot be trained on gives None. Relative image paths
    start at `image_folder`. To encode many records, keep one `Encoder`.
    """
    encoder = Encoder(model_directory, **options)
    try:
        return encoder.encode(record)
    except BadExample:
        if encoder.on_bad_example == "skip":
            return None
        raise
