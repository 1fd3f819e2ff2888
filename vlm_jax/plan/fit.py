"""The fastest setting of a config that fits some hardware: rows at a time, and recomputation."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

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


def settings(config: ConfigDict) -> Iterator[list[dict[str, Any]]]:
    """Yield the settings without and with recomputation, those that need less memory first.

    Each has the config's own number of rows a step, in more or fewer micro-batches: what is learned
    does not change.
    """
    training = config.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    sizes = [size for size in (2**n for n in range(rows.bit_length())) if rows % size == 0]
    for policy in ("none", "block"):
        yield [
            {
                "training.per_device_train_batch_size": size,
                "training.gradient_accumulation_steps": rows // size,
                "training.remat_policy": policy,
            }
            for size in sizes
        ]


def fit(
    config: ConfigDict,
    topology: str,
    *,
    tokens: int | None = None,
    patches: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Trial | None, list[Trial]]:
    """Return (the fastest setting that fits or None, all that were tried).

    Each is planned by `plan_step`, which see for the arguments and errors; rows at a time double
    until they do not fit. Of equally fast ones it is the one that needs less memory.
    """
    tried: list[Trial] = []
    for ascending in settings(config):
        for setting in ascending:
            changes = {**(overrides or {}), **setting}
            report = plan_step(config, topology, overrides=changes, tokens=tokens, patches=patches)
            tried.append(Trial(setting, report))
            on_trial(tried[-1])
            if not report.fits:
                break
    fitting = [trial for trial in tried if trial.report.fits]
    return max(fitting, key=_worth, default=None), tried


def _worth(trial: Trial) -> tuple[float, int]:
    return trial.report.speed.tokens_per_second or 0.0, -trial.report.peak
