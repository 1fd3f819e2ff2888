"""Optimizers of optax beside AdamW, by name, applied to each tensor that PyTorch would hold.

Our layers are stacked: what looks at a whole matrix (its rows and columns, its size, its singular
values) must look at each layer's alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.trees import Table, flatten, match, unflatten
from vlm_jax.weights.blocks import TENSORS

# Which leaves Muon takes; AdamW has the rest. It is made for matrices between hidden states, so
# not for embeddings, heads and what reads pixels, nor for LoRA's factors, which are no such map.
MUON: Table = [
    (r"(.*/)?(lm_head|patch_embed|patch_embedding)/.*", False),
    (r"(.*/)?kernel", True),
    (r".*", False),
]


def promoting(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a rule of optax that may promote dtypes where JAX's promotion is strict, as in tests.

    Bias corrections are a Python float to the power of an int32 count; Adafactor's decay is
    float32 beside moments of the leaf's dtype.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return rule.update(updates, state, params)

    return optax.GradientTransformation(rule.init, update)


def adafactor(beta1: float, beta2: float) -> optax.GradientTransformation:
    """Return transformers' Adafactor as its Trainer sets it (https://arxiv.org/abs/1804.04235).

    Without scale_parameter and relative_step, so at the run's learning rate; every matrix factored.
    """
    factored = promoting(optax.scale_by_factored_rms(min_dim_size_to_factor=1))
    return optax.chain(factored, optax.clip_by_block_rms(1.0))


def lion(beta1: float, beta2: float) -> optax.GradientTransformation:
    """Return Lion (https://arxiv.org/abs/2302.06675), with Adam's betas as in transformers."""
    return optax.scale_by_lion(beta1, beta2)


def muon(beta1: float, beta2: float) -> optax.GradientTransformation:
    """Return Muon, whose updates are as large as AdamW's: one learning rate serves both.

    That size is 0.2 times the root of the longer side (https://arxiv.org/abs/2502.16982, 2.2).
    """
    size = optax.stateless(lambda update, _: 0.2 * math.sqrt(max(update.shape)) * update)
    return optax.chain(promoting(optax.contrib.scale_by_muon()), size)


# What `optimizer_name` gives -> (beta1, beta2) -> the rule of one tensor.
RULES: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}


def takes(name: str, path: str) -> bool:
    """Return whether the optimizer of this name is the one that updates the leaf at `path`."""
    return name != "muon" or bool(match(MUON, [path], "muon table", unused="allow")[path])


def each_tensor(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the rule applied to each tensor of PyTorch's in a tree, by itself.

    The state is {path: the rule's own}, with an axis of layers in front where the leaf has one.
    What has the leaf's shape lies as the leaf does, all else (factors, counts) on every device. Of
    `jax.ShapeDtypeStruct`s `init` returns such structs, so that a state can be planned.
    """

    def of(path: str, rank: int) -> optax.GradientTransformation:
        axes = match(TENSORS, [path], "tensor table", unused="allow")[path][0]
        if rank <= axes:
            return rule
        return optax.GradientTransformation(jax.vmap(rule.init), jax.vmap(rule.update))

    def init(params: Any) -> dict[str, Any]:
        leaves = _leaves(params)

        def build(leaves: Mapping[str, Any]) -> dict[str, Any]:
            return unflatten({path: of(path, x.ndim).init(x) for path, x in leaves.items()})

        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values()):
            return build(leaves)
        shapes = flatten(jax.eval_shape(build, leaves))
        where = unflatten(
            {
                path: jax.tree.map(lambda x, leaf=leaf: _beside(x, leaf), shapes[path])
                for path, leaf in leaves.items()
            }
        )
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
            return jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                unflatten(shapes),
                where,
            )
        on_mesh = all(isinstance(s, NamedSharding) for s in jax.tree.leaves(where))
        return jax.jit(build, out_shardings=where if on_mesh else None)(leaves)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        states, values = flatten(state), flatten(params)
        new, kept = {}, {}
        for path, leaf in flatten(updates).items():
            new[path] = leaf
            if path in states:
                new[path], kept[path] = of(path, leaf.ndim).update(leaf, states[path], values[path])
        return unflatten(new), unflatten(kept)

    return optax.GradientTransformation(init, update)


def _leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, without the empty nodes that stand for other groups' leaves."""
    return {p: x for p, x in flatten(tree).items() if not isinstance(x, optax.MaskedNode)}


def _beside(shape: Any, leaf: Any) -> Any:
    """Return where a part of a leaf's state lies: as the leaf, or whole on all of its devices."""
    sharding = getattr(leaf, "sharding", None)
    if shape.shape == leaf.shape or not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec())
