"""The vocabulary's cross-entropy of hidden states: logits of weighted positions, chunk by chunk.

No [B, T, V] array ever exists. Where the head does not train, a chunk's gradient by the hidden
states is made together with its logits: 4 products a weight and position, forward and backward,
instead of the 6 of a head whose logits are recomputed in the backward pass.
Letters: B rows, T tokens, N chunks, C positions of a chunk, D model, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.models.layers import partition

# Of this many positions logits exist at a time on a device. Each chunk reads the whole head: on an
# accelerator, fewer are bound by that, and more take memory and are wasted on a row's last chunk.
CHUNK_POSITIONS = {"cpu": 256, "gpu": 512, "tpu": 512}
GRAIN = 16  # the rows of a tile of 16-bit numbers on a TPU

# (head, x [B, C, D], targets [B, C], weights [B, C]) -> float32 losses, [B].
ChunkLoss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def chunk_positions(rows: int, tokens: int) -> int:
    """Return how many positions of each row a chunk has, for a batch of [rows, tokens].

    Chunks of a row are of one length, and spread over devices as its tokens are.
    """
    over_rows, over_tokens = partition.parts()
    at_once = CHUNK_POSITIONS[partition.platform()] * over_rows * over_tokens // rows
    chunks = -(-tokens // max(GRAIN, at_once))
    grain = GRAIN * over_tokens
    return min(tokens, -(-tokens // (chunks * grain)) * grain)


def losses_of(logits_BCV: jax.Array, targets_BC: jax.Array, smoothing: float) -> jax.Array:
    """Return float32 [B, C], cross-entropies; smoothing: the share spread over the vocabulary.

    A target's logit is found by comparison, which a compiler fuses with the other sums over the
    vocabulary: a gather would have all logits written in float32.
    """
    ids_V = jnp.arange(logits_BCV.shape[-1], dtype=targets_BC.dtype)
    hit_BCV = ids_V[None, None] == targets_BC[:, :, None]
    picked_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0), axis=-1)
    if smoothing:
        picked_BC = (1 - smoothing) * picked_BC + smoothing * jnp.mean(logits_BCV, axis=-1)
    return jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC


def summed(
    chunk_loss: ChunkLoss,
    head: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
) -> jax.Array:
    """Return float32 [B]: each row's losses, summed over its weighted positions.

    Each row's weighted positions are gathered first, and chunks that hold none are skipped.
    head: the leaves that `chunk_loss` uses; JAX refuses what closes over a differentiated array.

    The gradient is exact in whatever is differentiated: JAX says which arguments are, and only
    where x alone is does the forward pass make the gradient (`symbolic_zeros` of
    https://docs.jax.dev/en/latest/_autosummary/jax.custom_vjp.defvjp.html).
    """

    @jax.custom_vjp
    def total(head: Any, *arrays: jax.Array) -> jax.Array:
        return _losses(chunk_loss, head, *arrays, chunk)

    def forward(*given: Any) -> tuple[jax.Array, Any]:
        head, _, *others = given
        arguments = jax.tree.map(lambda leaf: leaf.value, given)
        if not any(leaf.perturbed for leaf in jax.tree.leaves((head, others))):
            return _losses_and_gradient(chunk_loss, *arguments, chunk)

        def of_some(*arguments: Any) -> jax.Array:
            def held(leaf: Any, value: Any) -> Any:
                return value if leaf.perturbed else jax.lax.stop_gradient(value)

            return _losses(chunk_loss, *jax.tree.map(held, given, arguments), chunk)

        return jax.vjp(of_some, *arguments)

    def backward(kept: Any, scale_B: jax.Array) -> tuple[Any, ...]:
        if callable(kept):
            return kept(scale_B)
        dx_BTD = kept.astype(jnp.float32) * scale_B[:, None, None]
        return None, dx_BTD.astype(kept.dtype), None, None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(head, x_BTD, targets_BT, weights_BT)


def _losses(
    chunk_loss: ChunkLoss, head: Any, x_BTD: Any, targets_BT: Any, weights_BT: Any, chunk: int
) -> jax.Array:
    """Return the sums, differentiable in everything; the backward pass makes logits again."""
    chunks = _chunks(_order(weights_BT, chunk), x_BTD, targets_BT, weights_BT, chunk)
    zero_B = jnp.zeros(len(x_BTD), jnp.float32)

    # The backward pass makes a chunk's logits again rather than keep them. It is the body that is
    # computed again and not the branch, whose inputs, the head among them, a chunk would keep.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total_B: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        some = jnp.any(inputs[2] > 0)
        of_chunk = functools.partial(chunk_loss, head)
        return total_B + jax.lax.cond(some, of_chunk, lambda *_: zero_B, *inputs), None

    return jax.lax.scan(body, zero_B, chunks)[0]


def _losses_and_gradient(
    chunk_loss: ChunkLoss, head: Any, x_BTD: Any, targets_BT: Any, weights_BT: Any, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return the sums and their gradient by x [B, T, D], in its dtype; logits are made once."""
    order_BT = _order(weights_BT, chunk)
    chunks = _chunks(order_BT, x_BTD, targets_BT, weights_BT, chunk)
    zero_B = jnp.zeros(len(x_BTD), jnp.float32)

    def of_chunk(x_BCD: Any, targets_BC: Any, weights_BC: Any) -> tuple[jax.Array, jax.Array]:
        losses_B, pullback = jax.vjp(lambda x: chunk_loss(head, x, targets_BC, weights_BC), x_BCD)
        # Rows are independent, so that one pullback holds each row's own gradient.
        return losses_B, *pullback(jnp.ones_like(losses_B))

    def body(total_B: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        def nothing(x_BCD: Any, *_: Any) -> tuple[jax.Array, jax.Array]:
            return zero_B, jnp.zeros_like(x_BCD)

        losses_B, dx_BCD = jax.lax.cond(jnp.any(inputs[2] > 0), of_chunk, nothing, *inputs)
        return total_B + losses_B, dx_BCD

    total_B, dx_NBCD = jax.lax.scan(body, zero_B, chunks)
    B, T, D = x_BTD.shape
    dx_BTD = dx_NBCD.swapaxes(0, 1).reshape(B, -1, D)
    return total_B, jnp.take_along_axis(dx_BTD, jnp.argsort(order_BT[:, :T])[:, :, None], axis=1)


def _order(weights_BT: jax.Array, chunk: int) -> jax.Array:
    """Return int32 [B, N x C]: each row's positions, the weighted ones first; then zeros.

    Rows are reordered one by one, so that sharding over rows stays as it is.
    """
    order_BT = jnp.argsort(weights_BT <= 0, axis=1, stable=True)
    return jnp.pad(order_BT, ((0, 0), (0, -order_BT.shape[1] % chunk)))


def _chunks(order: jax.Array, x_BTD: Any, targets_BT: Any, weights_BT: Any, chunk: int) -> Any:
    """Return the three arrays in that order and in chunks, [N, B, C, ...]."""
    B, T, D = x_BTD.shape
    weights = jnp.take_along_axis(weights_BT, order, axis=1)
    weights = jnp.where((jnp.arange(order.shape[1]) < T)[None, :], weights, 0.0)
    targets = jnp.take_along_axis(targets_BT, order, axis=1)
    x = jnp.take_along_axis(x_BTD, order[:, :, None], axis=1)
    return (
        x.reshape(B, -1, chunk, D).swapaxes(0, 1),
        targets.reshape(B, -1, chunk).swapaxes(0, 1),
        weights.reshape(B, -1, chunk).swapaxes(0, 1),
    )
