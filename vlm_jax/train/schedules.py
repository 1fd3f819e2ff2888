"""Learning-rate schedules: those of transformers' `get_scheduler`, under its names."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError, nearest

Factor = jax.Array  # of the peak rate


class Span(NamedTuple):
    """Where a step is. total: steps of the run. rate: the peak rate."""

    step: Any  # int32 []
    warmup: int
    total: int
    rate: float

    @property
    def after(self) -> jax.Array:
        """Steps since the warm-up."""
        return jnp.asarray(self.step - self.warmup, jnp.float32)

    @property
    def decay(self) -> int:
        """Steps that there are after the warm-up, at least 1."""
        return max(1, self.total - self.warmup)

    @property
    def left(self) -> jax.Array:
        """The share of them that is left: exact near the end, where 1 - done would not be."""
        return (self.decay - self.after) / self.decay


def constant(at: Span) -> Factor:
    return jnp.ones((), jnp.float32)


def linear(at: Span) -> Factor:
    return jnp.maximum(0.0, at.left)


def cosine(at: Span, num_cycles: float = 0.5) -> Factor:
    return _cosine(at.left, num_cycles)


def cosine_with_restarts(at: Span, num_cycles: int = 1) -> Factor:
    # Whole numbers tell a cycle's first step from the last of the one before.
    place = (at.step - at.warmup) * int(num_cycles) % at.decay
    return jnp.where(at.after >= at.decay, 0.0, _cosine((at.decay - place) / at.decay, 0.5))


def cosine_with_min_lr(
    at: Span,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Factor:
    return _above(cosine(at, num_cycles), _lowest(at, min_lr, min_lr_rate))


def cosine_warmup_with_min_lr(
    at: Span,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Factor:
    """Reach the peak at the warm-up's last step, and the lowest rate at the run's last."""
    step, first = jnp.asarray(at.step, jnp.float32), warmup_lr_rate
    rising = (
        (step + 1) / max(1, at.warmup)
        if first is None
        else first + (1 - first) * step / max(1, at.warmup - 1)
    )
    next_left = (at.decay - at.after - 1) / at.decay
    falling = _above(_cosine(next_left, num_cycles), _lowest(at, min_lr, min_lr_rate))
    return jnp.where(step < at.warmup, rising, falling)


def polynomial(at: Span, lr_end: float = 1e-7, power: float = 1.0) -> Factor:
    if lr_end >= at.rate:
        raise UserError(
            f"lr_end, {lr_end}, of the polynomial schedule must be below the learning rate, "
            f"{at.rate}."
        )
    return _above(jnp.maximum(0.0, at.left) ** power, lr_end / at.rate)


def inverse_sqrt(at: Span, timescale: int | None = None) -> Factor:
    scale = timescale or at.warmup or 10_000
    return jnp.sqrt(scale / jnp.maximum(1.0, at.after + scale))


def warmup_stable_decay(
    at: Span,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Factor:
    """Rise, stay, and fall over the last num_decay_steps, to min_lr_ratio."""
    if num_decay_steps is None:
        raise UserError(
            "The warmup_stable_decay schedule needs training.lr_scheduler_kwargs: "
            "{num_decay_steps: ...}, the steps over which the learning rate falls."
        )
    for name, kind in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if kind not in ("linear", "cosine", "1-sqrt"):
            raise UserError(f"{name} is '{kind}'; expected linear, cosine or 1-sqrt.")
    if num_stable_steps is None:
        num_stable_steps = at.total - at.warmup - num_decay_steps
    step = jnp.asarray(at.step, jnp.float32)
    risen = jnp.clip(step / max(1, at.warmup), 0, 1)
    rising = {
        "linear": risen,
        "cosine": 1 - _cosine(1 - risen, 0.5),
        "1-sqrt": 1 - jnp.sqrt(1 - risen),
    }[warmup_type]
    left = (num_stable_steps + num_decay_steps - at.after) / max(1, num_decay_steps)
    falling = {
        "linear": left,
        "cosine": _cosine(left, num_cycles),
        "1-sqrt": 1 - jnp.sqrt(jnp.maximum(0.0, 1 - left)),
    }[decay_type]
    falling = jnp.where(left > 0, _above(falling, min_lr_ratio), min_lr_ratio)
    falling = jnp.where(left > 1, 1.0, falling)
    return jnp.where(step < at.warmup, _above(rising, min_lr_ratio), falling)


def _cosine(left: jax.Array, num_cycles: float) -> jax.Array:
    """Return (1 + cos(2 pi num_cycles (1 - left))) / 2 with float32's digits near its zeros."""
    return jnp.sin(jnp.pi * (0.5 - num_cycles + num_cycles * left)) ** 2


