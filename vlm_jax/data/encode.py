"""The encoder: a record to the arrays of an example, by a checkpoint's tokenizer and processor."""

import collections
import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.batch import Batch, Example
from vlm_jax.data.fitted import Features, Fitted, count, stack_grids, written
from vlm_jax.data.lengths import FILMED, SHRUNK, TURNS_DROPPED, Size
from vlm_jax.data.media.access import Access
from vlm_jax.data.media.headers import KINDS, Grids, Media
from vlm_jax.data.media.image_settings import check_processor, make_processor, read_settings
from vlm_jax.data.media.processors import look_up
from vlm_jax.data.media.video_processor import make_video_processor, read_video_settings
from vlm_jax.data.overlong import POLICIES, Trial, fit, too_long
from vlm_jax.data.records.boxes import fill, has_objects
from vlm_jax.data.records.record import BadExample, Record, canonical, describe
from vlm_jax.data.text.chat import TRAIN_ON, Chat
from vlm_jax.data.text.template import BadTemplate
from vlm_jax.errors import UserError
from vlm_jax.files.limits import MAX_IMAGE_PIXELS, read_json
from vlm_jax.models import read_family
from vlm_jax.models.family import NAMES_OF_MEDIA

ON_BAD_EXAMPLE = ("raise", "skip")
# What of a checkpoint directory the sizes of examples hang on.
SIZE_FILES = ("*config.json", "*token*.json", "vocab*", "merges.txt", "*.model", "*.jinja", "chat*")


