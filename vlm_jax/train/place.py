"""Where every leaf of a training state lies on the mesh, for arrays and for shapes alike.

Masters lie as the tree they come from, and moments beside their leaves, as the optimizer's own
`init` places them; what is left are scalars and keys, which every device has whole.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.sharding import put
from vlm_jax.train.step import TrainState


def on_mesh(state: TrainState, mesh: Mesh) -> TrainState:
    """Return the state with each leaf on the mesh: scalars and keys on all of its devices.

    What lies in host memory, a paged optimizer's moments, stays there.
    """

    def place(leaf: jax.Array) -> jax.Array:
        on_mesh = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        kind = leaf.sharding.memory_kind
        target = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        return leaf if on_mesh else put(leaf, target)

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

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    def of(dtype: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
            dict(trainable),
        )

    masters = of(jnp.float32)
    step, rng, average = jnp.zeros((), jnp.int32), jax.random.key(0), masters if ema else None
    state = TrainState(step, of(param_dtype), tx.init(masters), rng, average)
    return jax.tree.map(place, state)


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the tree's shapes with their shardings: what `jit(...).lower` takes for arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
