"""When a run stops early: transformers' EarlyStoppingCallback as a value that checkpoints hold."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.errors import UserError
from vlm_jax.train.best import Best, metric_of


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
