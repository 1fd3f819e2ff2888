"""The planner: the records of each step's rows, from (seed, epoch) alone.

An epoch is an order of the records, taken window by window. The rows of a window are a function
of its records (packed, or one each), whoever makes them: neither worker processes nor hosts change
a row. The rows of all windows, one after another, make the steps; so a position in the data is the
window and the row that come next.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vlm_jax.data.lengths import FILMED
from vlm_jax.data.measuring import Measurer
from vlm_jax.data.packing import pack, row_sizes
from vlm_jax.data.records.stream import Stream
from vlm_jax.data.shapes import Shape, fit, size_order
from vlm_jax.errors import UserError

State = dict[str, int]
# Of a state; row: the next of the window at the cursor; first: how many rows of that window the
# step before took.
POSITION = ("epoch", "step", "cursor", "row", "first")


class Step(NamedTuple):
    """One planned step: the records of each of its rows, its shape, the state after it.

    seen, bad: how many records came up for the first time in this pass, and how many of them are
    left out as bad. still: no record of any host's rows holds a video.
    """

    rows: list[list[int]]
    shape: Shape
    after: State
    still: bool
    seen: int = 0
    bad: int = 0


@dataclasses.dataclass
class Planner:
    """Plans steps of `rows` rows; picklable, so that each worker process plans for itself.

    sampling: None: rows of like size make a step; "random": any; "group_by_length": those of a
    window from the longest to the shortest. Only where there is `shuffle`.
    capacity: tokens and patches of a packed row; None: a row holds one example. shapes: the
    ladder, whose last one holds whatever may come, foreseen or not. window: records that are
    planned together.
    drop_last: leave out an epoch's last rows that fill no micro-batch of `micro` rows; the others
    make a step, filled up with empty rows.
    """

    measurer: Measurer
    rows: int
    micro: int
    seed: int
    shuffle: bool
    drop_last: bool
    shapes: list[Shape]
    capacity: Shape | None
    window: int
    sampling: str | None = None

    def steps(self, state: State | None = None, share: float = 0.0) -> Iterator[Step]:
        """Yield steps without end, epoch after epoch, from a state on.

        share: where in a window this process begins to measure, see `Measurer.measure`.
        Raises `UserError` where the state belongs to other records, seed or batch size.
        """
        state = dict(state or {"epoch": 0, "step": 0})
        for name, now in self._about().items():
            if state.get(name, now) != now:
                raise UserError(
                    f"The saved data position is for {name} = {state[name]}, but now {name} = "
                    f"{now}. To resume, leave data, packing, batch size and seed as they were."
                )
        if state["step"] and "cursor" not in state:
            raise UserError(
                f"The data position {state} lacks its 'cursor': give back a state as it came."
            )
        empty = 0
        while empty < 100:  # a source may be visited in few epochs only
            empty += 1
            for step in self.epoch(state, share):
                empty = 0
                yield step
            state = {"epoch": state["epoch"] + 1, "step": 0}
        raise UserError(
            f"100 epochs of '{self.measurer.records.name}' in a row gave no batch of {self.rows} "
            f"rows. Check the records that were left out, make the batch smaller, or set "
            f"training.dataloader_drop_last to false."
        )

    def epoch(self, state: State, share: float = 0.0) -> Iterator[Step]:
        """Yield the rest of an epoch's steps from a state on."""
        epoch, number, cursor, done, first = (int(state.get(name, 0)) for name in POSITION)
        ended = {**dict.fromkeys(POSITION, 0), "epoch": epoch + 1}
        waiting: list[tuple[list[int], np.ndarray]] = []  # rows of a step that is not full yet
        seen = bad = 0
        for members, last in self._windows(epoch, cursor):
            self.measurer.measure(members, share=share)
            after = cursor + len(members)
            seen, bad = seen + len(members), bad + self.measurer.bad(members)
            rows, sizes = self._rows(self.measurer.measures.kept(members))
            sequence = self._arrange(sizes, first, [self.seed, epoch, cursor], last)
            for i in range(done, len(rows)):
                waiting.append((rows[sequence[i]], sizes[sequence[i]]))
                if len(waiting) == self.rows:
                    number, left = number + 1, len(rows) - (i + 1)
                    place = (cursor, i + 1, first) if left else (after, 0, 0)
                    over = last and left < (self.micro if self.drop_last else 1)
                    here = dict(zip(POSITION, (epoch, number, *place), strict=True))
                    yield self._step(waiting, ended if over else here, seen, bad)
                    waiting, seen, bad = [], 0, 0
            first, cursor, done = -len(waiting) % self.rows, after, 0
        if self.drop_last:
            del waiting[len(waiting) // self.micro * self.micro :]
        if waiting:
            yield self._step(waiting, ended, seen, bad)

    def _step(
        self, rows: list[tuple[list[int], np.ndarray]], after: State, seen: int, bad: int
    ) -> Step:
        sizes = np.array([size for _, size in rows])
        return Step(
            rows=[row for row, _ in rows],
            shape=self.shapes[fit(sizes.max(0), self.shapes)],
            after={**after, **self._about()},
            still=not sizes[:, 2].any(),
            seen=seen,
            bad=bad,
        )

    def _windows(self, epoch: int, cursor: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Return each (records of a window, whether it is the epoch's last) from the cursor on."""
        records = self.measurer.records
        if isinstance(records, Stream):
            return records.windows(cursor, self.window)
        order = records.order(self.seed, epoch, self.shuffle)
        return (
            (order[start : start + self.window], start + self.window >= len(order))
            for start in range(cursor, len(order), self.window)
        )

    def _rows(self, kept: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
        """Return each row's records, in the order of their first record, and the rows' sizes.

        These are int [rows, 3]: tokens, patches, how many of the records hold a video.
        """
        sizes = self.measurer.measures.sizes(kept)
        sizes = np.stack([sizes[:, 0], sizes[:, 1], sizes[:, 3] & FILMED > 0], axis=1)
        if self.capacity is None:
            return [[int(index)] for index in kept], sizes
        rows = sorted(pack(sizes[:, :2], self.capacity), key=lambda row: int(row[0]))
        return [kept[row].tolist() for row in rows], row_sizes(rows, sizes)

    def _arrange(self, sizes: np.ndarray, first: int, seed: list[int], last: bool) -> np.ndarray:
        """Return the order in which a window's rows come.

        Rows of like size make a step together, steps in random order; the `first` rows, which
        fill the step that the window before began, and those that begin the next window's are the
        cheapest. Those that `drop_last` leaves out of the last window come at the end: they are
        drawn, or it would be the same cheapest ones in each epoch. With another `sampling` the
        order is its own.
        """
        if not self.shuffle or self.sampling == "random" or len(sizes) == 0:
            return np.arange(len(sizes))
        if self.sampling == "group_by_length":
            return np.argsort(-sizes[:, 0], stable=True)
        rng = np.random.default_rng(seed)
        order = size_order(sizes, self.shapes)
        dropped = np.arange(0)
        if self.drop_last and last:
            count = (len(sizes) - first) % self.micro  # what waits is all rows of a step but these
            dropped = rng.choice(len(sizes), min(count, len(sizes)), replace=False)
            order = order[~np.isin(order, dropped)]
        head, rest = order[:first], order[first:]
        over = len(rest) % self.rows
        groups = rng.permutation(rest[over:].reshape(-1, self.rows))
        return np.concatenate([head, groups.reshape(-1), rest[:over], dropped])

    def _about(self) -> State:
        """Return what a state must agree on."""
        records = self.measurer.records
        return {
            "records": -1 if isinstance(records, Stream) else len(records),
            "rows": self.rows,
            "seed": self.seed,
            "packed": 0 if self.capacity is None else self.capacity[0],
        }