def _above(factor: jax.Array, least: float) -> jax.Array:
    return factor * (1 - least) + least


def _lowest(at: Span, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise UserError(
            "A cosine schedule with a lowest rate needs one of min_lr and min_lr_rate in "
            "training.lr_scheduler_kwargs, as {min_lr_rate: 0.1}."
        )
    return min_lr / at.rate if min_lr is not None else min_lr_rate or 0.0


class Schedule(NamedTuple):
    """factor: of the peak rate. ends: whether it depends on the steps of the run. rises: whether
    the warm-up is the usual one, linear from 0, and not its own or none."""

    factor: Callable[..., Factor]
    ends: bool
    rises: bool = True


SCHEDULES = {
    "constant": Schedule(constant, ends=False, rises=False),
    "constant_with_warmup": Schedule(constant, ends=False),
    "linear": Schedule(linear, ends=True),
    "cosine": Schedule(cosine, ends=True),
    "cosine_with_restarts": Schedule(cosine_with_restarts, ends=True),
    "cosine_with_min_lr": Schedule(cosine_with_min_lr, ends=True),
    "cosine_warmup_with_min_lr": Schedule(cosine_warmup_with_min_lr, ends=True, rises=False),
    "polynomial": Schedule(polynomial, ends=True),
    "inverse_sqrt": Schedule(inverse_sqrt, ends=False),
    "warmup_stable_decay": Schedule(warmup_stable_decay, ends=True, rises=False),
}
SCHEDULES["wsd"] = SCHEDULES["warmup_stable_decay"]
# Those of transformers that look at training's results, which a rate by step alone cannot.
REFUSED = ("reduce_lr_on_plateau", "greedy")


def schedule(
    kind: str, rate: float, warmup: int, total: int, options: Mapping[str, Any]
) -> Callable[[Any], jax.Array]:
    """Return `step -> learning rate`, equal to transformers' of that name; step 0 is the first.

    kind: a key of `SCHEDULES`. rate: its peak. warmup: steps over which it rises from 0. total:
    steps of the run. options: what transformers calls lr_scheduler_kwargs. Raises `UserError` for
    an unknown schedule or option, and for one that needs `total` and has none.
    """
    if kind not in SCHEDULES:
        why = (
            "which looks at the losses of a run; take one that is known by the step"
            if kind in REFUSED
            else f"which is not supported{nearest(kind, SCHEDULES)}"
        )
        raise UserError(
            f"training.lr_scheduler_type is '{kind}', {why}. Supported: {', '.join(SCHEDULES)}."
        )
    chosen = SCHEDULES[kind]
    known = list(inspect.signature(chosen.factor).parameters)[1:]
    for name in options:
        if name not in known:
            raise UserError(
                f"training.lr_scheduler_kwargs has '{name}', which the '{kind}' schedule does not "
                f"take{nearest(name, known)}. It takes {', '.join(known) or 'none'}."
            )
    if chosen.ends and total <= 0:
        raise UserError(
            f"The '{kind}' schedule ends at training.max_steps, which is {total}. Set it to the "
            f"run's number of optimizer steps, or set lr_scheduler_type='constant'."
        )

    def at(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        factor = chosen.factor(Span(step, warmup, total, rate), **options)
        if chosen.rises:
            factor = jnp.where(step < warmup, step / max(1, warmup), factor)
        return rate * factor

    jax.eval_shape(at, 0)  # options are checked now
    return at
