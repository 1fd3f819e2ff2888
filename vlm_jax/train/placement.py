"""Placement of a training state and of batches on the mesh, as arrays or as shapes.

Float32 masters have the sharding of their parameter, moments that of their leaf, as the optimizer's
own `init` places them; scalars and keys are replicated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.data import Encoder
from vlm_jax.models.pixel_table import LookUp
from vlm_jax.sharding import BATCH, put, shard_batch
from vlm_jax.train.step import TrainState


def on_mesh(state: TrainState, mesh: Mesh) -> TrainState:
    """Return the state with each leaf on the mesh: scalars and keys on all of its devices.

    What lies in host memory, a paged optimizer's moments, stays there.
    """

    def place(leaf: jax.Array) -> jax.Array:
        if isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh:
            return leaf
        return put(
            leaf,
            NamedSharding(mesh, PartitionSpec(), memory_kind=leaf.sharding.memory_kind),
        )

    return jax.tree.map(place, state)


def abstract_state(
    trainable: Mapping[str, Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    param_dtype: Any = jnp.float32,
    ema: bool = False,
) -> TrainState:
    """Return the state before the first step as shapes: `init_state`'s, laid out by `on_mesh`.

    trainable: shapes with shardings on the mesh.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    masters = of_dtype(dict(trainable), jnp.float32)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=of_dtype(dict(trainable), param_dtype),
        opt_state=tx.init(masters),
        rng=jax.random.key(0),
        ema=masters if ema else None,
    )
    return jax.tree.map(
        lambda leaf: (
            leaf
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
        ),
        state,
    )


def of_dtype(tree: Any, dtype: Any) -> Any:
    """Return a tree's shapes and shardings, all of one dtype."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree
    )


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the tree's shapes with their shardings: what `jit(...).lower` takes for arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


class Feed:
    """Called with a host's batch, returns it on the mesh, rows over data x fsdp.

    bytes_only: whether the batch's patches must be bytes, as `Pipeline.batches` gives them then.
    """

    def __init__(self, encoder: Encoder, mesh: Any):
        self.mesh, table = mesh, encoder.value_table
        self.bytes_only = table is not None
        if table is not None:
            look_up = LookUp(table, encoder.config)
            rows = NamedSharding(mesh, PartitionSpec(BATCH))
            self.look_up = jax.jit(lambda batch: look_up(batch).patches, out_shardings=rows)

    def __call__(self, batch: Batch) -> Batch:
        batch = shard_batch(batch, self.mesh)
        return dataclasses.replace(batch, patches=self.look_up(batch)) if self.bytes_only else batch
