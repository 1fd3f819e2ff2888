"""Memory per device of a step's arrays, leaf by leaf, and their sharding."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.plan.step import Step
from vlm_jax.train.estimate import nbytes
from vlm_jax.train.moments import HOST
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit


class Leaf(NamedTuple):
    """A parameter. storage: its dtype, or its 4-bit format, as "nf4-dq". spec: its PartitionSpec.

    bytes: on one device, scales of a 4-bit leaf included. trains: as a float32 master.
    """

    path: str
    shape: tuple[int, ...]
    storage: str
    spec: str
    bytes: int
    trains: bool


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes a device of a step's arguments, before the compiler aligns them.

    base: what is frozen, as it is stored. lora, masters: copies of what trains, of LoRA or of
    adapters, and others. moments: of the optimizer, and the moving average; moments_host: those in
    pages in the host's memory, a device. batch: of all micro-batches. rest: counters and keys.
    """

    base: int
    lora: int
    masters: int
    moments: int
    moments_host: int
    batch: int
    rest: int

    @property
    def device(self) -> int:
        """All of them that lie in the device's own memory."""
        return sum(dataclasses.astuple(self)) - self.moments_host


def parts(step: Step) -> Parts:
    """Return what a step's arguments take of each device's memory."""
    state = step.state
    small = [
        leaf for path, leaf in flatten(state.trainable).items() if is_lora(path) or is_adapter(path)
    ]
    moments = jax.tree.leaves((state.opt_state, state.ema))
    on_host = nbytes([leaf for leaf in moments if leaf.sharding.memory_kind == HOST])
    return Parts(
        base=nbytes(step.frozen),
        lora=nbytes(small),
        masters=nbytes(state.trainable) - nbytes(small),
        moments=nbytes(moments) - on_host,
        moments_host=on_host,
        batch=nbytes(step.batch),
        rest=nbytes((state.step, state.rng)),
    )


def table(step: Step) -> list[Leaf]:
    """Return every parameter, frozen and trained, in the order of their paths."""
    rows = []
    for tree, trains in ((step.frozen, False), (step.state.trainable, True)):
        for path, leaf in flatten(tree).items():
            array, storage = leaf, jnp.dtype(leaf.dtype).name
            if isinstance(leaf, FourBit):
                array, storage = leaf.codes, leaf.NAME + ("-dq" if leaf.double else "")
            spec = ", ".join(map(str, array.sharding.spec))
            rows.append(Leaf(path, tuple(leaf.shape), storage, spec, nbytes(leaf), trains))
    return sorted(rows)
