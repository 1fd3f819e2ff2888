"""The report of a plan: memory, time and traffic of a step, as one value."""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax.config.specs import RunSpec
from vlm_jax.errors import UserError
from vlm_jax.hardware import DEVICES, GB, GIB, Device, hardware
from vlm_jax.models.layers.attention import recorded
from vlm_jax.plan import leaves, program, schedule, traffic, work
from vlm_jax.plan.kernels import Used, table, timing, used
from vlm_jax.plan.speed import Speed, sent, speed
from vlm_jax.plan.step import Step, load, prepare
from vlm_jax.plan.topologies import INSTALL, compilers, devices
from vlm_jax.train.estimate import beside_arguments
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit

COMPILED = "compiled"
ESTIMATED = "estimated from shapes, not compiled"
PROCESS = GB // 2  # what Python and its libraries take of the host, before any weight
HOST_RULE = (
    "0.5 GB for Python, the largest leaf as it is stored, one of its layers twice as it is read, "
    "and pages of moments"
)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind and dtype. count: a step. bytes: of their results, one device."""

    kind: str
    dtype: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """A plan. Bytes are those of one device, FLOPs those of the whole step.

    basis: "compiled", or "estimated from shapes, not compiled". verdict: "FITS" or "DOES NOT FIT".
    peak: what the step needs. capacity: what a program may have. said: why. mesh: its sizes.
    rows, tokens, patches: of a step, of a row. parts: what the peak is made of; they add up to it.
    moments_host: moments in pages in the host's memory. exchanges, bytes_accessed, code: None where
    nothing was compiled. cycles: of a TPU program, with those of its Pallas kernels, which kernels
    lists. remat_policy: what is kept for the backward pass. remedy: what to install so that it
    would be. parameters: every leaf, where asked for. attention: what computes it, None where
    nothing was compiled.
    """

    model: str
    hardware: str
    topology: str
    devices: int
    basis: str
    verdict: str
    said: str
    peak: int
    capacity: int
    parts: dict[str, int]
    moments_host: int
    mesh: dict[str, int]
    rows: int
    tokens: int
    patches: int
    micro_batches: int
    flops: dict[str, dict[str, int]]
    bytes_accessed: int | None
    exchanges: list[Exchange] | None
    cycles: int | None
    kernels: list[Used] | None
    remat_policy: str
    speed: Speed
    host_memory: int
    host_rule: str
    compile_seconds: float | None
    remedy: str | None = None
    parameters: list[leaves.Leaf] | None = None
    attention: list[str] | None = None

    @property
    def fits(self) -> bool:
        return self.verdict == "FITS"

    def to_json(self) -> dict[str, Any]:
        """Return it as what `json.dumps` takes, under the names of its fields."""
        rows = self.parameters
        return {
            **dataclasses.asdict(self),
            "kernels": None if self.kernels is None else [one._asdict() for one in self.kernels],
            "parameters": None if rows is None else [row._asdict() for row in rows],
        }


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """What a compiler, or the estimate in its place, says. None: it does not say."""

    basis: str
    peak: int
    capacity: int
    fits: bool
    said: str
    beside: dict[str, int]  # what the peak holds beside the arguments
    compiled: jax.stages.Compiled | None = None
    seconds: float | None = None
    attention: list[str] | None = None


def plan_step(
    config: str | Path | RunSpec | ConfigDict,
    topology: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    patches: int | None = None,
    parameters: bool = False,
) -> Report:
    """Return what a config's own training step needs on hardware, and how fast it would be.

    config, overrides, rows, tokens, patches: as for `vlm_jax.plan.compile_step`. topology: a name
    of `vlm_jax.hardware`: "v5e-4", "v5p:2x2x1", "h100:8", "rtx4090". parameters: list every
    leaf with its sharding. TPU slices and H100s are compiled for. Other GPUs, for which no compiler
    can be had, are estimated from shapes, as is a step whose weights and moments alone are too
    large, and all where no compiler is installed; the report says so. A step that does not fit is a
    report too. Raises `UserError` for what the config lacks, an unknown topology, a mesh that does
    not cover its devices, and where this compiler is not installed though the other is.
    """
    machine = hardware(topology)
    device = DEVICES[machine.device]
    compiles = device.compiles and compilers()
    where = devices(machine.topology) if compiles else machine
    step = prepare(load(config, overrides or {}), where, rows=rows, tokens=tokens, patches=patches)
    own = leaves.parts(step)
    hopeless = own.device > device.usable  # a compiler would take minutes to say so
    found = (_compiled if compiles and not hopeless else _estimated)(step, device, own)
    counted = work.count(step.model, step.state.trainable, step.frozen, step.rows, *step.shape)
    total = work.total(counted.values())
    compiled, count = found.compiled, step.mesh.size
    each = None if compiled is None else program.collectives(compiled)
    accessed = None if compiled is None else traffic.bytes_accessed(compiled)
    counts = device.is_tpu and machine.device in table()  # its kernels' bundles
    timed = _timed(compiled, machine.device) if compiled is not None and counts else None
    cycles = None if timed is None else sum(one.total for one in timed)
    # Above the diagonal nothing has to be computed.
    masked = work.masked(step.model, step.state.trainable, step.rows, step.shape[0])
    return Report(
        model=str(step.config.model.name_or_path),
        hardware=machine.name,
        topology=machine.topology,
        devices=count,
        basis=found.basis,
        verdict="FITS" if found.fits else "DOES NOT FIT",
        said=found.said,
        peak=found.peak,
        capacity=found.capacity,
        parts={
            "base weights": own.base,
            "LoRA": own.lora,
            "other trained weights": own.masters,
            "optimizer moments": own.moments,
            "batch": own.batch + own.rest,
            **found.beside,
        },
        moments_host=own.moments_host,
        mesh=step.sizes,
        rows=step.rows,
        tokens=step.shape[0],
        patches=step.shape[1],
        micro_batches=step.micro_batches,
        flops={
            name: {**one._asdict(), "model": one.model, "total": one.total}
            for name, one in {**counted, "all": total}.items()
        },
        bytes_accessed=accessed,
        exchanges=None if each is None else _summed(each),
        cycles=cycles,
        kernels=None if timed is None else used(timed),
        remat_policy=step.model.remat,
        speed=speed(
            device,
            count,
            tokens=step.rows * step.shape[0],
            model_flops=total.model - masked,
            flops=total.total - masked,
            bytes_accessed=accessed,
            sent=None if each is None and count > 1 else sent(each or (), count),
            compiler=None if cycles is None or not device.clock else cycles / device.clock,
        ),
        host_memory=_host_memory(step, own, device),
        host_rule=HOST_RULE,
        compile_seconds=found.seconds,
        remedy=INSTALL if device.compiles and not compiles else None,
        parameters=leaves.table(step) if parameters else None,
        attention=found.attention,
    )


def _timed(compiled: jax.stages.Compiled, chip: str) -> list[schedule.Timed]:
    """Return the schedule of a TPU program with its kernels' cycles."""
    parsed = program.parse(compiled)
    try:
        return schedule.schedule(*parsed, timing(parsed[0], chip))
    except UserError as error:
        cycles = sum(one.total for one in schedule.schedule(*parsed))
        raise UserError(
            f"{error} The step needs {program.memory(compiled).total / GIB:.2f} GiB a device, and "
            f"{cycles:,} cycles without its Pallas kernels."
        ) from error


