"""The content of a preview, as plain data: settings, statistics, and the first rows of training."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.config.specs import RunSpec
from vlm_jax.data import Pipeline
from vlm_jax.data.fitted import written
from vlm_jax.data.lengths import SHRUNK, TURNS_DROPPED
from vlm_jax.data.planner import Step
from vlm_jax.data.records.record import canonical
from vlm_jax.data.shapes import Shape
from vlm_jax.errors import UserError
from vlm_jax.hub.load import resolve
from vlm_jax.preview.example import Example, Reader
from vlm_jax.sharding import mesh_sizes
from vlm_jax.train.setup import (
    base_name,
    check_type,
    data_seed,
    encoder_of,
    make_pipeline,
    total_steps,
)

SPLITS = ("train", "eval")
BARS = 24  # of a histogram, at most


class Setting(NamedTuple):
    """A key of the config, what it comes to here, and a word about it."""

    key: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many examples have how many of something. bars: (from, to, examples), all of one width.

    limit: the most an example may have; None: any number.
    """

    name: str
    bars: list[tuple[int, int, int]]
    median: int
    high: int  # 99 of 100 have at most this
    largest: int
    limit: int | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a step. segments: how many examples it packs, of which `examples` are shown."""

    step: int
    number: int
    shape: Shape
    tokens: int
    patches: int
    segments: int
    examples: list[Example]


@dataclasses.dataclass(frozen=True)
class Preview:
    """Everything that a page or a terminal shows. report: `Pipeline.report`.

    total_steps: of the whole run (train), of one evaluation (eval); None: nothing says it.
    rows_a_step: of the global batch. exact: whether the steps are counted, not estimated.
    """

    model: str
    data: str
    split: str
    settings: list[Setting]
    report: dict[str, Any]
    histograms: list[Histogram]
    rows_a_step: int
    total_steps: int | None
    exact: bool
    rows: list[Row]
    damaged: list[str]

    @property
    def examples(self) -> list[Example]:
        return [example for row in self.rows for example in row.examples]

    @property
    def loss_tokens(self) -> int:
        """Of the examples that are shown."""
        return sum(example.loss_tokens for example in self.examples)


def preview(config: RunSpec | ConfigDict, examples: int = 16, split: str = "train") -> Preview:
    """Return the first examples that a run of this config trains on, in its order; no weights.

    split: "train", or "eval" for what a run evaluates on, as an evaluation goes through it. Raises
    `UserError` for whatever training would refuse before its first step.
    """
    config = RunSpec.of(config)
    pipeline, t = open_pipeline(config, split), config.training
    seen = collect(pipeline, examples, split)
    total: int | None = None  # of a stream, without max_steps
    if split == "eval":
        total = len(pipeline.eval_steps())
    elif t.max_steps > 0 or pipeline.steps_per_epoch is not None:
        total = total_steps(t.max_steps, t.num_train_epochs, pipeline.steps_per_epoch)
    films = any(picture.kind == "video" for one in seen.examples for picture in one.pictures)
    return dataclasses.replace(
        seen,
        model=base_name(config),
        settings=settings(config, pipeline, films),
        total_steps=total,
    )


def open_pipeline(config: RunSpec, split: str = "train") -> Pipeline:
    """Return the pipeline that training would make, from a hub checkpoint's small files alone."""
    if split not in SPLITS:
        raise UserError(f"There is no split '{split}'; expected one of {', '.join(SPLITS)}.")
    t, directory = config.training, resolve(base_name(config), config.model.revision, weights=False)
    encoder = encoder_of(config, directory)
    check_type(config, encoder.hf_config)
    is_training = split == "train"
    rows = (
        t.per_device_train_batch_size * t.gradient_accumulation_steps
        if is_training
        else t.per_device_eval_batch_size
    )
    return make_pipeline(config, encoder, rows * shards_of(config), training=is_training)


