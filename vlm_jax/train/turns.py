"""How many steps a run has, and at which of them something is due: TrainingArguments' arithmetic."""

import math
from collections.abc import Callable

from vlm_jax.errors import UserError


def total_steps(max_steps: int, epochs: float, steps_per_epoch: int | None) -> int:
    """Return the optimizer steps of a run: max_steps if above 0, else those of so many epochs.

    An epoch's last step may hold fewer micro-batches than the others. Raises `UserError` where
    neither is known.
    """
    if max_steps > 0:
        return max_steps
    if steps_per_epoch is None:
        raise UserError(
            "Nobody knows how long a stream is, so num_train_epochs says nothing: set "
            "training.max_steps, or leave data.streaming out."
        )
    return math.ceil(epochs * steps_per_epoch)


def every(strategy: str, interval: int, steps_per_epoch: int) -> Callable[[int], bool]:
    """Return whether a step is due: each `interval` steps, each epoch, or never."""
    period = {"no": 0, "steps": interval, "epoch": steps_per_epoch}[strategy]
    return lambda step: period > 0 and step % period == 0
