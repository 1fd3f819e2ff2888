"""The mesh of a run: as configured, or the smallest sharding that fits memory."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from vlm_jax.config.specs import MeshSpec, RunSpec
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError, refuse
from vlm_jax.hardware import device_of
from vlm_jax.sharding import LEAST_SPREAD, make_mesh, mesh_sizes, row_parts, spread
from vlm_jax.train.estimate import estimate, row_shape
from vlm_jax.train.setup import abstract_base

# An estimate from shapes was up to an eighth below what a compiler took.
ROOM = 0.85


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
        f"parameters, and a policy by its name."
    )


def rows_of(config: RunSpec, mesh: jax.sharding.Mesh) -> int:
    """Return the rows of one step: of all micro-batches and all devices."""
    t = config.training
    return t.per_device_train_batch_size * t.gradient_accumulation_steps * row_parts(mesh)
