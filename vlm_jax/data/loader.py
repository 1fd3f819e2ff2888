"""The loader: batches of planned steps, made by Grain in worker processes or in a thread.

Each worker plans for itself, so that what travels between processes is a step's number one way
and its arrays the other.
"""

import dataclasses
import functools
import os
import signal
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
    dataset: Any = grain.MapDataset.source(source)
    if making.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads some, which no program here defines
            flags.FLAGS.mark_as_parsed()
        _start_quiet_tracker()
        options = grain.MultiprocessingOptions(
            num_workers=making.workers, per_worker_buffer_size=making.prefetch
        )
        alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = dataset.to_iter_dataset(alone).mp_prefetch(
            options, functools.partial(_quiet_worker, os.getpid())
        )
    else:
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=making.prefetch)
        dataset = dataset.to_iter_dataset(ahead)
    iterator = iter(dataset)
    try:
        for arrays, made in iterator:
            batch = Batch(**arrays)
            yield pad_patches(batch) if making.workers else batch, made
    finally:
        if making.workers:
            iterator.close()
        source.close()


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
        self.planner, self.mine, self.state, self.steps = planner, mine, state, steps
        self.bytes_only = bytes_only
        self.workers, self.threads = making.workers, making.threads
        self._begin()

    def _begin(self) -> None:
        self._plan: Iterator[Step] | None = None
        self._next = 0
        self._pool: ThreadPoolExecutor | None = None
        self._lock, self._closed = threading.Lock(), False

    def __getstate__(self) -> dict[str, Any]:
        private = ("_plan", "_next", "_pool", "_lock", "_closed")
        return {name: value for name, value in self.__dict__.items() if name not in private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

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
                self._pool = None

    def _step(self, number: int) -> Step:
        if self.steps is not None:
            return self.steps[number]
        if self._plan is None or number < self._next:
            share = number % self.workers / self.workers if self.workers else 0.0
            self._plan, self._next = (
                dataclasses.replace(self.planner, share=share).steps(self.state),
                0,
            )
        # What is passed over is another worker's to make, but was planned here too.
        for _ in range(number - self._next):
            next(self._plan)
        self._next = number + 1
        return next(self._plan)

    def _make(self, step: Step) -> tuple[dict[str, np.ndarray], Made]:
        mine = step.rows[self.mine]
        if self._pool is None and not self.workers:
            self._pool = ThreadPoolExecutor(self.threads)
        places = [index for row in mine for index in row]
        still = self.bytes_only and step.still
        example = functools.partial(self._example, still=still)
        found = iter((self._pool.map if self._pool else map)(example, places))
        ids, skipped, rows = [], [], []
        for row in mine:
            examples: list[Example] = []
            for one in (next(found) for _ in row):
                if isinstance(one, Skipped):
                    skipped.append(one)
                else:
                    ids.append(one[0])
                    examples.append(one[1])
            rows.append(examples)
        rows += [[] for _ in range(self.mine.stop - self.mine.start - len(rows))]
        encoder = self.planner.measurer.encoder
        # Neither padding nor further frames of the same go through shared memory.
        batch = encoder.collate(rows, *step.shape, self.bytes_only, not self.workers, still)
        arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        return arrays, Made(ids, step, skipped)

    def _example(self, index: int, still: bool) -> tuple[str, Example] | Skipped:
        """Return (id, example) of a record; what is wrong with it where it proves damaged."""
        measurer = self.planner.measurer
        try:
            record = measurer.records[index]
            example = measurer.encoder.example(record, self.bytes_only, still)
            planned = measurer.measures.sizes(np.array([index]))[0]
            if planned[0] >= 0 and tuple(planned[:2]) != sizes_of(example):
                measurer.measures.forget(index)
                raise BadExample(
                    "changed",
                    f"{describe(record)} was measured as {planned[0]} tokens and {planned[1]} "
                    f"patches, and now takes {sizes_of(example)}: its images were replaced since. "
                    f"Start the run again, which measures them again.",
                )
            return record["id"], example
        except UserError as error:
            if not measurer.allowed(error):
                raise measurer.named(index, error) from error
            return Skipped(index, reason_of(error), f"In {measurer.records.place(index)}: {error}")


def sizes_of(example: Example) -> tuple[int, int]:
    """Return the tokens and patches of an example."""
    return len(example["tokens"]), len(example["patches"])


def _start_quiet_tracker() -> None:
    """Start Python's tracker of shared memory, which all processes share, without its warning.

    What is on its way from a worker when a run ends is taken back by the tracker, as it should be,
    but with a warning that some memory was leaked.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _quiet_worker(parent: int, number: int, count: int) -> None:
    """Prepare a worker process: no accelerator, no part in Ctrl-C, no life without its parent.

    Where SIGTERM comes to all processes at once, the run still does its step.
    parent: the process that started it, as that one knows itself: it may be dead by now.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told: list[float] = []  # when SIGTERM came
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(time.monotonic()))

    def watch() -> None:
        while os.getppid() == parent and not (told and time.monotonic() - told[0] > LINGER):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
