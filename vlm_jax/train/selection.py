"""When a run logs, evaluates, saves and stops early, and which checkpoint is the best one."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from vlm_jax.config.specs import RunSpec
from vlm_jax.errors import UserError, refuse
from vlm_jax.train.setup import evaluates

# What an evaluation gives that can tell the better model -> whether more of it is better.
METRICS = {"loss": False, "accuracy": True}
# What evaluates loss and accuracy, among the names of evaluators, of which none is empty.
HELD_OUT = ""


@dataclasses.dataclass(frozen=True)
class Best:
    """How checkpoints are compared. metric: of METRICS. greater: whether more of it is better."""

    metric: str
    greater: bool

    def step(self, evaluations: Mapping[int, Mapping[str, float]]) -> int | None:
        """Return the step with the best value, of equal ones the earliest.

        evaluations: what was found at each step. A value that is not finite is never the best, nor
        is a step without one; None where there is no other.
        """
        sign = -1.0 if self.greater else 1.0
        found = [
            (sign * values[self.metric], step)
            for step, values in evaluations.items()
            if math.isfinite(values.get(self.metric, math.nan))
        ]
        return min(found)[1] if found else None


def best_of(config: RunSpec) -> Best | None:
    """Return how a run of this config chooses among its checkpoints; None: it takes the last.

    Raises `UserError` where it could not choose, since what it saves is not evaluated: the rules
    of transformers' TrainingArguments.
    """
    t = config.training
    if not t.load_best_model_at_end:
        return None
    asked = "training.load_best_model_at_end is true, but"
    best, by_steps = metric_of(config, asked), t.save_strategy == "steps"
    shares = t.save_steps < 1 or t.eval_steps < 1  # each rounds up for itself
    refuse(
        (
            t.eval_strategy == "no" or t.save_strategy != t.eval_strategy,
            f"{asked} training.save_strategy is {t.save_strategy} and training.eval_strategy is "
            f"{t.eval_strategy}, so not every checkpoint would be evaluated. Set both to steps, or "
            f"both to epoch.",
        ),
        (
            by_steps and shares and t.save_steps != t.eval_steps,
            f"{asked} training.save_steps is {t.save_steps} and training.eval_steps is "
            f"{t.eval_steps}: as shares of all steps they must be equal.",
        ),
        (
            by_steps and not shares and t.save_steps % t.eval_steps,
            f"{asked} training.save_steps is {t.save_steps}, which is not a multiple of "
            f"training.eval_steps, {t.eval_steps}, so not every checkpoint would be evaluated. "
            f"Make it one, for instance training.eval_steps={t.save_steps}.",
        ),
    )
    return best


def metric_of(config: RunSpec, asked: str) -> Best:
    """Return what a run of this config compares evaluations by.

    asked: the first words of the `UserError` where there is nothing to compare.
    """
    t = config.training
    metric = (t.metric_for_best_model or "loss").removeprefix("eval_")
    refuse(
        (
            not evaluates(config),
            f"{asked} there is nothing to evaluate on: set data.eval_file or data.eval_share, or "
            f"leave it out.",
        ),
        (
            metric == "accuracy" and not config.evaluation.accuracy,
            f"{asked} training.metric_for_best_model is accuracy and evaluation.accuracy is "
            f"false, so none is taken. Set evaluation.accuracy=true, or take the loss.",
        ),
    )
    return Best(metric, METRICS[metric] if t.greater_is_better is None else t.greater_is_better)


def kept(steps: Sequence[int], limit: int, best: int | None) -> set[int]:
    """Return which checkpoints stay: the newest `limit` of all steps, the best one among them.

    steps: ascending. The newest and the best stay under any limit; 0 keeps all.
    """
    if limit <= 0:
        return set(steps)
    always = {best, *steps[-1:]} - {None}
    ranked = sorted(steps, key=lambda step: (step in always, step), reverse=True)
    return set(ranked[: max(limit, len(always))])


@dataclasses.dataclass(frozen=True)
class Patience:
    """What is known of a run's evaluations so far.

    measure: the number that is looked at. limit: the run is over after so many evaluations in a
    row (`waited`) that did not better the best value before them by more than `threshold`.
    """

    measure: Best
    limit: int
    threshold: float = 0.0
    best: float | None = None
    waited: int = 0

    @property
    def over(self) -> bool:
        return self.waited >= self.limit

    @property
    def note(self) -> dict[str, Any]:
        """What `dataclasses.replace` restores it by, as JSON values."""
        return {"best": self.best, "waited": self.waited}

    def after(self, evaluation: Mapping[str, float]) -> "Patience":
        """Return what is known after an evaluation. A value that is not a number betters nothing.

        A bettering below the threshold counts as none, and yet is the value to beat from then on,
        as in transformers.
        """
        if self.measure.metric not in evaluation:  # of named evaluators alone
            return self
        value, sign = evaluation[self.measure.metric], 1 if self.measure.greater else -1
        best = -sign * math.inf if self.best is None else self.best
        gain = sign * (value - best)
        waited = 0 if self.best is None or gain > self.threshold else self.waited + 1
        return dataclasses.replace(self, best=value if gain > 0 else best, waited=waited)


def patience_of(config: RunSpec) -> Patience | None:
    """Return the rule by which a run of this config stops early; None: it does not.

    Raises `UserError` where nothing is evaluated that could stop it.
    """
    t = config.training
    if t.early_stopping_patience == 0:
        return None
    asked = f"training.early_stopping_patience is {t.early_stopping_patience}, but"
    measure = metric_of(config, asked)
    if t.eval_strategy == "no":
        raise UserError(
            f"{asked} training.eval_strategy is no: nothing is evaluated before the end. Set it to "
            f"steps or epoch."
        )
    return Patience(measure, t.early_stopping_patience, t.early_stopping_threshold)


def every(
    strategy: str, interval: float, steps_per_epoch: int, total: int, delay: float = 0.0
) -> Callable[[int], bool]:
    """Return whether a step is due: each `interval` steps, each epoch, or never.

    interval: below 1 it is a share of all `total` steps. delay: nothing is due before so many
    steps, or epochs with strategy "epoch".
    """
    steps = math.ceil(total * interval) if interval < 1 else interval
    period = {"no": 0, "steps": steps, "epoch": steps_per_epoch}[strategy]
    first = delay * steps_per_epoch if strategy == "epoch" else delay
    return lambda step: period > 0 and step % period == 0 and step >= first


class Due(NamedTuple):
    """What is done after a step, in this order: "save", "evaluate".

    candidate: the save is one that may be the best, and holds the value of that evaluation.
    """

    actions: tuple[str, ...]
    candidate: bool


@dataclasses.dataclass(frozen=True)
class Intervals:
    """At which of its `total` steps a run logs, saves and evaluates, by TrainingArguments' rules.

    evaluate: for each named evaluator, and for `HELD_OUT` where the run has held-out data.
    chooses: the best checkpoint is looked for. patient: evaluations may stop the run early.
    """

    total: int
    log: Callable[[int], bool]
    save: Callable[[int], bool]
    evaluate: Mapping[str, Callable[[int], bool]]
    chooses: bool
    patient: bool

    @classmethod
    def of(
        cls,
        t: Any,
        epoch: int,
        total: int,
        held_out: bool,
        best: Best | None,
        patience: Patience | None,
        evaluators: Mapping[str, Any] = MappingProxyType({}),
    ) -> "Intervals":
        """Return those of the section `training`. epoch: its steps. held_out: whether data is.

        evaluators: the section `evaluators`.
        """
        log = every(t.logging_strategy, t.logging_steps, epoch, total)
        evaluation = every(t.eval_strategy, t.eval_steps, epoch, total, t.eval_delay)
        ends = t.eval_strategy != "steps" or t.eval_delay <= total  # evaluated after the last step

        def own(steps: int | None) -> Callable[[int], bool]:
            if steps is None:
                return lambda step: evaluation(step) or (ends and step == total)
            at = every("steps", steps, epoch, total)
            return lambda step: at(step) or step == total

        return cls(
            total,
            lambda step: log(step) or (step == 1 and t.logging_first_step),
            every(t.save_strategy, t.save_steps, epoch, total),
            {
                **({HELD_OUT: own(None)} if held_out else {}),
                **{name: own(one.every) for name, one in evaluators.items()},
            },
            best is not None,
            patience is not None,
        )

    def saves(self, step: int) -> bool:
        """Return whether a run without a stop has a checkpoint of this step."""
        return self.save(step) or step == self.total

    def evaluations(self, step: int) -> list[str]:
        """Return what an evaluation of this step consists of, as keys of `evaluate`.

        All of them before the first step, and where a resumed run has other intervals than the one
        that left the evaluation pending.
        """
        due = [name for name, when in self.evaluate.items() if when(step)]
        return due if due and step > 0 else list(self.evaluate)

    def due(self, step: int, stopping: bool) -> Due:
        """Return what is due after a step. stopping: it is the last one, because of a signal.

        A checkpoint that may be the best holds its evaluation, and where runs stop early all hold
        what decides that: these are saved after it. Others come before it, since an evaluation
        takes time and may fail. One out of turn is no candidate: a run without a stop would
        lack it. Named evaluators decide neither.
        """
        evaluating = {name for name, when in self.evaluate.items() if when(step)}
        decides = HELD_OUT in evaluating
        candidate = decides and self.chooses and self.saves(step)
        evaluated_first = candidate or (decides and self.patient)
        order = ("evaluate", "save") if evaluated_first else ("save", "evaluate")
        wanted = {"save": self.saves(step) or stopping, "evaluate": bool(evaluating)}
        return Due(tuple(action for action in order if wanted[action]), candidate)


@dataclasses.dataclass
class Standing:
    """Where a run stands: what its next checkpoint holds.

    place: the position in the data. pending: whether this step is still to be evaluated.
    evaluation: the newest one's values.
    """

    state: Any
    pending: bool
    patience: Patience | None
    step: int = 0
    place: dict[str, int] = dataclasses.field(default_factory=lambda: {"epoch": 0, "step": 0})
    evaluation: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether the run stops early here."""
        return self.patience is not None and self.patience.over

    def restore(self, checkpoints: Any, evaluates: bool, warn: Callable[[str], None]) -> None:
        """Go on from the newest checkpoint that can be read."""
        self.state, self.place = checkpoints.restore_newest(self.state, warn)
        self.step = int(self.state.step)
        meta = checkpoints.meta(self.step)
        self.pending = meta.get("pending", False) and evaluates
        if self.patience is not None:
            self.patience = dataclasses.replace(self.patience, **meta.get("patience", {}))

    def take(self, found: Mapping[str, float]) -> None:
        """Take the evaluation of this step; the one before the first step is only shown."""
        self.evaluation, self.pending = found, False
        if self.step > 0 and self.patience is not None:
            self.patience = self.patience.after(found)

    def note(self, candidate: bool) -> tuple[Mapping[str, float] | None, Any, bool]:
        """Return what `Checkpoints.save` takes beside the state: evaluation, patience, pending."""
        found = self.evaluation if candidate and not self.pending else None
        return found, self.patience and self.patience.note, self.pending


def result_leaves(
    run: Standing, checkpoints: Any, say: Callable[[str], None]
) -> tuple[Any, dict[str, Any] | None]:
    """Return (the leaves that a run results in, {"step", "metric", "value"} of the best or None).

    The run's state is dropped, so that the moments make room for what is read. say: gets a line on
    the step that was chosen.
    """
    best, chosen = checkpoints.best, checkpoints.best_step
    last, kept, run.state = run.state.result, "trainable" if run.state.ema is None else "ema", None
    if best is None:
        return last, None
    if chosen is None:
        say(
            f"Warning: no checkpoint was saved with a finite {best.metric} on held-out data: the "
            f"result is the last step's."
        )
        return last, {"step": run.step, "metric": best.metric, "value": None}
    value = checkpoints.evaluations[chosen][best.metric]
    say(
        f"The result is step {chosen}'s: its {best.metric} on held-out data, {value:.4f}, is the "
        f"best of all checkpoints."
    )
    if chosen != run.step:
        last = checkpoints.restore_trainable(last, chosen, kept)
    return last, {"step": chosen, "metric": best.metric, "value": value}
