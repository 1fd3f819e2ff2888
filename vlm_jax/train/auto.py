"""`training.remat_policy: auto`: the fastest policy and micro-batch that fit a run's devices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from vlm_jax.config.specs import RunSpec
from vlm_jax.distributed import processes
from vlm_jax.hardware import DEVICES, GIB, Hardware, device_of
from vlm_jax.models.layers.remat import FASTEST
from vlm_jax.train.estimate import (
    activations,
    beside_arguments,
    largest,
    nbytes,
    row_shape,
    tower_trains,
)
from vlm_jax.train.mesh import memory_of
from vlm_jax.train.setup import AUTO, abstract_run
from vlm_jax.train.step import TrainState

# What is kept is counted value by value: an estimate with policies that keep most of a block was
# nearer to what a compiler took than one where all is recomputed (train.mesh.ROOM).
ROOM = 0.94


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
    config: RunSpec, mesh: Mesh | AbstractMesh, machine: Hardware | None = None
) -> tuple[RunSpec, Choice | None]:
    """Return the config with the policy and the micro-batch that `auto` chooses, and what it chose.

    None, and the config as it is, where it names a policy. machine: what a mesh consists of that
    is only described. The first process chooses, since what is free may differ.
    """
    if config.training.remat_policy != AUTO:
        return config, None
    found = processes.gather(
        "remat policy", choose(config, mesh, machine) if processes.is_primary() else None
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


def choose(config: RunSpec, mesh: Mesh | AbstractMesh, machine: Hardware | None = None) -> Choice:
    """Return what `auto` chooses for devices of a mesh, by estimate from shapes."""
    if isinstance(mesh, Mesh):
        first = mesh.devices.flat[0]
        platform, memory, device = first.platform, memory_of(first), device_of(first.device_kind)
    else:
        assert machine is not None
        device, memory = DEVICES[machine.device], machine.usable
        platform = "tpu" if device.is_tpu else "gpu"
    one = config.having({"model.adapter": None})  # it counts as the LoRA that is described
    model, _, state, frozen = abstract_run(one, mesh)
    shape = row_shape(one)
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
    return fastest(need, FASTEST[platform], sizes, int(ROOM * memory))


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
