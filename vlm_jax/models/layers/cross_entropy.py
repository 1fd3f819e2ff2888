"""The vocabulary's cross-entropy of hidden states: logits of weighted positions, chunk by chunk.

No [B, T, V] array ever exists. A chunk's gradients are made together with its logits, in the
forward pass: 4 FLOPs a weight and position of a frozen head, 6 of one that trains, where logits
recomputed in the backward pass would cost 6 and 8, and copies of the head between the passes. It is
possible since the loss is a sum: the backward pass scales gradients by one number.
Letters: B rows, T tokens, N chunks, C positions of a chunk, D model, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.models.layers import partition

# Of this many positions logits exist at a time on a device: where the head is frozen, and where it
# trains. Each chunk reads the whole head (and adds to its whole gradient): on an accelerator, fewer
# positions are bound by that, and more take memory and are wasted on a row's last chunk.
CHUNK_POSITIONS = {"cpu": (256, 256), "gpu": (512, 1024), "tpu": (512, 1024)}
GRAIN = 16  # the rows of a tile of 16-bit numbers on a TPU

# (head, x [B, C, D], targets [B, C], weights [B, C]) -> float32 losses, [B].
ChunkLoss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def chunk_positions(shape: tuple[int, ...], trains: bool = False) -> int:
    """Return how many positions of each row a chunk has, for a batch of `shape` [rows, tokens].

    trains: whether the head does. Chunks of a row are of one length, and spread over devices as
    its tokens are.
    """
    (rows, tokens), (over_rows, over_tokens) = shape, partition.parts()
    at_once = CHUNK_POSITIONS[partition.platform()][trains] * over_rows * over_tokens // rows
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
    *,
    per_row: bool = False,
    chunk: int | None = None,
) -> jax.Array:
    """Return float32 [], the losses summed over weighted positions; per_row: of each row, [B].

    Each row's weighted positions are gathered first, and chunks that hold none are skipped.
    head: the leaves that `chunk_loss` uses; JAX refuses what closes over a differentiated array.
    chunk: positions of a row in a chunk, None: `chunk_positions`.

    JAX says which leaves are differentiated (`symbolic_zeros` of
    https://docs.jax.dev/en/latest/_autosummary/jax.custom_vjp.defvjp.html), so that no gradient is
    missing. A head's gradient by row has no place to be: there logits are recomputed.
    """

    def size(trains: bool) -> int:
        return chunk or chunk_positions(targets_BT.shape, trains)

    @jax.custom_vjp
    def total(*arguments: Any) -> jax.Array:
        losses_B = _losses(chunk_loss, arguments, size(trains=False))
        return losses_B if per_row else jnp.sum(losses_B)

    def forward(*given: Any) -> tuple[jax.Array, Any]:
        arguments, moves = (
            jax.tree.map(lambda leaf, name=name: getattr(leaf, name), given)
            for name in ("value", "perturbed")
        )
        head_moves, _, *others_move = moves
        trains = any(jax.tree.leaves(head_moves))
        if any(others_move) or (trains and per_row):

            def of_some(*arguments: Any) -> jax.Array:
                held = jax.tree.map(
                    lambda value, moves: value if moves else jax.lax.stop_gradient(value),
                    arguments,
                    moves,
                )
                losses_B = _losses(chunk_loss, held, size(trains))
                return losses_B if per_row else jnp.sum(losses_B)

            return jax.vjp(of_some, *arguments)
        losses_B, gradients = _losses_and_gradients(chunk_loss, arguments, size(trains), head_moves)
        return losses_B if per_row else jnp.sum(losses_B), gradients

    def backward(kept: Any, scale: jax.Array) -> tuple[Any, ...]:
        if callable(kept):
            return kept(scale)
        dhead, dx_BTD = kept
        scaled = lambda leaf, scale: (leaf.astype(jnp.float32) * scale).astype(leaf.dtype)  # noqa: E731
        dx_BTD = scaled(dx_BTD, scale.reshape(-1, 1, 1))
        return jax.tree.map(lambda leaf: scaled(leaf, scale), dhead), dx_BTD, None, None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(head, x_BTD, targets_BT, weights_BT)


def _losses(chunk_loss: ChunkLoss, arguments: Any, chunk: int) -> jax.Array:
    """Return the sums [B], differentiable in everything; the backward pass recomputes logits."""
    head, x_BTD, targets_BT, weights_BT = arguments
    chunks = _chunks(_order(weights_BT, chunk), x_BTD, targets_BT, weights_BT, chunk)
    zero_B = jnp.zeros(len(x_BTD), jnp.float32)

    # It is the body that is recomputed and not the branch, whose inputs, the head among them, a
    # chunk would keep.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total_B: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        some = jnp.any(inputs[2] > 0)
        of_chunk = functools.partial(chunk_loss, head)
        return total_B + jax.lax.cond(some, of_chunk, lambda *_: zero_B, *inputs), None

    return jax.lax.scan(body, zero_B, chunks)[0]


def _losses_and_gradients(
    chunk_loss: ChunkLoss, arguments: Any, chunk: int, moves: Any
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """Return the sums [B], and gradients of their sum: by the head's leaves and by x [B, T, D].

    moves: which leaves have one; None stands for the others'. A gradient has its leaf's dtype.
    """
    head, x_BTD, targets_BT, weights_BT = arguments
    order_BT = _order(weights_BT, chunk)
    chunks = _chunks(order_BT, x_BTD, targets_BT, weights_BT, chunk)
    leaves, tree = jax.tree.flatten(head)
    which = [place for place, own in enumerate(jax.tree.leaves(moves)) if own]

    def placed(some: Any, others: list[Any]) -> Any:
        replaced = dict(zip(which, some, strict=True))
        return jax.tree.unflatten(tree, [replaced.get(n, o) for n, o in enumerate(others)])

    def body(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
        def of_chunk(sums: Any, x_BCD: Any, targets_BC: Any, weights_BC: Any) -> Any:
            def losses(some: Any, x_BCD: Any) -> jax.Array:
                return chunk_loss(placed(some, leaves), x_BCD, targets_BC, weights_BC)

            losses_B, pullback = jax.vjp(losses, [leaves[n] for n in which], x_BCD)
            # Rows are independent, so that one pullback holds each row's own gradient by x.
            by_some, dx_BCD = pullback(jnp.ones_like(losses_B))
            return jax.tree.map(jnp.add, sums, (losses_B, by_some)), dx_BCD

        def nothing(sums: Any, x_BCD: Any, *_: Any) -> Any:
            return sums, jnp.zeros_like(x_BCD)

        return jax.lax.cond(jnp.any(inputs[2] > 0), of_chunk, nothing, carry, *inputs)

    B, T, D = x_BTD.shape
    start = (jnp.zeros(B, jnp.float32), [jnp.zeros_like(leaves[n]) for n in which])
    (losses_B, by_some), dx_NBCD = jax.lax.scan(body, start, chunks)
    dx_BTD = dx_NBCD.swapaxes(0, 1).reshape(B, -1, D)
    dx_BTD = jnp.take_along_axis(dx_BTD, jnp.argsort(order_BT[:, :T])[:, :, None], axis=1)
    return losses_B, (placed(by_some, [None] * len(leaves)), dx_BTD)


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
