"""The loader: batches of planned steps, made by Grain in worker processes or in a thread.

Each worker plans for itself, so that what travels between processes is a step's number one way
and its arrays the other.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from vlm_jax.batch import Batch, Example, pad_patches
from vlm_jax.data.measuring import reason_of
from vlm_jax.data.planner import Planner, State, Step
from vlm_jax.data.records.record import BadExample, describe
from vlm_jax.errors import UserError

LINGER = 20.0  # seconds that a worker still serves its run after SIGTERM
ENDLESS = 1 << 40  # steps of a training run, as Grain counts them


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that is left out: its number, why in a word, and in a sentence."""

    index: int
    reason: str
    why: str


@dataclasses.dataclass(frozen=True)
class Made:
    """What a worker knows of a batch beside its arrays; to Grain one leaf, which stays as it is."""

    ids: list[str]
    step: Step
    skipped: list[Skipped]


@dataclasses.dataclass(frozen=True)
class Making:
    """Who makes batches. workers: processes; 0: a thread, whose images `threads` decode.

    prefetch: batches that each keeps ready.
    """

    workers: int = 0
    prefetch: int = 2
    threads: int = 2


def batches(source: "Steps", making: Making) -> Iterator[tuple[Batch, "Made"]]:
    """Yield each step's batch and what is known beside it, made ahead of time."""
    # Where processes make batches, this one reads nothing itself.
    reading = grain.ReadOptions(
        num_threads=0 if making.workers else 1,
        prefetch_buffer_size=0 if making.workers else making.prefetch,
    )
    dataset: Any = grain.MapDataset.source(source).to_iter_dataset(reading)
    if making.workers:
        flags.FLAGS.mark_as_parsed()  # Grain reads some, which no program here defines
        _start_quiet_tracker()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=making.workers, per_worker_buffer_size=making.prefetch
            ),
            functools.partial(_quiet_worker, os.getpid()),
        )
    with contextlib.closing(source), contextlib.closing(iter(dataset)) as iterator:
        for arrays, made in iterator:
            batch = Batch(**arrays)
            yield pad_patches(batch) if making.workers else batch, made


class Steps:
    """The batches from a state on by number, as a source for Grain; pickles for its workers.

    Numbers come in rising order: steps that are passed over are planned and not made.
    """

    def __init__(
        self,
        planner: Planner,
        mine: slice,
        making: Making,
        state: State | None = None,
        steps: list[Step] | None = None,
        bytes_only: bool = False,
    ):
        self._arguments = planner, mine, making, state, steps, bytes_only
        self.planner, self.mine, self.state, self.steps = planner, mine, state, steps
        self.workers, self.bytes_only = making.workers, bytes_only
        self._plan: Iterator[Step] | None = None
        self._next = 0
        self._pool = None if making.workers else ThreadPoolExecutor(making.threads)
        self._lock, self._closed = threading.Lock(), False

    def __reduce__(self) -> tuple:
        return Steps, self._arguments

    def __len__(self) -> int:
        return ENDLESS if self.steps is None else len(self.steps)

    def __getitem__(self, number: int) -> tuple[dict[str, np.ndarray], Made]:
        with self._lock:
            if self._closed:
                raise RuntimeError("These steps are closed.")  # nothing waits for what comes ahead
            return self._make(self._step(number))

    def close(self) -> None:
        """Let the threads go; when this returns, none of them looks at a record any more."""
        with self._lock:
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)

    def _step(self, number: int) -> Step:
        if self.steps is not None:
            return self.steps[number]
        if self._plan is None or number < self._next:
            share = number % self.workers / self.workers if self.workers else 0.0
            self._plan, self._next = self.planner.steps(self.state, share), 0
        # What is passed over is another worker's to make, but was planned here too.
        passed, self._next = number - self._next, number + 1
        return next(itertools.islice(self._plan, passed, None))

    def _make(self, step: Step) -> tuple[dict[str, np.ndarray], Made]:
        still = self.bytes_only and step.still
        example = functools.partial(self._example, still=still)
        places = [(i, index) for i, row in enumerate(step.rows[self.mine]) for index in row]
        found = (self._pool.map if self._pool else map)(example, [index for _, index in places])
        rows: list[list[Example]] = [[] for _ in range(self.mine.stop - self.mine.start)]
        ids, skipped = [], []
        for (i, _), one in zip(places, found, strict=True):
            if isinstance(one, Skipped):
                skipped.append(one)
            else:
                ids.append(one[0])
                rows[i].append(one[1])
        # Neither padding nor further frames of the same go through shared memory.
        batch = self.planner.measurer.encoder.collate(
            rows, *step.shape, self.bytes_only, padded=not self.workers, still=still
        )
        arrays = {name: array for name, array in vars(batch).items() if array is not None}
        return arrays, Made(ids, step, skipped)

    def _example(self, index: int, still: bool) -> tuple[str, Example] | Skipped:
        """Return (id, example) of a record; what is wrong with it where it proves damaged."""
        measurer = self.planner.measurer
        try:
            record = measurer.records[index]
            example = measurer.encoder.example(record, self.bytes_only, still)
            found = len(example["tokens"]), len(example["patches"])
            planned = measurer.measures.sizes(np.array([index]))[0]
            if planned[0] >= 0 and tuple(planned[:2]) != found:
                measurer.measures.forget(index)
                raise BadExample(
                    "changed",
                    f"{describe(record)} was measured as {planned[0]} tokens and {planned[1]} "
                    f"patches, and now takes {found}: its images were replaced since. "
                    f"Start the run again, which measures them again.",
                )
            return record["id"], example
        except UserError as error:
            if not measurer.allowed(error):
                raise measurer.named(index, error) from error
            return Skipped(index, reason_of(error), f"In {measurer.records.place(index)}: {error}")


def _start_quiet_tracker() -> None:
    """Start Python's tracker of shared memory, which all processes share, without its warning.

    What is on its way from a worker when a run ends is taken back by the tracker, as it should be,
    but with a warning that some memory was leaked.
    """
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # -W of processes started now
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


def _quiet_worker(parent: int, number: int, count: int) -> None:
    """Prepare a worker process: no accelerator, no part in Ctrl-C, no life without its parent.

    Where SIGTERM comes to all processes at once, the run still does its step.
    parent: the process that started it, as that one knows itself: it may be dead by now.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends: list[float] = []  # LINGER after each SIGTERM
    signal.signal(signal.SIGTERM, lambda number, frame: ends.append(time.monotonic() + LINGER))

    def watch() -> None:
        while os.getppid() == parent and not (ends and time.monotonic() > ends[0]):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