def shards_of(config: RunSpec) -> int:
    """Return among how many devices a step's rows are divided; such a mesh need not be here."""
    m = config.mesh
    asked = m.data, m.fsdp, m.tensor, m.context
    devices = m.devices or (len(jax.devices()) if -1 in asked else math.prod(asked))
    sizes = mesh_sizes(devices, *asked)
    return sizes["data"] * sizes["fsdp"]


def collect(pipeline: Pipeline, examples: int = 16, split: str = "train") -> Preview:
    """Return the preview of a pipeline's first examples, without what only a config knows."""
    report = pipeline.report  # first: of a stream, only what was read last is at hand
    steps: Iterable[Step] = pipeline.eval_steps() if split == "eval" else pipeline.planner.steps()
    damaged: list[str] = []
    rows = list(_rows(pipeline, steps, examples, damaged))
    encoder, measures = pipeline.encoder, pipeline.measures
    everything = np.arange(measures.count)
    known = np.setdiff1d(everything, measures.unknown(everything), assume_unique=True)
    sizes = measures.sizes(measures.kept(known))
    return Preview(
        model=encoder.directory,
        data=pipeline.records.name,
        split=split,
        settings=[],
        report=report,
        histograms=[
            histogram("tokens", sizes[:, 0], encoder.max_seq_length),
            histogram("patches", sizes[:, 1], encoder.max_patches),
            histogram("tokens with loss", sizes[:, 2], None),
        ],
        rows_a_step=pipeline.rows,
        total_steps=pipeline.steps_per_epoch,
        exact=pipeline.all_measured,
        rows=rows,
        damaged=damaged,
    )


def _rows(
    pipeline: Pipeline, steps: Iterable[Step], most: int, damaged: list[str]
) -> Iterator[Row]:
    """Yield rows until `most` examples are shown, or the first epoch ends."""
    encoder, reader, shown = pipeline.encoder, Reader(pipeline.encoder), 0
    for number, step in enumerate(steps, start=1):
        for place, indices in enumerate(step.rows, start=1):
            made, good = [], []
            for index in indices:
                try:
                    made.append(encoder.example(pipeline.records[index]))
                    good.append(index)
                except UserError as error:
                    if not pipeline.measurer.allowed(error):
                        raise pipeline.measurer.named(index, error) from error
                    damaged.append(str(error))
            # One row at a time: a whole global batch of images may be gigabytes.
            found = reader.row(encoder.collate([made], *step.shape), 0)
            kept = found[: most - shown]
            yield Row(
                step=number,
                number=place,
                shape=step.shape,
                tokens=sum(example.tokens for example in found),
                patches=sum(example.patches for example in found),
                segments=len(found),
                examples=[
                    _named(pipeline, example, index)
                    for example, index in zip(kept, good, strict=False)
                ],
            )
            shown += len(kept)
            if shown >= most:
                return
        if step.after and step.after["step"] == 0:
            return


def _named(pipeline: Pipeline, example: Example, index: int) -> Example:
    """Return the example with what its record tells: id, place, sizes of its files, notes."""
    record, media = canonical(pipeline.records[index]), pipeline.encoder.media
    headers = media.headers(record)
    films = headers["video"]
    texts = written(pipeline.encoder.config, media.grids(record, headers), films)["video"]
    originals = {
        "image": list(headers["image"]),
        "video": [  # frames that stand apart in the text are a picture each
            (film.height, film.width)
            for film, text in zip(films, texts, strict=True)
            for part in text
            if isinstance(part, int)
        ],
    }
    pictures = [
        dataclasses.replace(picture, original=originals[picture.kind].pop())
        for picture in reversed(example.pictures)  # turns that were left out are leading ones
    ]
    flags = int(pipeline.measures.sizes(np.array([index]))[0, 3])
    notes = {
        SHRUNK: "Its images were made smaller to fit.",
        TURNS_DROPPED: "Its first turns were left out to fit.",
    }
    return dataclasses.replace(
        example,
        id=record["id"],
        place=pipeline.records.place(index),
        notes=[note for flag, note in notes.items() if flags & flag],
        pictures=pictures[::-1],
    )


