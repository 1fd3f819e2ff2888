"""Selection: when to evaluate, save and stop early; the best checkpoint."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.errors import UserError
from vlm_jax.train.setup import evaluates

# What an evaluation gives that can tell the better model -> whether more of it is better.
METRICS = {"loss": False, "accuracy": True}


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


def best_of(config: ConfigDict) -> Best | None:
    """Return how a run of this config chooses among its checkpoints; None: it takes the last.

    Raises `UserError` where it could not choose, since what it saves is not evaluated: the rules
    of transformers' TrainingArguments.
    """
    t = config.training
    if not t.load_best_model_at_end:
        return None
    asked = "training.load_best_model_at_end is true, but"
    best = metric_of(config, asked)
    if t.eval_strategy == "no" or t.save_strategy != t.eval_strategy:
        raise UserError(
            f"{asked} training.save_strategy is {t.save_strategy} and training.eval_strategy is "
            f"{t.eval_strategy}, so not every checkpoint would be evaluated. Set both to steps, or "
            f"both to epoch."
        )
    shares = (t.save_steps < 1) or (t.eval_steps < 1)  # each rounds up for itself
    if t.save_strategy == "steps" and shares and t.save_steps != t.eval_steps:
        raise UserError(
            f"{asked} training.save_steps is {t.save_steps} and training.eval_steps is "
            f"{t.eval_steps}: as shares of all steps they must be equal."
        )
    if t.save_strategy == "steps" and not shares and t.save_steps % t.eval_steps:
        raise UserError(
            f"{asked} training.save_steps is {t.save_steps}, which is not a multiple of "
            f"training.eval_steps, {t.eval_steps}, so not every checkpoint would be evaluated. "
            f"Make it one, for instance training.eval_steps={t.save_steps}."
        )
    return best


def metric_of(config: ConfigDict, asked: str) -> Best:
    """Return what a run of this config compares evaluations by.

    asked: the first words of the `UserError` where there is nothing to compare.
    """
    t = config.training
    metric = (t.metric_for_best_model or "loss").removeprefix("eval_")
    if not evaluates(config):
        raise UserError(
            f"{asked} there is nothing to evaluate on: set data.eval_file or data.eval_share, or "
            f"leave it out."
        )
    if metric == "accuracy" and not config.evaluation.accuracy:
        raise UserError(
            f"{asked} training.metric_for_best_model is accuracy and evaluation.accuracy is "
            f"false, so none is taken. Set evaluation.accuracy=true, or take the loss."
        )
    greater = METRICS[metric] if t.greater_is_better is None else t.greater_is_better
    return Best(metric, greater)


def kept(steps: Sequence[int], limit: int, best: int | None) -> set[int]:
    """Return which checkpoints stay: the newest `limit` of all steps, the best one among them.

    steps: ascending. The newest and the best stay under any limit; 0 keeps all.
    """
    if limit <= 0:
        return set(steps)
    stay = set(steps[-1:])
    if best is not None:
        stay.add(best)
    for step in reversed(steps):
        if len(stay) >= limit:
            break
        stay.add(step)
    return stay


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
        """What `at` needs, as JSON values."""
        return {"best": self.best, "waited": self.waited}

    def at(self, note: Mapping[str, Any]) -> "Patience":
        """Return the same rule as far as a run had come that gave this note."""
        return dataclasses.replace(self, **note)

    def after(self, evaluation: Mapping[str, float]) -> "Patience":
        """Return what is known after an evaluation. A value that is not a number betters nothing.

        A bettering below the threshold counts as none, and yet is the value to beat from then on,
        as in transformers.
        """
        value = evaluation[self.measure.metric]
        worst = -math.inf if self.measure.greater else math.inf
        best = worst if self.best is None else self.best
        better = value > best if self.measure.greater else value < best
        enough = better and abs(value - best) > self.threshold
        waited = 0 if self.best is None or enough else self.waited + 1
        return dataclasses.replace(self, best=value if better else best, waited=waited)


def patience_of(config: ConfigDict) -> Patience | None:
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


def total_steps(max_steps: int, epochs: float, steps_per_epoch: int | None) -> int:
    """Return the optimizer steps of a run: max_steps if above 0, else those of so many epochs.

    An epoch's last step may hold fewer micro-batches than the others. Raises `UserError` where
    neither is known.
    """
    if max_steps > 0:
        return max_steps
    if steps_per_epoch is None:
        raise UserError(
            "The length of a stream is unknown, so num_train_epochs has no meaning: set "
            "training.max_steps, or leave data.streaming out."
        )
    return math.ceil(epochs * steps_per_epoch)


def every(
    strategy: str, interval: float, steps_per_epoch: int, total: int, delay: float = 0.0
) -> Callable[[int], bool]:
    """Return whether a step is due: each `interval` steps, each epoch, or never.

    interval: below 1 it is a share of all `total` steps. delay: nothing is due before so many
    steps, or epochs with strategy "epoch".
    """
    if interval < 1:
        interval = math.ceil(total * interval)
    period = {"no": 0, "steps": interval, "epoch": steps_per_epoch}[strategy]
    first = delay * steps_per_epoch if strategy == "epoch" else delay
    return lambda step: period > 0 and step % period == 0 and step >= first
