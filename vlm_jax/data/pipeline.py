"""Batches in an order that is planned from (seed, epoch), and resumes where it stopped.

An epoch is a permutation of the records, taken window by window. A window's examples are measured
(text and image headers only), grouped into steps of like size, and the steps shuffled. What a
step holds is thus a function of the plan alone; threads only materialise it.
"""

import collections
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.batch import Batch, Example
from vlm_jax.data.encode import BadExample, Encoder, describe
from vlm_jax.data.mixture import Mixture, Records
from vlm_jax.data.shapes import Shape, choose_shapes, group, padding, round_up
from vlm_jax.data.sources import read_records
from vlm_jax.errors import UserError

State = dict[str, int]
SAMPLE = 2000  # records that are measured before the first step
WINDOW = 512  # examples that are grouped by size together; at least 8 steps
ALWAYS_DROPPED = ("too_long", "too_many_patches")
UNKNOWN, DROPPED = -1, -2  # in place of a record's tokens


class Step(NamedTuple):
    """One planned step: the records of its rows, its shape, and the state after it."""

    records: list[int]
    shape: Shape
    after: State


class Pipeline:
    """Batches of one set of records for one checkpoint.

    encoder: an `Encoder`, or a checkpoint directory with `options` for one.
    records: what `read_records` takes.
    rows: rows of the global batch. Each row holds one example; `collate` is ready for more.
    max_length: the most tokens a row may have; longer examples are dropped and counted, never cut.
        Needed where there are more than 2,000 records.
    max_patches: likewise of patches; by default what the largest images of the sample take.
    max_shapes: how many (tokens, patches) shapes there may be, each of them one compilation. The
        last one is the largest that can come, so memory runs out at the start or never.
    shuffle: a new order each epoch and like-sized examples together; False keeps the records'
        order.
    drop_last: leave out an epoch's last examples that do not fill a batch (others each epoch).
        Otherwise the last batch is filled with empty rows, whose weights are 0: every example
        comes once an epoch.
    on_bad_example: "raise" or "skip"; by default the encoder's. One whose pixels turn out damaged
        only when decoded leaves an empty row. Skipped ones are counted in `report`.
    process_index, process_count: batches hold only this host's rows: its contiguous part of each
        global batch. Every host plans all of it, so that shapes agree.
    workers, prefetch: threads that decode, and steps they keep ready.

    shapes: list of (T, P). steps_per_epoch: exact where all records were measured (2,000 or
    fewer), else estimated from a sample. Raises `UserError` for bad records (see `Encoder`) and
    where nothing is left.
    """

    def __init__(
        self,
        encoder: Encoder | str | Path,
        records: Any,
        *,
        rows: int,
        max_length: int | None = None,
        max_patches: int | None = None,
        max_shapes: int = 4,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        on_bad_example: str | None = None,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 4,
        prefetch: int = 2,
        **options: Any,
    ):
        if not isinstance(encoder, Encoder):
            encoder = Encoder(encoder, **{"max_seq_length": max_length, **options})
        elif options:
            raise UserError(f"Options {sorted(options)} belong to the Encoder, which was given.")
        if rows < 1 or max_shapes < 1 or workers < 1 or prefetch < 1:
            raise UserError("rows, max_shapes, workers and prefetch must each be 1 or more.")
        if rows % process_count or not 0 <= process_index < process_count:
            raise UserError(
                f"A global batch of {rows} rows does not divide among {process_count} processes "
                f"(this is number {process_index}): make it a multiple."
            )
        self.encoder = encoder
        self.records: Records | Mixture = read_records(records, encoder.image_folder)
        self.rows, self.seed, self.shuffle, self.drop_last = rows, seed, shuffle, drop_last
        self.skip_bad = (on_bad_example or encoder.on_bad_example) == "skip"
        self.process_index, self.process_count = process_index, process_count
        self.workers, self.prefetch = workers, prefetch
        limits = [n for n in (max_length, encoder.max_seq_length) if n is not None]
        self.max_length = min(limits) if limits else None
        self.max_patches = max_patches
        self._sizes = np.full((len(self.records), 3), UNKNOWN, np.int64)  # tokens, patches, answers
        self._dropped: dict[int, str] = {}
        self._first: dict[str, str] = {}
        self._lock = threading.Lock()

        sample = np.arange(len(self.records))
        self.all_measured = len(sample) <= SAMPLE
        if not self.all_measured:
            if self.max_length is None:
                raise UserError(
                    f"There are {len(sample)} records, of which only {SAMPLE} are measured before "
                    f"training starts: set data.max_seq_length, the most tokens a row may have."
                )
            chosen = np.random.default_rng([seed, SAMPLE]).choice(len(sample), SAMPLE, False)
            sample = np.sort(chosen)
        with ThreadPoolExecutor(workers) as pool:
            self._measure(sample, pool)
        self.shapes = self._choose_shapes(sample, max_shapes)
        kept = len(self._kept(sample))
        if not self.all_measured:
            kept = int(len(self.records) * kept / len(sample))
        self.steps_per_epoch = kept // rows if drop_last else -(-kept // rows)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{kept} examples do not fill one batch of {rows} rows, and drop_last leaves out "
                f"what does not: make the batch smaller or set drop_last to false."
            )

    # What is there

    @property
    def report(self) -> dict[str, Any]:
        """Counts of what is known so far, JSON-able.

        records, measured; examples (measured and kept); dropped {reason: count} and first_dropped
        {reason: why}; tokens, answer_tokens, patches (sums), longest (tokens); padding and
        patch_padding: the shares of slots that stay empty in epoch 0.
        """
        known = np.flatnonzero(self._sizes[:, 0] != UNKNOWN)
        kept = self._kept(known)
        sizes = self._sizes[kept]
        steps = group(sizes[:, :2], self.rows, self.shapes)
        if self.all_measured:
            steps = []
            for step in self._epoch({"epoch": 0, "step": 0}, None):
                steps.append((np.searchsorted(kept, step.records), step.shape))
        shares = padding(steps, sizes[:, :2], self.rows)
        tokens, patches, answers = (int(n) for n in sizes.sum(0))
        return {
            "records": len(self.records),
            "measured": len(known),
            "examples": len(kept) - sum(index in self._dropped for index in kept.tolist()),
            "dropped": dict(collections.Counter(self._dropped.values())),
            "first_dropped": dict(self._first),
            "tokens": tokens,
            "answer_tokens": answers,
            "patches": patches,
            "longest": int(sizes[:, 0].max()),
            "padding": round(shares[0], 4),
            "patch_padding": round(shares[1], 4),
            "shapes": [list(shape) for shape in self.shapes],
            "steps_per_epoch": self.steps_per_epoch,
        }

    # What comes

    def batches(self, state: State | None = None) -> Iterator[tuple[Batch, list[str], State]]:
        """Yield (batch, example ids, next state) without end, epoch after epoch.

        batch: numpy, this host's rows. ids: of the examples in it, row by row. next state:
        JSON-able; `batches(next state)` goes on behind this batch, bit for bit, without decoding
        or measuring what came before its window. Begin with None or {"epoch": 0, "step": 0}.
        Raises `UserError` where the state belongs to other records or another batch size.
        """
        state = dict(state or {"epoch": 0, "step": 0})
        for name, now in (("records", len(self.records)), ("rows", self.rows), ("seed", self.seed)):
            if state.get(name, now) != now:
                raise UserError(
                    f"The saved data position is for {name} = {state[name]}, but now {name} = "
                    f"{now}. To resume, leave data, batch size and seed as they were."
                )

        def steps(pool: ThreadPoolExecutor) -> Iterator[Step]:
            now = state
            while True:
                yield from self._epoch(now, pool)
                now = {"epoch": now["epoch"] + 1, "step": 0}

        for batch, ids, step in self._materialise(steps):
            yield batch, ids, step.after

    def eval_batches(self) -> Iterator[tuple[Batch, list[str]]]:
        """Yield (batch, example ids) once over every example, shortest first.

        The last batch of rows is filled with empty rows, whose weights are 0.
        """

        def steps(pool: ThreadPoolExecutor) -> Iterator[Step]:
            everything = np.arange(len(self.records))
            self._measure(everything, pool)
            kept = self._kept(everything)
            for members, shape in group(self._sizes[kept, :2], self.rows, self.shapes):
                yield Step(kept[members].tolist(), shape, {})

        for batch, ids, _ in self._materialise(steps):
            yield batch, ids

    # Planning

    def _measure(self, indices: np.ndarray, pool: ThreadPoolExecutor | None) -> None:
        """Fill in the sizes of records not yet measured; drop or raise the bad ones."""
        new = indices[self._sizes[indices, 0] == UNKNOWN]
        if len(new) == 0 or pool is None:
            return
        for index, error in zip(new, pool.map(self._measure_one, new), strict=True):
            if error is None:
                continue
            reason = getattr(error, "reason", "record")
            if not self.skip_bad and reason not in ALWAYS_DROPPED:
                raise self._named(error)
            self._sizes[index, 0] = DROPPED
            self._drop(int(index), reason, error)

    def _measure_one(self, index: int) -> UserError | None:
        try:
            record = self.records[int(index)]
            size = self.encoder.measure(record)
        except UserError as error:
            return error
        for reason, what, have, limit, key in (
            ("too_long", "tokens", size.tokens, self.max_length, "max_seq_length"),
            ("too_many_patches", "patches", size.patches, self.max_patches, "max_patches"),
        ):
            if limit is not None and have > limit:
                return BadExample(
                    reason,
                    f"{describe(record)} takes {have} {what}, more than data.{key} = {limit}. "
                    f"It is not cut: raise the limit, lower data.max_pixels, or split it.",
                )
        self._sizes[index] = size.tokens, size.patches, size.answers
        return None

    def _named(self, error: UserError) -> UserError:
        """Return the error with what an example does not know: its file, and the way round it."""
        where = f"In '{self.records.name}': " if isinstance(error, BadExample) else ""
        way = "To leave such examples out, counted and reported, set data.on_bad_example=skip."
        return BadExample(getattr(error, "reason", "record"), f"{where}{error} {way}")

    def _drop(self, index: int, reason: str, error: Exception) -> None:
        with self._lock:
            self._dropped[index] = reason
            self._first.setdefault(reason, str(error))

    def _kept(self, indices: np.ndarray) -> np.ndarray:
        return indices[self._sizes[indices, 0] >= 0]

    def _choose_shapes(self, sample: np.ndarray, max_shapes: int) -> list[Shape]:
        kept = self._kept(sample)
        if len(kept) == 0:
            why = " ".join(f"{reason}: {text}" for reason, text in self._first.items())
            raise UserError(
                f"None of the {len(sample)} records that were looked at can be trained on. The "
                f"first of each kind of trouble: {why}"
            )
        sizes = self._sizes[kept, :2]
        unit = self.encoder.model.family.patch_unit(self.encoder.model.config)
        tokens, patches = (int(n) for n in sizes.max(0))
        if self.all_measured:
            tokens, patches = round_up(tokens), round_up(patches, unit)
        else:
            taken = [self.records[int(i)] for i in kept]
            images, films = (max(len(r[kind]) for r in taken) for kind in ("images", "videos"))
            tokens = self.max_length or tokens
            most = images * self.encoder.most_patches() + films * self.encoder.most_video_patches()
            patches = max(patches, most)
            merged = self.encoder.model.family.merged_patches(self.encoder.model.config)
            patches = round_up(min(patches, tokens * merged), unit)
        if self.max_patches is not None:
            patches = min(patches, max(-(-self.max_patches // unit), 1) * unit)
        if self.max_length is not None:
            tokens = min(tokens, self.max_length)
        self.max_length = tokens if self.max_length is None else self.max_length
        self.max_patches = patches
        return choose_shapes(sizes, (tokens, patches), max_shapes, unit)

    def _epoch(self, state: State, pool: ThreadPoolExecutor | None) -> Iterator[Step]:
        """Yield the rest of an epoch's steps from a state on."""
        epoch, number = int(state["epoch"]), int(state["step"])
        cursor, done = int(state.get("cursor", 0)), int(state.get("window_step", 0))
        if number and "cursor" not in state:
            raise UserError(
                f"The data position {state} lacks its 'cursor': give back a state as it came."
            )
        total = len(self.records)
        order = np.arange(total)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(total)
        while cursor < total:
            window, after = self._window(order, cursor, pool)
            steps = group(self._sizes[window, :2], self.rows, self.shapes)
            if self.shuffle:
                mixed = np.random.default_rng([self.seed, epoch, cursor]).permutation(len(steps))
                steps = [steps[i] for i in mixed]
            for i in range(done, len(steps)):
                members, shape = steps[i]
                number += 1
                end = i + 1 == len(steps)
                position = {"cursor": after, "window_step": 0}
                if not end:
                    position = {"cursor": cursor, "window_step": i + 1}
                place = {"epoch": epoch, "step": number, **position}
                if end and after == total:
                    place = {"epoch": epoch + 1, "step": 0, "cursor": 0, "window_step": 0}
                about = {"records": total, "rows": self.rows, "seed": self.seed}
                yield Step(window[np.sort(members)].tolist(), shape, {**place, **about})
            cursor, done = after, 0

    def _window(
        self, order: np.ndarray, cursor: int, pool: ThreadPoolExecutor | None
    ) -> tuple[np.ndarray, int]:
        """Return the kept records of the window that begins at `cursor`, and where it ends.

        A window is a whole number of steps; only an epoch's last one may fall short.
        """
        steps = max(8, -(-WINDOW // self.rows)) if self.shuffle else 1
        wanted = steps * self.rows
        taken: list[int] = []
        while len(taken) < wanted and cursor < len(order):
            part = order[cursor : cursor + wanted - len(taken)]
            self._measure(part, pool)
            taken += self._kept(part).tolist()
            cursor += len(part)
        if self.drop_last and len(taken) < wanted:
            taken = taken[: len(taken) // self.rows * self.rows]
        return np.array(taken, np.int64), cursor

    # Materialising

    def _materialise(self, make_steps: Any) -> Iterator[tuple[Batch, list[str], Step]]:
        """Yield each planned step's batch and ids; rows are decoded by threads, ahead of time.

        One thread plans and collates, `workers` threads decode for it.
        """
        share = self.rows // self.process_count
        mine = slice(self.process_index * share, (self.process_index + 1) * share)
        decoders, planner = ThreadPoolExecutor(self.workers), ThreadPoolExecutor(1)

        def ready() -> Iterator[tuple[Batch, list[str], Step]]:
            pending: collections.deque[tuple[Step, list[Future]]] = collections.deque()
            for step in make_steps(decoders):
                rows = [decoders.submit(self._example, index) for index in step.records[mine]]
                pending.append((step, rows))
                if len(pending) > self.prefetch:
                    yield finish(*pending.popleft())
            while pending:
                yield finish(*pending.popleft())

        def finish(step: Step, futures: list[Future]) -> tuple[Batch, list[str], Step]:
            pairs = [future.result() for future in futures]
            rows: list[list[Example]] = [[] if pair is None else [pair[1]] for pair in pairs]
            rows += [[] for _ in range(share - len(rows))]
            ids = [pair[0] for pair in pairs if pair is not None]
            return self.encoder.collate(rows, *step.shape), ids, step

        source = ready()
        try:
            queue = collections.deque(
                planner.submit(next, source, None) for _ in range(self.prefetch)
            )
            while (item := queue.popleft().result()) is not None:
                queue.append(planner.submit(next, source, None))
                yield item
        finally:
            for executor in (planner, decoders):
                executor.shutdown(wait=True, cancel_futures=True)

    def _example(self, index: int) -> tuple[str, Example] | None:
        """Return (id, example) of a record, or None where it proves damaged and that is allowed."""
        try:
            record = self.records[index]
            return record["id"], self.encoder.example(record)
        except UserError as error:
            if not self.skip_bad:
                raise self._named(error) from error
            self._drop(index, getattr(error, "reason", "record"), error)
            return None
