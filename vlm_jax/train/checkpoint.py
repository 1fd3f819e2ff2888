"""Checkpoints of a run: trainable leaves, optimizer, rng and data position, by orbax.

The frozen base is not in them, so a checkpoint carries the base's identity and refuses another.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlm_jax.distributed import processes
from vlm_jax.errors import UserError, first_line
from vlm_jax.train.fingerprint import BEFORE
from vlm_jax.train.moments import kept_otherwise
from vlm_jax.train.progress import tell_failed_saves_once
from vlm_jax.train.run_dir import SEEN_WITHIN
from vlm_jax.train.selection import Best, kept
from vlm_jax.train.step import TrainState, is_key

FORMAT = 2  # of what a checkpoint says of itself; 1 knew a base by three samples of each file
TRASH = "deleted"  # where old checkpoints go first, at once: removing one takes a while
PATIENCE = 10.0  # seconds that a failed process gives what is being written
META = ("meta", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())  # a name, and how it is read


def flat_state(state: Any) -> dict[str, Any]:
    """Return {path: array} of the leaves of a state, or of part of one; the rng as its key data.

    Flat, because orbax then needs to know nothing of optax's types, and a mismatch has a name.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            jax.random.key_data(leaf) if is_key(leaf) else leaf
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _unflat(flat: Mapping[str, Any], like: Any) -> Any:
    """Return a tree as `like` of the leaves of `flat_state`, which are in its order."""
    leaves, treedef = jax.tree.flatten(like)
    new = (
        jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if is_key(leaf) else value
        for leaf, value in zip(leaves, flat.values(), strict=True)
    )
    return jax.tree.unflatten(treedef, new)