def _compiled(step: Step, device: Device, own: leaves.Parts) -> _Verdict:
    capacity, began = device.usable, time.perf_counter()
    try:
        with recorded() as chosen:
            compiled = step.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak, allowed = refused(str(error))
        said = (
            f"the compiler refuses it: it needs {peak / GIB:.2f} GiB of the "
            f"{allowed / GIB:.2f} GiB that a program may have"
        )
        if peak == 0:  # in words that are not known
            peak, allowed = own.device, capacity
            said = f"the compiler refuses it: {str(error).splitlines()[0][:200]}"
        beside = {"gradients, activations, temporaries": max(0, peak - own.device)}
        seconds = time.perf_counter() - began
        return _Verdict(COMPILED, peak, allowed, False, said, beside, seconds=seconds)
    seconds = time.perf_counter() - began
    memory = program.memory(compiled)
    fits = device.is_tpu or memory.total <= capacity  # a TPU's compiler refuses what does not
    said = (
        "the compiler accepts it"
        if device.is_tpu
        else f"{capacity / device.memory:.0%} of the memory are counted on"
    )
    beside = {
        "gradients, activations, temporaries": memory.temporary,
        "results": memory.outputs - memory.aliased,
        "code": memory.code,
        "alignment": memory.arguments - own.device,
    }
    return _Verdict(
        COMPILED, memory.total, capacity, fits, said, beside, compiled, seconds, list(chosen)
    )


def _estimated(step: Step, device: Device, own: leaves.Parts) -> _Verdict:
    taken = beside_arguments(
        step.config, step.model, step.state.trainable, step.frozen, step.shape, step.rows_at_once
    )
    gathered = taken.gathered if step.sizes["fsdp"] > 1 else 0
    beside = {
        "gradients and copies of what trains": taken.copies,
        "activations": taken.activations + gathered,
    }
    peak, capacity = own.device + sum(beside.values()), device.usable
    said = f"{capacity / device.memory:.0%} of the memory are counted on"
    if device.limit is not None:  # more than its maker states, in round numbers
        said = "by estimate, in what its compiler lets a program have"
    if own.device > capacity:
        said = f"weights and moments alone take {own.device / GIB:.2f} of {capacity / GIB:.2f} GiB"
    return _Verdict(ESTIMATED, peak, capacity, peak <= capacity, said, beside)


def refused(message: str) -> tuple[int, int]:
    """Return (bytes needed, bytes there are) of a compiler's refusal for memory.

    It says "required for HLO temporaries (25.70G) exceeds available HBM (15.75G)", or "Used 17.1G
    of 15.75G hbm". (0, 0) where it says neither.
    """
    amount = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (
        rf"\({amount}\) exceeds available \w+ \({amount}\)",
        rf"Used {amount} of {amount} \w+",
    ):
        if found := re.search(pattern, message):
            units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            needed, have = (float(found[i]) * units[found[i + 1]] for i in (1, 3))
            return int(needed), int(have)
    return 0, 0


def _summed(each: list[program.Collective]) -> list[Exchange]:
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for one in each:
        counts[one.kind, one.dtype] += one.times
        sizes[one.kind, one.dtype] += one.times * one.bytes
    return [Exchange(*name, counts[name], size) for name, size in sizes.most_common()]


def _host_memory(step: Step, own: leaves.Parts, device: Device) -> int:
    """Return what one process takes of its host's memory while it loads, by `HOST_RULE`."""
    local = min(step.mesh.size, device.per_host)

    def loading(leaf: Any) -> int:
        """Return the bytes of a leaf as it is stored, and of one of its layers twice as read."""
        layer = math.prod(leaf.shape[-2:]) * step.model.dtype.itemsize
        if isinstance(leaf, FourBit):
            return leaf.nbytes + 2 * layer
        values = min(leaf.size, local * math.prod(leaf.sharding.shard_shape(leaf.shape)))
        return values * jnp.dtype(leaf.dtype).itemsize + 2 * layer

    leaves = {**flatten(step.frozen), **flatten(step.state.trainable)}.values()
    return PROCESS + max(map(loading, leaves)) + local * own.moments_host
