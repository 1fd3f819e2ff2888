"""Search for the fastest batch size and remat policy that fit some hardware."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.config.specs import RunSpec
from vlm_jax.models.layers.remat import ON_ACCELERATORS
from vlm_jax.plan.report import Report, plan_step


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting, as {"training.per_device_train_batch_size": 2, ...}, and its plan."""

    overrides: dict[str, Any]
    report: Report

    @property
    def flags(self) -> str:
        """It as the command line takes it."""
        return " ".join(
            f"--config.{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in self.overrides.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return it in short, as `json.dumps` takes it."""
        return {
            "overrides": self.overrides,
            "verdict": self.report.verdict,
            "peak": self.report.peak,
            "tokens_per_second": self.report.speed.tokens_per_second,
        }


def settings(config: RunSpec, policy: str) -> list[dict[str, Any]]:
    """Return a policy's settings, those that need less memory first.

    Each has the config's own number of rows a step, in more or fewer micro-batches: what is learned
    does not change.
    """
    training = config.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return [
        {
            "training.per_device_train_batch_size": size,
            "training.gradient_accumulation_steps": rows // size,
            "training.remat_policy": policy,
        }
        for size in (2**n for n in range(rows.bit_length()))
        if rows % size == 0
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

    Each is planned by `plan_step`, which see for the arguments and errors. Rows at a time double
    under the policy that keeps most until they do not fit; then the next policy is tried with as
    many, since with fewer it would only recompute more. Of equally fast settings it is the one that
    needs less memory.
    """
    tried: list[Trial] = []
    fitting = 0  # of the sizes
    for policy in ON_ACCELERATORS:
        for setting in settings(config, policy)[fitting:]:
            report = plan_step(
                config,
                topology,
                overrides={**(overrides or {}), **setting},
                tokens=tokens,
                patches=patches,
            )
            tried.append(Trial(setting, report))
            on_trial(tried[-1])
            if not report.fits:
                break
            fitting += 1
    fastest = max(
        (trial for trial in tried if trial.report.fits),
        key=lambda trial: (trial.report.speed.tokens_per_second or 0.0, -trial.report.peak),
        default=None,
    )
    return fastest, tried