class Damaged(UserError):
    """A checkpoint that cannot be read."""


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run, in `directory/<step>`; each appears whole or not at all.

    identity: what must be equal when the run is resumed, as nested dicts of JSON values; any
    difference is refused and named. keep: how many are kept, the newest; 0 keeps all. best: how
    the one is found that stays whatever comes after it; None: there is none. directory: absolute,
    or the address of a bucket; there `claim` is checked before each save. settings: what a resumed
    run takes again but may change.
    They are written while the run continues. Several processes write one together, which is there
    when all have written their part; a failure is raised when the next one begins, or by `close`.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        identity: Mapping[str, Any],
        keep: int = 0,
        best: Best | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.directory = epath.Path(directory)
        self.settings = dict(settings or {})
        self.identity = json.loads(json.dumps(identity))
        self.keep, self.best = keep, best
        self.claim: Callable[[], None] | None = None  # of `Places.claim`
        self.wrote = False
        tell_failed_saves_once()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            todelete_subdir=TRASH,
            async_options=ocp.AsyncOptions(timeout_secs=processes.EVER, barrier_sync_fn=_barrier),
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options)
        self.evaluations: dict[int, Mapping[str, float]] = {}
        self._look()

    @property
    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, oldest first."""
        return sorted(self.manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; None where none has a value, or none is asked for."""
        return self._best_of(self.steps)

    def _best_of(self, steps: Sequence[int]) -> int | None:
        there = {step: found for step, found in self.evaluations.items() if step in steps}
        return None if self.best is None else self.best.step(there)

    def _look(self) -> None:
        """Read what the directory holds, until this process sees what the first one does.

        Raises `UserError` where that takes more than `SEEN_WITHIN` seconds.
        """
        self.manager.reload()
        found: dict[int, Mapping[str, float]] = {}
        if self.best is not None and processes.is_primary():
            for step in self.steps:
                with contextlib.suppress(Damaged):  # `restore` reports it
                    meta = self._read_here(step, *META)
                    found[step] = meta.get("evaluation", {})
                    found |= {at: those for at, those in meta.get("earlier", ()) if at in found}
        steps, values = processes.gather("checkpoints", [self.steps, list(found.items())])[0]
        self.evaluations = dict(values)
        end = time.monotonic() + SEEN_WITHIN
        while self.steps != steps:
            if time.monotonic() > end:
                raise UserError(
                    f"Process {processes.number()} sees the checkpoints {self.steps} in "
                    f"'{self.directory}' where process 0 sees {steps}. All hosts must share the "
                    f"directory: look whether its file system is mounted everywhere."
                )
            time.sleep(0.2)
            self.manager.reload()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return which checkpoints stay: orbax asks this as its preservation policy."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = kept(steps, self.keep, self._best_of(steps))
        return [step in stay for step in steps]

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: Mapping[str, Any],
        evaluation: Mapping[str, float] | None = None,
        patience: Mapping[str, Any] | None = None,
        pending: bool = False,
    ) -> epath.Path:
        """Begin the checkpoint of `step` unless it is there, and return its directory.

        The state is on the host when this returns, so that the next step may donate it. The
        directory appears when all of it is written, at the latest by `close`. Raises what went
        wrong with the save before. evaluation: of this state; without it it cannot be the best. One
        that comes when the checkpoint is there counts too, and stands in the next one. patience:
        what all evaluations so far say about stopping early. pending: whether one is still to come.
        """
        if evaluation is not None:
            self.evaluations[step] = evaluation
        if step not in self.steps:
            if self.claim is not None:
                self.claim()
            self.finish()
            self._empty_trash()
            meta = {
                "format": FORMAT,
                "data": dict(data_state),
                "identity": self.identity,
                "settings": self.settings,
                "shapes": {name: _shape(leaf) for name, leaf in flat_state(state).items()},
                "evaluation": dict(evaluation or {}),
                "earlier": [item for item in self.evaluations.items() if item[0] < step],
                "patience": dict(patience or {}),
                "pending": pending,
            }
            self.wrote = True
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flat_state(state)), meta=ocp.args.JsonSave(meta)
                ),
            )
        return self.directory / str(step)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """Return `(state, data_state)` of the newest checkpoint, or of `step`, bit for bit.

        like: a state of the same structure, whose shardings the arrays take. Moments of AdamW may
        have been saved in pages and be whole in it, or the other way round.
        Raises `UserError` where the identity, a leaf or a shape differs, saying which.
        """
        step = self.manager.latest_step() if step is None else step
        if step is None:
            raise UserError(f"There is no checkpoint in '{self.directory}'.")
        return self._restored(like, step)

    def restore_trainable(self, like: Any, step: int, kept: str = "trainable") -> Any:
        """Return the trainable leaves of the checkpoint of `step` alone, as `restore` does.

        kept: "ema" for their average.
        """
        return self._restored({kept: like}, step, f"{kept}.")[0][kept]

    def _restored(self, like: Any, step: int, prefix: str = "") -> tuple[Any, dict]:
        """Return the leaves of `like`, all whose names begin with the prefix, and `data_state`."""
        self.finish()
        meta, saved = self._check(step, flat_state(like), prefix)
        targets = {name: struct for name, (struct, _) in saved.items()}
        args = ocp.args.PyTreeRestore(
            targets,
            ocp.checkpoint_utils.construct_restore_args(targets),
            partial_restore=True,
        )
        found = self._read(step, "state", ocp.PyTreeCheckpointHandler, args)
        # Taken out one by one: what is turned does not stay beside what it was.
        leaves = {name: turn(found.pop(name)) for name, (_, turn) in saved.items()}
        return _unflat(leaves, like), meta["data"]

    def meta(self, step: int) -> dict[str, Any]:
        """Return what the checkpoint of `step` says of itself, see `save`."""
        return self._read(step, *META)

    def _check(
        self, step: int, wanted: Mapping[str, Any], prefix: str = ""
    ) -> tuple[dict[str, Any], dict[str, "Saved"]]:
        """Return a checkpoint's meta, and how it holds each leaf.

        wanted: arrays by name, all that begin with the prefix.
        Raises `UserError` where the checkpoint is not of this run's leaves.
        """
        meta, where = self.meta(step), self.directory / str(step)
        if meta.get("format") != FORMAT:
            raise UserError(
                f"The checkpoint '{where}' was written by another version of vlm_jax, whose "
                f"fingerprints of bases differ. Resume with that version, or start again "
                f"in another output_dir."
            )
        before = dict(meta["identity"])
        before["training"] = {**BEFORE, **before.get("training", {})}
        for what, now in self.identity.items():
            _compare(what, before.get(what), now, where)
        names = wanted.keys() | {name for name in meta["shapes"] if name.startswith(prefix)}
        saved = {}
        for name in sorted(names, key=lambda name: (not name.startswith("trainable"), name)):
            leaf, shape = wanted.get(name), meta["shapes"].get(name, "nothing")
            found = None if leaf is None else _saved(name, leaf, shape)
            if found is None:
                raise UserError(
                    f"The checkpoint '{where}' holds '{name}' as {shape}, but this run needs "
                    f"{'nothing' if leaf is None else _shape(leaf)}. It belongs to another model "
                    f"or training table; resume with the config it was made with, or choose a new "
                    f"output_dir."
                )
            saved[name] = found
        return meta, {name: saved[name] for name in wanted}

    def restore_newest(self, like: TrainState, warn: Callable[[str], None]) -> tuple:
        """Return `restore`'s of the newest checkpoint that can be read.

        A damaged one is renamed to `damaged-<step>`, so that its step can be saved again, and
        `warn` is called. Raises `UserError` where there is none before it.
        """
        while True:
            try:
                return self.restore(like)
            except Damaged as error:
                if len(self.steps) < 2:
                    raise
                newest, before = self.steps[-1], self.steps[-2]
                aside = self._put_aside(newest)
                warn(
                    f"Warning: {error} It is now called '{aside}', and the run resumes from "
                    f"the one before, step {before}."
                )

    def _empty_trash(self) -> None:
        """Remove old checkpoints, of which a kill may leave a part. In a bucket there are none."""
        trash = self.directory / TRASH
        if processes.is_primary() and trash.is_dir():
            with contextlib.suppress(OSError):  # NFS keeps files that are open: the next time
                trash.rmtree()

    def _put_aside(self, step: int) -> str:
        """Rename a checkpoint and return its new name. All processes call it, the first does."""
        aside = self.directory
        if processes.is_primary():
            ends = ("", *(f".{n}" for n in range(1, 99)))
            names = (self.directory / f"damaged-{step}{end}" for end in ends)
            aside = next(name for name in names if not name.exists())
            (self.directory / str(step)).rename(aside)
        name = processes.gather("damaged checkpoint", aside.name)[0]
        self._look()
        return name

    def _read(self, step: int, *item: Any) -> Any:
        """Return what `_read_here` does; where one process finds damage all raise `Damaged`."""
        found, damage = None, None
        try:
            found = self._read_here(step, *item)
        except Damaged as error:
            damage = error
        damages = processes.gather("a checkpoint was read", None if damage is None else str(damage))
        for words in filter(None, damages):
            raise Damaged(words) from damage
        return found

    def _read_here(self, step: int, item: str, handler: Callable[[], Any], args: Any) -> Any:
        """Return what an orbax handler reads of a checkpoint.

        By itself, not through the manager, whose `restore` ends with a collective: processes that
        have read would wait in it for one that could not.
        """
        try:
            with contextlib.closing(handler()) as reader:
                return reader.restore(self.manager.directory / str(step) / item, args=args)
        except Exception as error:  # orbax and tensorstore raise many unrelated types
            machine = isinstance(error, OSError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            if machine and not isinstance(error, FileNotFoundError):
                raise  # the checkpoint may be whole
            raise Damaged(
                f"The checkpoint '{self.directory / str(step)}' is damaged and cannot be read "
                f"({first_line(error)}). Delete it to resume from the one before, or start again "
                f"in another output_dir."
            ) from error

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or processes.count() == 1:
            self.close()
        else:
            # What was begun is finished by threads of all processes, whose programs may wait for
            # this one meanwhile. If another one is dead it never is, and the error must be raised.
            with contextlib.suppress(Exception):
                processes.returned(self.finish, time.monotonic() + PATIENCE)

    def finish(self) -> None:
        """Wait until what was begun is written."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written."""
        self.manager.close()
        if self.wrote:
            self._empty_trash()


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Wait until the saves of all processes have come to `key`, unless this one's has failed.

    Orbax waits after a failure too, and would tell it when the others come: but these wait for
    what failed. No program runs on a device for it, as one would beside the step's.
    """
    if processes.count() > 1 and sys.exception() is None:
        processes.client().wait_at_barrier(key, timeout_ms)


# A leaf as a checkpoint holds it, with a sharding to read it in, and what makes it this run's.
Saved = tuple[jax.ShapeDtypeStruct, Callable[[jax.Array], jax.Array]]


def _saved(name: str, leaf: Any, shape: str) -> Saved | None:
    """Return how a checkpoint holds a leaf, given `_shape`'s word of it; None: not at all."""
    if shape == _shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), lambda x: x
    dtype, bracket, sizes = shape.partition("[")
    moment = name.startswith("opt_state.") and dtype == np.dtype(leaf.dtype).name
    return kept_otherwise(leaf, tuple(json.loads(bracket + sizes))) if moment else None


def _shape(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _compare(what: str, saved: Any, now: Any, where: epath.Path) -> None:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in sorted(saved.keys() | now.keys()):
            _compare(f"{what}.{key}", saved.get(key), now.get(key), where)
    elif saved != now:
        raise UserError(
            f"The checkpoint '{where}' cannot be resumed: '{what}' was {saved!r} when it was "
            f"written and is {now!r} now. Resume with what it was made with, or choose a new "
            f"output_dir."
        )
