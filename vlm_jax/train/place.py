"""Where every leaf of a training state lies on the mesh, for arrays and for shapes alike."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, KeyPath

from vlm_jax.model import Model
from vlm_jax.sharding import param_shardings
from vlm_jax.train.step import TrainState
from vlm_jax.trees import flatten

# How an optimizer's state says where it lies: the class of a node of the state -> a function of
# (that node, {path: sharding} of the trainable leaves, mesh) that returns a tree of shardings.
# What has no entry lies as its parameter does.
PLACES: dict[type, Callable[[Any, dict[str, NamedSharding], Mesh], Any]] = {}


def state_shardings(model: Model, state: TrainState, mesh: Mesh) -> TrainState:
    """Return the sharding of each leaf of a state of arrays or shapes.

    Masters are sharded as the model's table says, and what the optimizer keeps for a leaf, under
    the leaf's own path and with its shape, like it; scalars and keys lie whole on every device.
    `PLACES` overrides this for whole nodes. Raises `ValueError` for any other leaf: replicated
    silently it would cost every device all of it.
    """
    placed = flatten(param_shardings(model, state.trainable, mesh))
    shapes = {path: leaf.shape for path, leaf in flatten(state.trainable).items()}
    whole = NamedSharding(mesh, PartitionSpec())

    def place(keys: KeyPath, leaf: Any) -> Any:
        if type(leaf) in PLACES:
            return PLACES[type(leaf)](leaf, placed, mesh)
        path = _parameter(keys)
        if path in placed and shapes[path] == leaf.shape:
            return placed[path]
        if leaf.ndim == 0:
            return whole
        raise ValueError(
            f"The optimizer's state holds {jax.tree_util.keystr(keys)} of shape {leaf.shape}, "
            f"which is no trainable leaf's: say where it lies in vlm_jax.train.place.PLACES."
        )

    return jax.tree.map_with_path(place, state, is_leaf=lambda node: type(node) in PLACES)


def _parameter(keys: KeyPath) -> str:
    """Return the path that the last unbroken run of dictionary keys spells."""
    names: list[str] = []
    for key in reversed(keys):
        if not isinstance(key, DictKey):
            break
        names.insert(0, str(key.key))
    return "/".join(names)


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the tree's shapes with their shardings: what `jit(...).lower` takes for arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
