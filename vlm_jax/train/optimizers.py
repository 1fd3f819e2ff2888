"""The optimizers by name: AdamW's rule over stores of moments, and optax's, layer by layer.

Our layers are stacked: what looks at a whole matrix (its rows and columns, its size, its singular
values) must look at each layer's alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.train.moments import Pages, Store, advance, fresh, pages_of, store_of
from vlm_jax.trees import Table, flatten, map_leaves, match, unflatten
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
    return optax.chain(
        promoting(optax.scale_by_factored_rms(min_dim_size_to_factor=1)),
        optax.clip_by_block_rms(1.0),
    )


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
        return (
            rule
            if rank <= axes
            else optax.GradientTransformation(jax.vmap(rule.init), jax.vmap(rule.update))
        )

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
    """Return where a part of a leaf's state lies: as the leaf, or replicated on its devices."""
    sharding = getattr(leaf, "sharding", None)
    return (
        NamedSharding(sharding.mesh, PartitionSpec())
        if isinstance(sharding, NamedSharding) and shape.shape != leaf.shape
        else sharding
    )


def scale_by_adam(
    b1: float,
    b2: float,
    eps: float,
    eight_bit: bool = False,
    paged: bool = False,
    shardings: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """Return optax's `scale_by_adam`, whose moments may have eight bits and may lie on the host.

    eight_bit: moments are kept as bitsandbytes' AdamW8bit keeps them; small tensors' as they are.
    The update is made of the new moments before they are rounded to eight bits.
    paged: moments of large leaves lie in pinned host memory as equal pages. A step fetches one
    page after the other to the device and back, whether or not there is room for more; that is
    offloading. bitsandbytes' pages are CUDA's unified memory, which moves when memory runs out.
    shardings: {path: sharding} of the leaves on a mesh, for what comes from the host and goes back.
    Paged or not, the results are the same to the bit, see `rounded`.
    Where moments lie is a property of the state: `init` places them beside the leaves it is given.
    """

    places = shardings or {}

    def stores(path: str, leaf: Any) -> tuple[Store, Pages | None]:
        store = store_of(path, leaf.shape, eight_bit)
        return store, pages_of(store, leaf.shape, paged)

    def init(params: Any) -> optax.ScaleByAdamState:
        def zeros(kind: str) -> Any:
            return map_leaves(
                lambda path, leaf: (
                    leaf if _masked(leaf) else fresh(*stores(path, leaf), leaf, kind)
                ),
                params,
            )

        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros("mean"), zeros("square"))

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None) -> Any:
        del params
        count = optax.safe_increment(state.count)
        # Factors, since XLA divides by a scalar now as it says and now by its reciprocal.
        first, second = (1 / (1 - jax.lax.pow(jnp.float32(b), count)) for b in (b1, b2))

        def rule(gradient: jax.Array, mean: jax.Array, square: jax.Array) -> Any:
            exact = lambda x: rounded(x, count)  # noqa: E731
            kind = gradient.dtype
            gradient = exact(gradient)
            # One product of each sum is free to join it in a fused multiply-add: torch's kernels
            # do so, and 8-bit codes then come out as theirs to the last one.
            mean = (1 - b1) * gradient + exact(b1 * mean)
            square = exact((1 - b2) * gradient) * gradient + exact(b2 * square)
            size = exact(jnp.sqrt(exact(square * second.astype(kind)))) + eps
            return exact(exact(mean * first.astype(kind)) / size), mean, square

        means, squares = flatten(state.mu), flatten(state.nu)
        new = {
            path: (leaf,) * 3
            if _masked(leaf)
            else advance(
                *stores(path, leaf), rule, leaf, means[path], squares[path], places.get(path)
            )
            for path, leaf in flatten(updates).items()
        }
        parts = (unflatten({path: leaf[i] for path, leaf in new.items()}) for i in range(3))
        updates, mean, square = parts
        return updates, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def rounded(x: jax.Array, count: jax.Array) -> jax.Array:
    """Return x as it is, rounded to its dtype whatever the compiler makes of the program.

    A compiler may contract a product and a sum into one rounding, and reorder products with
    constants, differently where a leaf is updated whole and where page by page. It cannot look
    through the addition of an integer, which only we know to be 0: count is never negative.
    """
    bits = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    zero = jnp.minimum(count, 0).astype(bits)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, bits) + zero, x.dtype)


def _masked(leaf: Any) -> bool:
    """Inside `optax.multi_transform` the leaves of other groups are empty nodes."""
    return isinstance(leaf, optax.MaskedNode)
