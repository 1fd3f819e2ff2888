"""Which checkpoint of a run is the best one, by a number that its evaluation gave."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from vlm_jax.errors import UserError
from vlm_jax.train.run import evaluates

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
            f"{asked} training.save_steps is {t.save_steps}, which is no multiple of "
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