class Encoder:
    """Everything of a checkpoint directory that turns records into examples; thread-safe.

    directory: holds config.json, tokenizer and chat template, and image settings where records
        have images.
    max_seq_length, max_patches: the most tokens, placeholders included, and patches; None: any.
    overlong: what is done about an example above these: "shrink_pixels" of its images down to the
        least, then drop leading turns, then leave it out; "drop_turns"; "drop"; "error".
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
    adapter: the directory of an adapter: the image and video settings, the tokenizer and the chat
        template that it has stand in place of the checkpoint's, as it was trained with them.
    chat: the directory's tokenizer and template where they are loaded already, see `replace`.
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
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        allow_absolute_paths: bool = False,
        allow_urls: bool = False,
        video_fps: float | None = None,
        video_min_frames: int | None = None,
        video_max_frames: int | None = None,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        adapter: str | Path | None = None,
        chat: Chat | None = None,
    ):
        self._remake = functools.partial(
            Encoder, **{k: value for k, value in locals().items() if k not in ("self", "chat")}
        )
        for name, value, known in (
            ("overlong", overlong, tuple(POLICIES)),
            ("train_on", train_on, TRAIN_ON),
            ("on_bad_example", on_bad_example, ON_BAD_EXAMPLE),
        ):
            if value not in known:
                raise UserError(f"data.{name} is {value!r}; expected one of {', '.join(known)}.")
        path = Path(directory, "config.json")
        if not path.is_file():
            raise UserError(
                f"'{directory}' is not a checkpoint directory: it has no config.json. Expected the "
                f"local directory of a Hugging Face checkpoint."
            )
        self.hf_config = read_json(path)
        self.config = config = read_family(self.hf_config)
        self.directory = str(directory)
        self.max_seq_length, self.max_patches = max_seq_length, max_patches
        self.overlong, self.train_on, self.on_bad_example = overlong, train_on, on_bad_example
        self.image_folder = None if image_folder is None else str(image_folder)
        self.directories = [str(one) for one in (adapter, directory) if one is not None]
        ids = config.image_token_id, config.video_token_id
        self.chat = chat or Chat(directory, *ids, adapter, config.IMAGE_MARK)
        settings = read_settings(*self.directories)
        processor = (
            None
            if settings is None
            else make_processor(
                settings,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                image_resolution=image_resolution or None,
            )
        )
        if processor is not None:
            check_processor(processor, config, self.directory)
        settings = read_video_settings(*self.directories)
        takes_video = config.video_token_id is not None
        video_processor = (
            None
            if settings is None or not takes_video
            else make_video_processor(
                settings,
                fps=video_fps,
                min_frames=video_min_frames,
                max_frames=video_max_frames,
                min_pixels=video_min_pixels,
                max_pixels=video_max_pixels,
                default=config.VIDEO_PROCESSOR,
            )
        )
        self.media = Media(
            directory=self.directory,
            model_type=self.hf_config["model_type"],
            takes_video=takes_video,
            processor=processor,
            video_processor=video_processor,
            access=Access(allow_absolute_paths, allow_urls, max_image_pixels),
            folder=self.image_folder,
        )

    def __reduce__(self) -> tuple:
        return self._remake, ()

    def replace(self, **options: Any) -> "Encoder":
        """Return the encoder with other options; of one directory the tokenizer is loaded once."""
        return Encoder(
            **{**self._remake.keywords, **options},
            chat=None if options.keys() & {"directory", "adapter"} else self.chat,
        )

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's fast tokenizer, as transformers loads it."""
        return self.chat.tokenizer

    @property
    def settings(self) -> dict[str, Any]:
        """All that the sizes of examples hang on, JSON-able: files by their content."""
        files = {
            f"{i} {path.name}": hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
            for i, directory in enumerate(reversed(self.directories))
            for pattern in SIZE_FILES
            for path in Path(directory).glob(pattern)
        }
        options = {**self._remake.keywords, "directory": files, "image_folder": self.image_folder}
        without = ("on_bad_example", "adapter")  # the latter by its files, wherever they lie
        return {name: value for name, value in options.items() if name not in without}

    def encode(self, record: Record) -> dict[str, Any]:
        """Return one record's arrays, whole: nothing is ever cut off.

        tokens int32 [T], weights float32 [T] (weights[t] belongs to token t, as labels do), id;
        pixel_values float32 and image_grid_thw int64 [I, 3] as the checkpoint's processor gives
        them: Qwen2-VL [P, C]; LLaVA [I, 3, height, width] and None. Both None without images.
        pixel_values_videos and video_grid_thw: the same of videos, and `Family.OF_VIDEOS`: of
        Qwen2.5-VL second_per_grid_ts float32 [V].

        An over-long example is treated by the policy `overlong`, see `vlm_jax.data.overlong`.
        Raises `BadExample`, naming the record, for an unreadable image, an example that stays
        longer than `max_seq_length` (its answer would be cut), one without any token that carries
        loss, and placeholders that differ from the image features.
        """
        return self._decode(self.fit(record))

    def example(self, record: Record, bytes_only: bool = False, still: bool = False) -> Example:
        """Return the record's `vlm_jax.batch.Example`, as `collate` takes it.

        bytes_only: with patches in uint8, for `models.pixel_table` to give them values. still: of
        one frame then, which stands for all, unless the example holds a video.
        """
        fitted = self.fit(record)
        return self._example(
            self._decode(fitted, bytes_only, still and not fitted.record["videos"])
        )

    @property
    def value_table(self) -> np.ndarray | None:
        """The values of the bytes of `example` [3, 256]; None where images and videos differ."""
        tables = list(self.media.tables().values()) or [np.zeros((3, 256), np.float32)]
        return tables[0] if all((table == tables[0]).all() for table in tables) else None

    def prompt(self, record: Record) -> Example:
        """Return the example of a conversation up to where the assistant is to write; no weights.

        Assistant turns at the end of the record (the answer to be found) are left out.
        """
        fitted = self._fit(record)
        record, messages = fitted.record, fitted.record["messages"]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        counts = collections.Counter(part["type"] for m in messages for part in m["content"])
        own = {f"{kind}s": record[f"{kind}s"][: counts[kind]] for kind in KINDS}
        record = {**record, "messages": messages, **own}
        grids = {kind: fitted.grids[kind][: counts[kind]] for kind in KINDS}
        films = fitted.films[: counts["video"]]
        features = written(self.config, grids, films)
        tokens = self.chat.prompt(messages, features["image"], features["video"])
        no_weights = np.zeros(len(tokens), np.float32)
        shown = Fitted(record, fitted.media, grids, tokens, no_weights, films=films)
        return self._example(self._decode(shown))

    def measure(self, record: Record) -> Size:
        """Return the example's `Size` from its text and its images' headers: no pixel is decoded.

        Raises `BadExample` as `encode` does, as far as headers tell.
        """
        fitted = self.fit(record)
        return Size(
            tokens=len(fitted.tokens),
            patches=self._patches(fitted.grids),
            answers=int(np.count_nonzero(fitted.weights)),
            notes=fitted.notes,
        )

    def fit(self, record: Any) -> Fitted:
        """Return a raw or canonical record as it fits a row, by headers alone.

        Raises `BadExample` where it cannot be trained on.
        """
        fitted = self._fit(record)
        if not fitted.weights[1:].any():
            raise BadExample(
                "no_answer",
                f"{describe(fitted.record)} has no token that carries loss: it has no assistant "
                f"turn, an empty one, or none whose weight is above 0.",
            )
        return fitted

    def _fit(self, record: Any) -> Fitted:
        record = canonical(record)
        headers = self.media.headers(record)
        # features, tokens, weights, by the number of turns, and by the limit of pixels where boxes
        # are written in pixels of the resized image.
        texts: dict[tuple[int, int | None], tuple] = {}
        in_pixels = has_objects(record) and getattr(self.config.GROUNDING, "side", 0) is None

        def attempt(part: Record, max_pixels: int | None) -> Trial:
            media = self.media.limited(max_pixels)
            own = {k: headers[k][len(headers[k]) - len(part[f"{k}s"]) :] for k in KINDS}
            grids = media.grids(part, own)
            part = fill(  # objects count the images of the whole record
                part,
                self.config.GROUNDING,
                self.hf_config["model_type"],
                self.tokenizer,
                headers["image"],
                resized=lambda: media.sizes(record, headers),
            )
            features = written(self.config, grids, own["video"])
            key = len(part["messages"]), max_pixels if in_pixels else None
            if key not in texts:
                texts[key] = features, *self._encode_text(part, features)
            encoded, ids, weights = texts[key]
            tokens = len(ids) + count(features) - count(encoded)
            if features != encoded:  # other features for the same text: encoded once it fits
                ids = None
            return Trial(
                part, max_pixels, tokens, self._patches(grids), (media, grids, ids, weights)
            )

        limits = self.max_seq_length, self.max_patches
        trial, fits = fit(record, attempt, limits, self.overlong, self.media.pixels)
        media, grids, tokens, weights = trial.encoded
        films = headers["video"][len(headers["video"]) - len(trial.record["videos"]) :]
        features = written(self.config, grids, films)
        if not fits:
            raise too_long(trial, limits, self.overlong, count(features), grids)
        if tokens is None:
            tokens, weights = self._encode_text(trial.record, features)
        notes = SHRUNK * (trial.max_pixels is not None) | FILMED * bool(trial.record["videos"])
        notes |= TURNS_DROPPED * (len(trial.record["messages"]) < len(record["messages"]))
        return Fitted(trial.record, media, grids, tokens, weights, notes, films)

    def grounded(self, record: Record) -> Record:
        """Return a canonical record with its objects and boxes written as the family does.

        With objects it is the record as it fits: boxes may be in pixels that the model sees. Not to
        be encoded again: without its boxes' words it might fit at another size.
        """
        return self._fit(record).record if has_objects(record) else record

    def most_patches(self, images: int, videos: int) -> int:
        """Return how many patch slots so many take at most, whatever their size and length."""
        still, film = self.media.processor, self.media.video_processor
        image = (still and still.largest) or self.config.image_patches()
        return images * image + videos * (film.largest if film else 0)

    def collate(
        self,
        rows: Sequence[Sequence[Example]],
        length: int,
        patches: int,
        bytes_only: bool = False,
        padded: bool = True,
        still: bool = False,
    ) -> Batch:
        """Return the `Batch` of rows of examples; see `vlm_jax.batch.collate`, and `example`."""
        return self.config.collate(
            rows, length, patches, np.uint8 if bytes_only else np.float32, padded, still
        )

    def image_settings(self) -> dict[str, Any] | None:
        """Return the preprocessor_config.json that serves images as they were trained on."""
        return None if self.media.processor is None else self.media.processor.settings()

    def video_settings(self) -> dict[str, Any] | None:
        """Return the video_preprocessor_config.json of the same kind; None without video."""
        return None if self.media.video_processor is None else self.media.video_processor.settings()

    def _decode(self, fitted: Fitted, bytes_only: bool = False, still: bool = False) -> dict:
        values = fitted.media.cut(fitted.record, fitted.grids, still)
        if not bytes_only:
            for kind, table in fitted.media.tables().items():
                cut = values[kind]
                values[kind] = None if cut is None else look_up(table, cut)
        return {
            "id": fitted.record["id"],
            "tokens": fitted.tokens,
            "weights": fitted.weights,
            "pixel_values": values["image"],
            "image_grid_thw": stack_grids(fitted.grids["image"]),
            "pixel_values_videos": values["video"],
            "video_grid_thw": stack_grids(fitted.grids["video"]),
            **self._of_videos(fitted),
        }

    def _of_videos(self, fitted: Fitted) -> dict[str, np.ndarray | None]:
        """Return what the family's processor tells of each video beside its pixels and grid."""
        made: dict[str, np.ndarray | None] = dict.fromkeys(self.config.OF_VIDEOS)
        film = self.media.video_processor
        if "second_per_grid_ts" in made and film is not None and fitted.films:
            seconds = [film.sampling.factor / one.fps for one in fitted.films]
            made["second_per_grid_ts"] = np.array(seconds, np.float32)
        return made

    def _example(self, arrays: dict[str, Any]) -> Example:
        media = (*itertools.chain(*NAMES_OF_MEDIA.values()), *self.config.OF_VIDEOS)
        given = {name: arrays[name] for name in media if arrays[name] is not None}
        layout = self.config.layout(arrays["tokens"], given)
        return {"tokens": arrays["tokens"], "weights": arrays["weights"], **layout}

    def _patches(self, grids: Grids) -> int:
        return sum(self.config.image_patches(grid) for kind in KINDS for grid in grids[kind])

    def _encode_text(self, record: Record, features: Features) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self.chat.encode(
                record["messages"], features["image"], self.train_on, features["video"]
            )
        except BadTemplate:
            raise
        except UserError as error:
            raise BadExample("template", f"{describe(record)}: {error}") from error


def encode(model_directory: str | Path, record: Any, **options: Any) -> dict[str, Any] | None:
    """Return `Encoder(model_directory, **options).encode(record)` of one raw or canonical record.

    With on_bad_example="skip" a record that cannot be trained on gives None. Relative image paths
    start at `image_folder`. To encode many records, keep one `Encoder`.
    """
    encoder = Encoder(model_directory, **options)
    try:
        try:
            record = canonical(record)
        except UserError as error:
            raise BadExample("record", str(error)) from error
        return encoder.encode(record)
    except BadExample:
        if encoder.on_bad_example == "skip":
            return None
        raise
