"""One record into the arrays of one example, by the files of a checkpoint directory."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.batch import Batch, Example
from vlm_jax.data.chat import TRAIN_ON, Chat
from vlm_jax.data.image_settings import make_processor, read_settings
from vlm_jax.data.images import image_size, read_image
from vlm_jax.data.measures import SHRUNK, TURNS_DROPPED, Size
from vlm_jax.data.overlong import POLICIES, Trial, fit
from vlm_jax.data.processors import Grid, ImageProcessor
from vlm_jax.data.records import Record, canonical
from vlm_jax.errors import UserError
from vlm_jax.model import from_config

ON_BAD_EXAMPLE = ("raise", "skip")
# What an over-long example's message says was tried.
TRIED = {
    "shrink_pixels": ", even with its images at their least size and its leading turns left out",
    "drop_turns": ", even with its leading turns left out",
    "drop": "",
    "error": "",
}
# What of a checkpoint directory the sizes of examples hang on.
SIZE_FILES = ("*config.json", "*token*.json", "vocab*", "merges.txt", "*.model", "*.jinja", "chat*")


class BadExample(UserError):
    """An example that cannot be trained on; `reason` is a key of the report's counts."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:  # or it would not come back from a worker process
        return BadExample, (self.reason, str(self))


class Fitted(NamedTuple):
    """An example as it fits a row: its record, tokens, weights, the processor for its images."""

    record: Record
    processor: ImageProcessor | None
    grids: list[Grid]
    tokens: np.ndarray
    weights: np.ndarray
    notes: int


