"""The pipeline: batches in an order planned from (seed, epoch), resumable at any step.

`Planner` says which records each step's rows hold, `making` makes them; here the shapes are chosen,
and what is left out is counted.
"""

import collections
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.data.encode import Encoder
from vlm_jax.data.lengths import (
    FILMED,
    SHRUNK,
    TURNS_DROPPED,
    Measures,
    StreamMeasures,
    measures_file,
)
from vlm_jax.data.loader import Made, Making, Skipped, Steps, batches
from vlm_jax.data.measuring import ALWAYS_DROPPED, Measurer, sample
from vlm_jax.data.packing import pack, patch_capacity, row_sizes
from vlm_jax.data.planner import Planner, State, Step
from vlm_jax.data.records.mixture import Mixture, Records
from vlm_jax.data.records.sources import read_records
from vlm_jax.data.records.stream import Stream
from vlm_jax.data.shapes import Shape, choose_shapes, group, padding, round_up, wider_shapes
from vlm_jax.errors import UserError, refuse

SAMPLE = 2000  # records that are measured before the first step
WINDOW = 512  # records that are planned together, at least; and at least 8 steps
MEGABATCH = 50  # steps whose examples are sorted by length together, as in transformers


class Pipeline:
    """Batches of one set of records for one checkpoint.

    encoder: an `Encoder`, or a checkpoint directory with `options` for one.
    records: what `read_records` takes.
    rows: rows of the global batch. micro_batches: into how many of them a step cuts it.
    max_length: tokens of a row at most. Needed for packing, and where there are more than 2,000
        records. What is longer is treated by the encoder's `overlong` policy, never cut.
    max_patches: likewise of patches; by default as many as the tokens of a row stand for.
    packing: whether a row holds several examples, see `vlm_jax.data.packing`.
    max_shapes: how many (tokens, patches) shapes there may be, each of them one compilation. The
        last one is the largest that is foreseen, so that memory runs out at the start; a record
        that was not measured then and has more patches makes a wider shape of its step.
    shuffle: a new order each epoch; False keeps the records' order.
    sampling: which examples make a step: "random", "sequential" (as without shuffle) or
        "group_by_length", transformers' train_sampling_strategy, whose megabatches of 50 steps
        come each from its longest example to its shortest; None: like-sized ones.
    drop_last: leave out an epoch's last rows that do not fill a micro-batch (others each epoch).
        Otherwise every example comes once an epoch. Either way a last batch with too few rows is
        filled with empty ones, whose weights are 0.
    on_bad_example: "raise" or "skip"; by default the encoder's. One whose pixels turn out damaged
        only when decoded leaves its place empty. Skipped ones are counted in `report`.
    max_bad_share: the run stops where more than this share of the records is bad.
    process_index, process_count: batches hold only this host's rows: its contiguous part of each
        global batch. Every host plans all of it, so that shapes agree.
    workers: processes that make batches; 0: a thread. A program that sets it must be importable
        (`if __name__ == "__main__":`), since processes are spawned. prefetch: batches that each
        keeps ready. threads: that decode the images of one batch, where there are no processes.

    shapes: list of (T, P), P 0 where no record has images. wider: those beyond, that only what was
    not foreseen needs. steps_per_epoch: exact without packing where all records were measured
    (2,000 or fewer), else estimated from a sample; None for a stream, whose order is its own, and
    whose sample is its beginning. Raises `UserError` for bad records (see `Encoder`) and where
    nothing is left.
    """

    def __init__(
        self,
        encoder: Encoder | str | Path,
        records: Any,
        *,
        rows: int,
        micro_batches: int = 1,
        max_length: int | None = None,
        max_patches: int | None = None,
        packing: bool = False,
        max_shapes: int = 4,
        seed: int = 0,
        shuffle: bool = True,
        sampling: str | None = None,
        drop_last: bool = False,
        on_bad_example: str | None = None,
        max_bad_share: float = 0.01,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        threads: int = 2,
        **options: Any,
    ):
        if not isinstance(encoder, Encoder):
            encoder = Encoder(encoder, **options)
        elif options:
            raise UserError(f"Options {sorted(options)} belong to the Encoder, which was given.")
        length = _least(max_length, encoder.max_seq_length)
        refuse(
            (
                rows < 1 or max_shapes < 1 or workers < 0 or prefetch < 1 or threads < 1,
                "rows, max_shapes, prefetch, threads must be 1 or more, workers 0.",
            ),
            (
                rows % process_count or not 0 <= process_index < process_count,
                f"A global batch of {rows} rows does not divide among {process_count} processes "
                f"(this is number {process_index}): make it a multiple.",
            ),
            (
                micro_batches < 1 or rows % micro_batches,
                f"{rows} rows do not divide into {micro_batches} micro-batches.",
            ),
            (
                packing and length is None,
                "Packing needs to know how long a row is: set data.max_seq_length, its tokens.",
            ),
        )
        self.encoder = encoder = encoder.replace(
            max_seq_length=length, max_patches=_least(max_patches, encoder.max_patches)
        )
        self.streaming = isinstance(records, Stream)
        self.records: Records | Mixture | Stream = (
            copy.copy(records)  # with a place of its own in it
            if isinstance(records, Stream)
            else read_records(records, encoder.image_folder)
        )
        self.rows, self.making = rows, Making(workers, prefetch, threads)
        share = rows // process_count
        self.mine = slice(process_index * share, (process_index + 1) * share)
        self.max_bad_share = max_bad_share
        self.measures = self._open_measures()
        self.measurer = Measurer(
            encoder,
            self.records,
            self.measures,
            skip_bad=(on_bad_example or encoder.on_bad_example) == "skip",
        )
        self.damaged: dict[int, Skipped] = {}  # found when their pixels were decoded

        sampled = self._sample(seed)
        self.all_measured = not self.streaming and len(sampled) == self.measures.count
        if not self.all_measured and encoder.max_seq_length is None:
            raise UserError(
                f"Of the records of '{self.records.name}' only {SAMPLE} are measured before "
                f"training starts: set data.max_seq_length, the most tokens a row may have."
            )
        kept = self._measure(sampled)
        if len(kept) == 0:
            why = " ".join(f"{one.reason}: {one.why}" for one in self._first_dropped())
            raise UserError(
                f"None of the {len(sampled)} records that were looked at can be trained on. The "
                f"first of each kind of trouble: {why}"
            )
        sizes = self.measures.sizes(kept)[:, :2]
        capacity, self.shapes, self.wider = self._choose_shapes(sizes, max_shapes, kept, packing)
        packed = len(sizes) if capacity is None else len(pack(sizes, capacity))
        shuffle = shuffle and sampling != "sequential"
        visits = (  # of records in an epoch: a mixture may visit one twice, or not
            math.inf
            if isinstance(self.records, Stream)
            else len(self.records.order(seed, 0, shuffle))
        )
        window = (
            rows * max(1, int(min(MEGABATCH, visits / (4 * rows))))
            if sampling == "group_by_length"
            else max(WINDOW, int(8 * rows * (len(kept) / packed)))  # 8 steps of examples
        )
        self.planner = Planner(
            measurer=self.measurer,
            rows=rows,
            micro=rows // micro_batches,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            shapes=self.shapes + self.wider,
            capacity=capacity,
            window=window,
            sampling=sampling,
        )
        self.steps_per_epoch = (
            None if self.streaming else self._count_steps(visits / len(sampled), packed)
        )

    # What is there

    @property
    def report(self) -> dict[str, Any]:
        """Counts of what is known so far, JSON-able.

        records, measured; examples (measured and kept); dropped {reason: count} and first_dropped
        {reason: why}; shrunk, turns_dropped: examples that were made to fit; tokens,
        answer_tokens, patches (sums), longest (tokens); packing; padding and patch_padding: the
        shares of slots that stay empty in epoch 0.
        """
        everything = np.arange(self.measures.count)
        kept = self.measures.kept(everything)
        table = self.measures.sizes(kept)
        sizes = rows = table[:, :2]
        if self.all_measured:
            steps = [
                (np.searchsorted(kept, np.sort(np.concatenate(step.rows).astype(int))), step.shape)
                for step in self.planner.epoch({"epoch": 0, "step": 0})
            ]
        else:
            if self.planner.capacity is not None:
                rows = row_sizes(pack(sizes[: 4 * SAMPLE], self.planner.capacity), sizes)
            steps = group(rows, self.rows, self.planner.shapes)
        shares = padding(steps, rows, self.rows)
        counts = {reason: len(found) for reason, found in self.measures.reasons().items()}
        dropped = collections.Counter(one.reason for one in self.damaged.values())
        tokens, patches, answers, _ = (int(n) for n in table.sum(0))
        return {
            "records": self.measures.count,
            "measured": len(everything) - len(self.measures.unknown(everything)),
            "examples": len(kept) - len(self.damaged),
            "dropped": dict(collections.Counter(counts) + dropped),
            "first_dropped": {one.reason: one.why for one in self._first_dropped()},
            "shrunk": int((table[:, 3] & SHRUNK > 0).sum()),
            "turns_dropped": int((table[:, 3] & TURNS_DROPPED > 0).sum()),
            "tokens": tokens,
            "answer_tokens": answers,
            "patches": patches,
            "longest": int(sizes[:, 0].max()),
            "packing": self.planner.capacity is not None,
            "padding": round(shares[0], 4),
            "patch_padding": round(shares[1], 4),
            "shapes": [list(shape) for shape in self.shapes],
            "steps_per_epoch": self.steps_per_epoch,
        }

    @property
    def may_have_images(self) -> bool:
        """Whether a record may have an image or video: False where all were measured, none has."""
        kept = self.measures.kept(np.arange(self.measures.count))
        return not self.all_measured or bool(self.measures.sizes(kept)[:, 1].any())

    def skipped(self) -> Iterator[Skipped]:
        """Yield every record that is known to be left out."""
        for reason, found in self.measures.reasons().items():
            for index in found.tolist():
                yield Skipped(index, reason, self.measurer.why(index))
        yield from self.damaged.values()

    # What comes

    def batches(
        self, state: State | None = None, bytes_only: bool = False
    ) -> Iterator[tuple[Batch, list[str], State]]:
        """Yield (batch, example ids, next state) without end, epoch after epoch.

        batch: numpy, this host's rows. ids: of the examples in it, row by row. next state:
        JSON-able; `batches(next state)` continues after this batch, bit for bit, with any number of
        workers, without decoding or measuring what came before its window. Begin with None or
        {"epoch": 0, "step": 0}. Raises `UserError` where the state belongs to other records or
        another batch size. bytes_only: with patches in uint8, for `models.pixel_table` to give them
        their values where they are used; of one frame where no row of the step holds a video.
        """
        next(iter(self.planner.steps(state)))  # a state that does not fit is refused at once
        steps = Steps(self.planner, self.mine, self.making, state, bytes_only=bytes_only)
        for batch, made in self._made(steps):
            yield batch, made.ids, made.step.after

    def eval_batches(self, bytes_only: bool = False) -> Iterator[tuple[Batch, list[str]]]:
        """Yield (batch, example ids) once over every example, shortest first; rows are not packed.

        The last batch of rows is filled with empty rows, whose weights are 0.
        """
        steps = Steps(
            self.planner, self.mine, self.making, steps=self.eval_steps(), bytes_only=bytes_only
        )
        for batch, made in self._made(steps):
            yield batch, made.ids

    def eval_steps(self) -> list[Step]:
        """Return the steps that `eval_batches` makes; measures every record."""
        if self.streaming:
            raise UserError("A stream cannot be evaluated on: give a file or data set by its name.")
        kept = self._measure(np.arange(self.measures.count))
        sizes = self.measures.sizes(kept)
        return [
            Step(
                rows=[[int(index)] for index in kept[members]],
                shape=shape,
                after={},
                still=not (sizes[members, 3] & FILMED).any(),
            )
            for members, shape in group(sizes[:, :2], self.rows, self.planner.shapes)
        ]

    # Planning

    def _open_measures(self) -> Measures:
        records = self.records
        if isinstance(records, Stream):
            return StreamMeasures(0, path="")
        sources = [p.records for p in records.parts] if isinstance(records, Mixture) else [records]
        folders = [str(Path(source.folder or "").resolve()) for source in sources]
        settings = {**self.encoder.settings, "folders": folders}
        return Measures(len(records), measures_file(records.name, records.fingerprint, settings))

    def _sample(self, seed: int) -> np.ndarray:
        """Return the records that shapes are chosen by."""
        return (
            next(self.records.windows(0, SAMPLE), (np.arange(0), True))[0]
            if isinstance(self.records, Stream)
            else sample(len(self.records), SAMPLE, seed)
        )

    def _measure(self, indices: np.ndarray) -> np.ndarray:
        """Measure records, the first that come up, and return those that are not left out."""
        self.measurer.measure(indices, self.making.threads)
        self._sampled = len(indices), self.measurer.bad(indices)
        self._check_share(*self._sampled)
        return self.measures.kept(indices)

    def _choose_shapes(
        self, sizes: np.ndarray, max_shapes: int, kept: np.ndarray, packing: bool
    ) -> tuple[Shape | None, list[Shape], list[Shape]]:
        """Return the capacity of a packed row, None without packing; the ladder of shapes that the
        sample asks for; and those beyond it, for what the sample did not foresee."""
        unit = self.encoder.config.patch_unit
        length, limit = self.encoder.max_seq_length, self.encoder.max_patches
        tokens, patches = (int(n) for n in sizes.max(0))
        most = round_up(self.encoder.config.patches_of(length or tokens), unit)  # its tokens'
        if limit is not None:
            most = min(most, max(limit // unit, 1) * unit)
        if not self.all_measured:
            records = [self.records[int(i)] for i in kept]
            # A stream's beginning may hold none, and its rest many.
            images = max(int(self.streaming), *(len(record["images"]) for record in records))
            films = max(len(record["videos"]) for record in records)
            tokens = length or tokens
            patches = max(patches, self.encoder.most_patches(images, films))
        tokens, patches = round_up(tokens), min(round_up(patches, unit), most)
        if length is not None:
            tokens = min(tokens, length)
        capacity = None
        if packing:
            assert length is not None
            capacity = length, patch_capacity(sizes, length, most, unit)
            tokens, patches = length, max(patches, capacity[1])
            sizes = row_sizes(pack(sizes, capacity), sizes)
        cap = tokens, patches
        wider = [] if self.all_measured else wider_shapes(cap, most, unit)
        return capacity, choose_shapes(sizes, cap, max_shapes, unit), wider

    def _count_steps(self, share: float, packed: int) -> int:
        """Return the steps of an epoch, which visits `share` times what makes `packed` rows."""
        micro, rows = self.planner.micro, share * packed
        steps = -(-(rows // micro * micro if self.planner.drop_last else rows) // self.rows)
        if steps == 0:
            raise UserError(
                f"{packed} rows do not fill one micro-batch of {micro} rows, and drop_last leaves "
                f"out what does not: make the batch smaller or set drop_last to false."
            )
        planned = self.planner.epoch({"epoch": 0, "step": 0})
        return sum(1 for _ in planned) if self.all_measured else int(steps)

    def _made(self, source: Steps) -> Iterator[tuple[Batch, Made]]:
        """Yield batches; take note of what went wrong in them."""
        seen, bad = self._sampled
        for batch, made in batches(source, self.making):
            new = {one.index: one for one in made.skipped if one.index not in self.damaged}
            self.damaged |= new
            if not self.all_measured:  # else all have been counted at the start
                seen, bad = seen + made.step.seen, bad + made.step.bad
            bad += len(new)
            self._check_share(seen, bad)
            yield batch, made

    def _first_dropped(self) -> list[Skipped]:
        """Return the first record of each reason."""
        first = {
            reason: Skipped(int(found[0]), reason, self.measurer.why(int(found[0])))
            for reason, found in self.measures.reasons().items()
        }
        for one in self.damaged.values():
            first.setdefault(one.reason, one)
        return list(first.values())

    def _check_share(self, seen: int, bad: int) -> None:
        """Raise `UserError` where more of the records that came up are bad than may be."""
        if bad > self.max_bad_share * seen:
            bad_ones = (o.why for o in self._first_dropped() if o.reason not in ALWAYS_DROPPED)
            raise UserError(
                f"{bad} of the {seen} records of '{self.records.name}' that came up "
                f"are bad, more than data.max_bad_share = {self.max_bad_share:g}. The first: "
                f"{next(bad_ones, '')} Repair them, or allow a larger share."
            )


def _least(*limits: int | None) -> int | None:
    return min((n for n in limits if n is not None), default=None)
