"""Step time: bounds by compute, memory and network, and throughput from them."""

import dataclasses
from collections.abc import Iterable

from vlm_jax.hardware import Device
from vlm_jax.plan.program import Collective

COMPILER = (
    "the TPU compiler's estimate of its own schedule and the bundles of Pallas kernels, without "
    "waiting on other chips"
)
ROOFLINE = "a roofline: the largest bound, which no program goes below and few come near"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of one step; None where no page of the maker, or no compiler, gives what it needs.

    compute: all FLOPs at the peak. memory: all bytes at the memory's bandwidth. network: what is
    exchanged, over all links of a device at once. compiler: by the compiler. step: what is
    predicted, by `rule`. mfu: share of the peak that the model's own FLOPs use: recomputation left
    out, and of the decoder's attention all above the diagonal. tokens_per_second: of all devices,
    padding counted as tokens.
    """

    compute: float | None
    memory: float | None
    network: float | None
    compiler: float | None
    step: float | None
    limit: str | None
    rule: str
    tokens_per_second: float | None
    mfu: float | None


def speed(
    device: Device,
    count: int,
    *,
    tokens: int,
    model_flops: int,
    flops: int,
    bytes_accessed: int | None,
    sent: int | None,
    compiler: float | None,
) -> Speed:
    """Return the bounds and what they say of a step on so many equal devices.

    tokens, model_flops, flops: of the whole step. bytes_accessed, sent: of one device.
    """
    bounds = {
        "compute": _over(flops / count, device.flops),
        "memory": _over(bytes_accessed, device.bandwidth),
        "network": 0.0 if sent == 0 else _over(sent, device.link),
    }
    known = {name: seconds for name, seconds in bounds.items() if seconds is not None}
    if compiler is not None:
        known = {"the compiler's schedule": compiler, "network": bounds["network"] or 0.0}
    # A roofline without the bound by compute would say nothing of a training step.
    usable = compiler is not None or bounds["compute"] is not None
    limit = max(known, key=lambda name: known[name]) if usable else None
    step = known[limit] if limit else None
    return Speed(
        **bounds,
        compiler=compiler,
        step=step,
        limit=limit,
        rule=COMPILER if compiler is not None else ROOFLINE,
        tokens_per_second=tokens / step if step else None,
        mfu=model_flops / (step * count * device.flops) if step and device.flops else None,
    )


def _over(amount: float | None, rate: float | None) -> float | None:
    return None if amount is None or rate is None else amount / rate


def sent(collectives: Iterable[Collective], devices: int) -> int:
    """Return the bytes that a device sends in a step, each exchange done in the best known way.

    A ring of n: an all-gather to R bytes passes on R (n - 1) / n, an all-reduce twice that, a
    reduce-scatter that leaves R bytes R (n - 1); a permute sends its R.
    """
    total = 0.0
    for one in collectives:
        n = one.group or devices
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }.get(one.kind, (n - 1) / n)
        total += one.bytes * one.times * share
    return round(total)
