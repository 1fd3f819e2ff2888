"""Adam's rule over a tree of leaves, each with its own store of moments."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.train.moments import Pages, Store, advance, fresh, pages_of, store_of
from vlm_jax.trees import flatten, map_leaves, unflatten


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
    paged: moments of large leaves lie in pinned host memory as equal pages. A step brings one
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