def histogram(name: str, values: np.ndarray, limit: int | None) -> Histogram:
    """Return the histogram of whole numbers, in bars of one round width."""
    low, high = int(values.min()), int(values.max())  # a pipeline keeps at least one record
    width = _round_width((high - low + 1) / BARS)
    start = low // width * width
    counts = np.bincount((values - start) // width)
    return Histogram(
        name=name,
        bars=[
            (start + i * width, start + (i + 1) * width - 1, int(n)) for i, n in enumerate(counts)
        ],
        median=int(np.median(values)),
        high=int(np.quantile(values, 0.99, method="higher")),
        largest=high,
        limit=limit,
    )


def _round_width(least: float) -> int:
    """Return the least of 1, 2, 4, 5, 8, 10, 16, 20, ... that is at least this."""
    return next(
        step * 10**power
        for power in itertools.count()
        for step in (1, 2, 4, 5, 8)
        if step * 10**power >= least
    )


def settings(config: RunSpec, pipeline: Pipeline, films: bool = False) -> list[Setting]:
    """Return what decides how examples look, as it came out; films: whether there are videos."""
    t, encoder = config.training, pipeline.encoder
    media, packed = encoder.media, pipeline.planner.capacity
    longest = "any" if encoder.max_seq_length is None else f"{encoder.max_seq_length:,}"
    found = [
        Setting("train_on", encoder.train_on, "assistant turns that carry loss"),
        Setting("resolution", *_resolution(pipeline)),
        Setting("max_seq_length", longest, "maximum tokens per row"),
        Setting(
            "packing",
            "on" if packed else "off",
            f"rows of {packed[0]:,} tokens and {packed[1]:,} patches" if packed else
            "a row holds one example",
        ),
        Setting("overlong", encoder.overlong, "policy for examples longer than a row"),
        Setting(
            "rows per step",
            f"{pipeline.rows:,}",
            "batch size × accumulation × devices that share the rows"
        ),
        Setting(
            "shapes",
            ", ".join(f"{T:,} × {P:,}" for T, P in pipeline.shapes),
            "tokens × patches per row; one compilation each",
        ),
        Setting(
            "order",
            f"shuffled, seed {data_seed(config)}"
            if pipeline.planner.shuffle
            else "as in the file",
            t.train_sampling_strategy or "",
        ),
        Setting("on_bad_example", encoder.on_bad_example),
    ]  # fmt: skip
    if media.video_processor is not None and films:
        sampling = media.video_processor.sampling
        found.insert(
            2,
            Setting(
                "video",
                f"{sampling.nframes or f'{sampling.fps:g} a second'}",
                f"{sampling.min_frames} to {sampling.max_frames} frames",
            ),
        )
    return found


def _resolution(pipeline: Pipeline) -> tuple[str, str]:
    media = pipeline.encoder.media
    if media.processor is None:
        return "none", "the checkpoint has no image settings"
    limits = media.processor.pixels
    if limits is None:
        size = media.processor.settings()
        target = size["crop_size"] if size.get("do_center_crop") else size["size"]
        return f"{target['width']} × {target['height']}", "every image gets this size"
    low, high = limits
    side = round(math.sqrt(high))
    if low == high:
        return f"{low:,} pixels", f"about {side} × {side} for every image, aspect ratio kept"
    return f"{low:,} to {high:,} pixels", f"at most about {side} × {side}, aspect ratio kept"


def first_messages(report: dict[str, Any]) -> Sequence[tuple[str, int, str]]:
    """Return (reason, records, its first message) of what is left out."""
    return [
        (reason, n, report["first_dropped"].get(reason, ""))
        for reason, n in report["dropped"].items()
    ]
