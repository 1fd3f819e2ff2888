"""Search for the fastest batch size and remat policy that fit some hardware."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.config.specs import RunSpec
from vlm_jax.plan.report import Report, plan_step


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting, as {"training.per_device_train_batch_size": 2, ...}, and its plan."""

    overrides: dict[str, Any]
    report: Report

    @property
    def flags(self) -> str:
        """It as the command line takes it."""
        words = {True: "true", False: "false"}
        return " ".join(
            f"--config.{key}={words[value] if isinstance(value, bool) else value}"
            for key, value in self.overrides.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return it in short, as `json.dumps` takes it."""
        speed = self.report.speed
        return {
            "overrides": self.overrides,
            "verdict": self.report.verdict,
            "peak": self.report.peak,
            "tokens_per_second": speed.tokens_per_second,
        }


# Each keeps more than the one before, and computes less again; all are of layers.scan.REMAT.
POLICIES = ("block", "block_save_attention", "dots", "none")
LAST_RESORT = (
    "offload"  # keeps less than any, for a way to the host and back: where block is too much
)


def settings(config: RunSpec, policy: str) -> list[dict[str, Any]]:
    """Return a policy's settings, those that need less memory first.

    Each has the config's own number of rows a step, in more or fewer micro-batches: what is learned
    does not change.
    """
    training = config.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    sizes = [size for size in (2**n for n in range(rows.bit_length())) if rows % size == 0]
    return [
        {
            "training.per_device_train_batch_size": size,
            "training.gradient_accumulation_steps": rows // size,
            "training.remat_policy": policy,
        }
        for size in sizes
    ]


def fit(
    config: RunSpec,
    topology: str,
    *,
    tokens: int | None = None,
    patches: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Trial | None, list[Trial]]:
    """Return (the fastest setting that fits or None, all that were tried).

    Each is planned by `plan_step`, which see for the arguments and errors. Of each policy rows at a
    time double until they do not fit, and what does not fit one policy is not tried with another
    that keeps more. Of equally fast settings it is the one that needs less memory.
    """
    tried: list[Trial] = []

    def fitting(candidates: list[dict[str, Any]]) -> int:
        """Try settings in turn and return how many fit before one does not."""
        for number, setting in enumerate(candidates):
            changes = {**(overrides or {}), **setting}
            report = plan_step(config, topology, overrides=changes, tokens=tokens, patches=patches)
            tried.append(Trial(setting, report))
            on_trial(tried[-1])
            if not report.fits:
                return number
        return len(candidates)

    most = len(settings(config, LAST_RESORT))
    rest = fitting(settings(config, POLICIES[0]))
    room = rest
    for policy in POLICIES[1:]:
        room = fitting(settings(config, policy)[:room])
    if rest < most:
        fitting(settings(config, LAST_RESORT)[rest:])
    good = [trial for trial in tried if trial.report.fits]
    return max(good, key=_worth, default=None), tried


def _worth(trial: Trial) -> tuple[float, int]:
    return trial.report.speed.tokens_per_second or 0.0, -trial.report.peak
