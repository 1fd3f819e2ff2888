"""What of a run follows from its devices: the mesh, the remat policy and the micro-batch.

The mesh is as configured, or the smallest sharding that fits memory. With
`training.remat_policy: auto` the policy and the micro-batch are the fastest that fit.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from vlm_jax.config.specs import AUTO, MeshSpec, RunSpec
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError, refuse
from vlm_jax.hardware import DEVICES, GIB, Hardware, device_of
from vlm_jax.models.layers.remat import FASTEST
from vlm_jax.sharding import LEAST_SPREAD, make_mesh, mesh_sizes, row_parts, spread
from vlm_jax.train.estimate import (
    Shape,
    activations,
    beside_arguments,
    estimate,
    largest,
    nbytes,
    row_shape,
    tower_trains,
)
from vlm_jax.train.setup import abstract_base, abstract_run
from vlm_jax.train.step import TrainState

# An estimate from shapes was up to an eighth below what a compiler took.
ROOM = 0.85
# What is kept is counted value by value: an estimate with policies that keep most of a block was
# nearer to what a compiler took than one where all is recomputed (`ROOM`).
ROOM_BY_NAMES = 0.94


def mesh_of(config: RunSpec, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Return the mesh that the config's `mesh` section asks for, over `devices` (default: all)."""
    wanted = config.mesh.devices
    if devices is None:
        devices = jax.devices()
        refuse(
            (
                jax.process_count() != processes.count(),
                f"JAX sees {jax.process_count()} processes that were not connected: call "
                f"vlm_jax.distributed.processes.start() before anything touches a device.",
            ),
            (
                processes.count() > 1 and 0 < wanted < len(devices),
                f"mesh.devices is {wanted}, but {processes.count()} processes have "
                f"{len(devices)} devices, and all of them take part. Leave mesh.devices out.",
            ),
        )
    if wanted > len(devices):
        raise UserError(f"mesh.devices is {wanted}, but there are {len(devices)} devices.")
    over = devices[: wanted or None]
    sizes = (  # what is free may differ between devices: one process decides
        sizes_of(config, len(over), memory_of(over[0]) if config.mesh.auto else 0)
        if processes.is_primary()
        else None
    )
    return make_mesh(**processes.gather("mesh", sizes)[0], devices=over)


def sizes_of(config: RunSpec, count: int, memory: int) -> dict[str, int]:
    """Return the mesh's sizes over `count` devices with so many bytes each.

    With mesh.auto the parameters are spread over as few devices as hold a copy by estimate, over
    as many as can be where none do, and the rest are copies. Raises `UserError` where the sizes do
    not multiply to `count`, and where mesh.auto meets sizes that it picks itself or cannot
    estimate.
    """
    m = config.mesh
    if not m.auto:
        return mesh_sizes(count, m.data, m.fsdp, m.tensor, m.context)
    refuse(
        (
            (m.data, m.fsdp) != (-1, 1),
            f"mesh.auto picks mesh.data and mesh.fsdp, but they are set too, to {m.data} and "
            f"{m.fsdp}. Leave them out, or mesh.auto.",
        ),
        (
            m.context != 1 or m.tensor < 1,
            f"mesh.auto estimates what a device needs, of which it knows nothing with mesh.context "
            f"= {m.context} and mesh.tensor = {m.tensor}: set all four sizes, or leave context out "
            f"and tensor at 1 or more.",
        ),
    )
    shards = mesh_sizes(count, -1, 1, m.tensor)["data"]
    one = config.having({"model.adapter": None})  # it counts as the LoRA that is described
    need = estimate(one, row_shape(one), config.training.per_device_train_batch_size)
    base = abstract_base(one)
    useful = [
        fsdp
        for fsdp in range(1, shards + 1)
        if shards % fsdp == 0 and spread(*base, "fsdp", fsdp)[0] >= LEAST_SPREAD
    ]
    fitting = (f for f in useful if need.over(f * m.tensor).total <= ROOM * memory)
    return mesh_sizes(count, -1, next(fitting, useful[-1]), m.tensor)


def mesh_for_reading(config: RunSpec) -> jax.sharding.Mesh | None:
    """Return a mesh that holds one copy of what a run of this config gave; None: one device does.

    Of this process's devices it takes as many as share a copy in the config's own mesh; where that
    says nothing of one, or asks for more than there are, as few as hold it by mesh.auto's estimate.
    """
    m = config.mesh
    devices = jax.local_devices()[: m.devices or None]
    if len(devices) == 1:
        return None
    sizes = {"fsdp": m.fsdp, "tensor": m.tensor, "context": m.context}
    if m.auto or not 1 < math.prod(sizes.values()) <= len(devices):
        free = dataclasses.replace(config, mesh=MeshSpec(auto=True, devices=m.devices))
        sizes = {"fsdp": sizes_of(free, len(devices), memory_of(devices[0]))["fsdp"]}
    count = math.prod(sizes.values())
    return None if count == 1 else make_mesh(data=1, **sizes, devices=devices[:count])


def memory_of(device: Any) -> int:
    """Return the bytes that a program may have of a device, here or only described.

    Raises `UserError` where nothing says it.
    """
    if device.platform == "cpu":  # all of them share the machine's
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    # One that is only described, and not here, has no statistics.
    with contextlib.suppress(jax.errors.JaxRuntimeError, KeyError):
        return (device.memory_stats() or {})["bytes_limit"]
    known = device_of(device.device_kind)
    if known is not None:
        return known.usable
    raise UserError(
        f"mesh.auto and training.remat_policy=auto cannot learn how much memory a "
        f"'{device.device_kind}' has. Set mesh.fsdp, the devices that share one copy of the "
        f"parameters, and a remat policy by name."
    )