class Encoder:
    """Everything of a checkpoint directory that turns records into examples; thread-safe.

    directory: holds config.json, tokenizer and chat template, and image settings where records
        have images.
    max_seq_length: the most tokens an example may have, image placeholders included; None: any.
    max_patches: likewise of its image patches.
    overlong: what is done about an example above these: "shrink_pixels" of its images down to the
        least, then drop leading turns, then leave it out; "drop_turns"; "drop"; "error".
    min_pixels, max_pixels: replace the checkpoint's limits (dynamic resolution).
    image_resolution: give every image about the pixels of a square of this side instead, see
        `make_processor`; 0 or None: not set.
    train_on: "all" assistant turns carry loss, or the "last" one.
    on_bad_example: what the pipeline does about an unreadable example: "raise" or "skip".
    image_folder: where relative image paths start, where the record does not say.
    Raises `UserError` where a file is missing or an option cannot be met.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        max_seq_length: int | None = None,
        max_patches: int | None = None,
        overlong: str = "shrink_pixels",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_resolution: int | None = None,
        train_on: str = "all",
        on_bad_example: str = "raise",
        image_folder: str | Path | None = None,
    ):
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self._remake = functools.partial(Encoder, **arguments)
        for name, value, known in (
            ("overlong", overlong, POLICIES),
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
        self.max_seq_length, self.max_patches = max_seq_length, max_patches
        self.overlong = overlong
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

    def __reduce__(self) -> tuple:
        return self._remake, ()

    def with_limits(self, max_seq_length: int | None, max_patches: int | None) -> "Encoder":
        """Return the encoder with limits of its own."""
        arguments = {**self._remake.keywords, "max_seq_length": max_seq_length}
        return Encoder(**{**arguments, "max_patches": max_patches})

    @property
    def settings(self) -> dict[str, Any]:
        """All that the sizes of examples depend on, JSON-able: the files by their content."""
        files = {}
        for pattern in SIZE_FILES:
            for path in Path(self.directory).glob(pattern):
                files[path.name] = hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
        options = {**self._remake.keywords, "directory": files}
        del options["on_bad_example"]
        return {name: str(value) if name == "image_folder" else value for name, value in options.items()}

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

        An over-long example is treated by the policy `overlong`, see `vlm_jax.data.overlong`.
        Raises `BadExample`, naming the record, for an unreadable image, an example that stays
        longer than `max_seq_length` (its answer would be cut), one without any token that carries loss, and
        placeholders that differ from the image features.
        """
        fitted = self.fit(record)
        return {
            "id": fitted.record["id"],
            "tokens": fitted.tokens,
            "weights": fitted.weights,
            "pixel_values": self._pixels(fitted),
            "image_grid_thw": _stack_grids(fitted.grids),
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
        count = sum(part["type"] == "image" for m in messages for part in m["content"])
        record = {**record, "messages": messages, "images": record["images"][:count]}
        grids = [
            self._grid(record, self.processor, i, size)
            for i, size in enumerate(self._sizes(record))
        ]
        tokens = self.chat.prompt(messages, self._features(grids))
        fitted = Fitted(record, self.processor, grids, tokens, np.zeros(len(tokens), np.float32), 0)
        return self._example(
            {
                "tokens": tokens,
                "weights": fitted.weights,
                "pixel_values": self._pixels(fitted),
                "image_grid_thw": _stack_grids(grids),
            }
        )

    def measure(self, record: Record) -> Size:
        """Return the example's `Size` from its text and its images' headers: no pixel is decoded.

        Raises `BadExample` as `encode` does, as far as headers tell.
        """
        fitted = self.fit(record)
        patches = sum(map(self.patches, fitted.grids))
        return Size(len(fitted.tokens), patches, int((fitted.weights > 0).sum()), fitted.notes)

    def fit(self, record: Any) -> Fitted:
        """Return a raw or canonical record as it fits a row, by headers alone.

        Raises `BadExample` where it cannot be trained on.
        """
        record = canonical(record)
        sizes = self._sizes(record)
        texts: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by turns, features counted as 0

        def attempt(record: Record, max_pixels: int | None) -> Trial:
            own = sizes[len(sizes) - len(record["images"]) :]
            processor = self.processor
            if max_pixels is not None and processor is not None:
                processor = processor.limited(max_pixels)
            grids = [self._grid(record, processor, i, size) for i, size in enumerate(own)]
            features = self._features(grids)
            turns = len(record["messages"])
            if turns not in texts:
                texts[turns] = self._tokens(record, [0] * len(own))
            tokens = len(texts[turns][0]) + sum(features)
            return Trial(record, max_pixels, tokens, sum(map(self.patches, grids)), (processor, grids))

        limits = self.max_seq_length, self.max_patches
        pixels = None if self.processor is None else self.processor.pixels
        trial, fits = fit(record, attempt, limits, self.overlong, pixels)
        processor, grids = trial.encoded
        if not fits:
            raise self._too_long(trial, grids)
        tokens, weights = self._tokens(trial.record, self._features(grids))
        if not weights[1:].any():
            raise BadExample(
                "no_answer",
                f"{describe(record)} has no token that carries loss: it has no assistant turn, "
                f"an empty one, or none whose weight is above 0.",
            )
        notes = SHRUNK * (trial.max_pixels is not None)
        notes |= TURNS_DROPPED * (len(trial.record["messages"]) < len(record["messages"]))
        return Fitted(trial.record, processor, grids, tokens, weights, notes)

    def patches(self, grid: Grid) -> int:
        """Return how many patch slots of a row one image of this grid takes."""
        if grid is None:
            return self.model.family.patch_unit(self.model.config)
        return int(np.prod(grid))

    def most_patches(self) -> int:
        """Return how many patch slots one image takes at most, whatever its size."""
        largest = None if self.processor is None else self.processor.largest
        return self.patches(None) if largest is None else largest

    def collate(self, rows: Sequence[Sequence[Example]], length: int, patches: int) -> Batch:
        """Return the `Batch` of rows of examples; see `vlm_jax.batch.collate`."""
        return self.model.collate(rows, length, patches)

    def image_settings(self) -> dict[str, Any] | None:
        """Return the preprocessor_config.json that serves images as they were trained on."""
        return None if self.processor is None else self.processor.settings()

    def _example(self, arrays: dict[str, Any]) -> Example:
        images = ("pixel_values", "image_grid_thw")
        given = {name: arrays[name] for name in images if arrays[name] is not None}
        tokens = arrays["tokens"]
        layout = self.model.family.layout(self.model.config, tokens, **given)
        return {"tokens": tokens, "weights": arrays["weights"], **layout}

    def _features(self, grids: Sequence[Grid]) -> list[int]:
        family, config = self.model.family, self.model.config
        return [family.image_tokens(config, grid) for grid in grids]

    def _tokens(self, record: Record, features: list[int]) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self.chat.encode(record["messages"], features, self.train_on)
        except UserError as error:
            raise BadExample("template", f"{describe(record)}: {error}") from error

    def _too_long(self, trial: Trial, grids: list[Grid]) -> BadExample:
        name = describe(trial.record)
        if self.max_seq_length is not None and trial.tokens > self.max_seq_length:
            return BadExample(
                "too_long",
                f"{name} has {trial.tokens} tokens ({sum(self._features(grids))} of them for "
                f"{len(grids)} images), more than data.max_seq_length = {self.max_seq_length}"
                f"{TRIED[self.overlong]}. It is not cut: raise the limit, lower data.max_pixels, "
                f"or split the conversation.",
            )
        return BadExample(
            "too_many_patches",
            f"{name} takes {trial.patches} patches, more than data.max_patches = "
            f"{self.max_patches}{TRIED[self.overlong]}. It is not cut: raise the limit, lower "
            f"data.max_pixels, or split the conversation.",
        )

    def _sizes(self, record: Record) -> list[tuple[int, int]]:
        """Return (height, width) of each image, from headers."""
        return [
            self._of_image(record, i, lambda source, folder: image_size(source, folder))
            for i in range(len(record["images"]))
        ]

    def _grid(
        self, record: Record, processor: ImageProcessor | None, number: int, size: tuple[int, int]
    ) -> Grid:
        return self._of_image(record, number, lambda *_: processor.grid(*size))  # type: ignore

    def _pixels(self, fitted: Fitted) -> np.ndarray | None:
        """Return the pixel values of an example's images, decoded."""

        def decode(source: Any, folder: str | None) -> tuple[np.ndarray, Grid]:
            assert fitted.processor is not None
            return fitted.processor(read_image(source, folder))

        record, values = fitted.record, []
        for number, grid in enumerate(fitted.grids):
            value, real = self._of_image(record, number, decode)
            if real != grid:
                raise BadExample(
                    "changed",
                    f"Image {number} of {describe(record)} decodes to the patch grid {real}, but "
                    f"its header promised {grid}: the file is damaged or was just replaced.",
                )
            values.append(value)
        if not values:
            return None
        return np.stack(values) if fitted.grids[0] is None else np.concatenate(values)

    def _of_image(self, record: Record, number: int, read: Any) -> Any:
        """Return `read(source, folder)` of one image; errors name record and image."""
        source = record["images"][number]
        if self.processor is None:
            raise UserError(
                f"{describe(record)} has images, but '{self.directory}' has no image settings "
                f"(preprocessor_config.json, or processor_config.json with 'image_processor'). "
                f"Copy the file of the checkpoint there."
            )
        try:
            return read(source, record["folder"] or self.image_folder)
        except BadExample:
            raise
        except UserError as error:
            name = (
                f" '{source}'" if isinstance(source, str | Path) and len(str(source)) < 300 else ""
            )
            raise BadExample(
                "image", f"Image {number}{name} of {describe(record)}: {error}"
            ) from error


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
