"""How many steps a run has, and at which of them something is due, by TrainingArguments' rules."""

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