def rows_of(config: RunSpec, mesh: jax.sharding.Mesh) -> int:
    """Return the rows of one step: of all micro-batches and all devices."""
    t = config.training
    return t.per_device_train_batch_size * t.gradient_accumulation_steps * row_parts(mesh)


class Choice(NamedTuple):
    """A policy, and rows that a device computes with at a time. need: bytes, by estimate."""

    policy: str
    rows: int
    need: int


def fastest(
    need: Callable[[str, int], int],
    policies: Sequence[str],
    sizes: Sequence[int],
    memory: int,
) -> Choice:
    """Return the first policy that fits with some size, and the largest size that fits with it.

    need: bytes of a policy and a size. policies: the fastest first. sizes: ascending. Where nothing
    fits, it is what needs least: an estimate may be too high, and a compiler has the last word.
    """
    tried = []
    for policy in policies:
        each = [Choice(policy, rows, need(policy, rows)) for rows in sizes]
        fitting = [one for one in each if one.need <= memory]
        if fitting:
            return fitting[-1]
        tried += each
    return min(tried, key=lambda one: one.need)


def sizes_at_once(config: RunSpec, tokens: int, at_once: int | None) -> list[int]:
    """Return which numbers of rows a device may compute with at a time, ascending.

    All of them divide the rows of a device and step, which stay what they are. at_once: tokens from
    which on more at a time are slower, None: as many rows as the config has are not. tokens: of a
    row.
    """
    t = config.training
    rows = t.per_device_train_batch_size * t.gradient_accumulation_steps
    most = t.per_device_train_batch_size if at_once is None else max(1, at_once // tokens)
    return [n for n in range(1, most + 1) if rows % n == 0]


def with_policy(
    config: RunSpec,
    mesh: Mesh | AbstractMesh,
    machine: Hardware | None = None,
    shape: Shape | None = None,
) -> tuple[RunSpec, Choice | None]:
    """Return the config with the policy and the micro-batch that `auto` chooses, and what it chose.

    None, and the config as it is, where it names a policy. machine: what a mesh consists of that is
    only described. shape: tokens and patches of a row; None: of the largest one. The first process
    chooses, since what is free may differ.
    """
    if config.training.remat_policy != AUTO:
        return config, None
    found = processes.gather(
        "remat policy", choose(config, mesh, machine, shape) if processes.is_primary() else None
    )[0]
    choice = Choice(*found)
    t = config.training
    rows = t.per_device_train_batch_size * t.gradient_accumulation_steps
    training = dataclasses.replace(
        t,
        remat_policy=choice.policy,
        per_device_train_batch_size=choice.rows,
        gradient_accumulation_steps=rows // choice.rows,
    )
    return dataclasses.replace(config, training=training), choice


def choose(
    config: RunSpec,
    mesh: Mesh | AbstractMesh,
    machine: Hardware | None = None,
    shape: Shape | None = None,
) -> Choice:
    """Return what `auto` chooses for devices of a mesh, by estimate from shapes."""
    if isinstance(mesh, Mesh):
        first = mesh.devices.flat[0]
        platform, memory, device = first.platform, memory_of(first), device_of(first.device_kind)
    else:
        assert machine is not None
        device, memory = DEVICES[machine.device], machine.usable
        platform = "tpu" if device.is_tpu else "gpu"
    one = config.having({"model.adapter": None})  # it counts as the LoRA that is described
    over: Any = mesh
    model, _, state, frozen = abstract_run(one, over)
    shape = shape or row_shape(one)
    tower = tower_trains(model, state.trainable)

    @functools.cache
    def beside(rows: int) -> int:
        """Return the bytes of all but activations."""
        parts = dataclasses.replace(one.training, gradient_accumulation_steps=rows)
        config = dataclasses.replace(one, training=parts)
        taken = beside_arguments(config, model, state.trainable, frozen, shape, 1, platform)
        gathered = taken.gathered if mesh.shape["fsdp"] > 1 else 0
        return arguments(one, state, frozen) + taken.copies + gathered

    t = config.training
    all_rows = t.per_device_train_batch_size * t.gradient_accumulation_steps

    def need(policy: str, rows: int) -> int:
        own = dataclasses.replace(model, remat=policy)
        inside = activations(own, shape, rows, tower, largest(frozen), platform)
        return beside(all_rows // rows) + inside // mesh.shape["context"]

    sizes = sizes_at_once(config, shape[0], None if device is None else device.at_once)
    return fastest(need, FASTEST[platform], sizes, int(ROOM_BY_NAMES * memory))


def arguments(config: RunSpec, state: TrainState, frozen: Any) -> int:
    """Return the bytes of a step's arguments on one device; paged moments lie on the host."""
    paged = config.training.optim.startswith("paged")
    moments = 0 if paged else nbytes(state.opt_state)
    return nbytes(frozen) + nbytes(state.trainable) + moments + nbytes(state.ema)


def policy_line(config: RunSpec, choice: Choice, mesh: Mesh) -> str:
    """Return what was chosen, in words, with the bytes that it is expected to take."""
    t, memory = config.training, memory_of(mesh.devices.flat[0])
    parts = t.gradient_accumulation_steps
    rows = f"{choice.rows} row{'s' * (choice.rows != 1)} at a time on a device"
    return (
        f"remat policy {choice.policy} and {rows}, in {parts} micro-batch{'es' * (parts != 1)} a "
        f"step: about {choice.need / GIB:.2f} of {memory / GIB:.2f} GiB by estimate"
    )
