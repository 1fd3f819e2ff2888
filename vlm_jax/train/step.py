"""The training step: pure, jitted once a shape, donating its state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.batch import Batch
from vlm_jax.model import Model
from vlm_jax.train.losses import loss
from vlm_jax.trees import flatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. step: int32, steps done. trainable: float32 masters."""

    step: jax.Array
    trainable: Any
    opt_state: Any
    rng: jax.Array


def init_state(
    trainable: Mapping[str, Any], tx: optax.GradientTransformation, seed: int = 0
) -> TrainState:
    """Return the state before the first step; trainable leaves become float32 masters."""
    # A copy even of float32 leaves: the step donates its state, and the caller keeps the tree.
    masters = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), dict(trainable))
    return TrainState(jnp.zeros((), jnp.int32), masters, tx.init(masters), jax.random.key(seed))


def split_rows(batch: Batch, micro_batches: int) -> Batch:
    """Return the batch as [micro_batches, rows / micro_batches, ...]; one takes every n-th row.

    Rows that lie together on a device stay there: each micro-batch has rows of every device.
    """

    def regroup(leaf: jax.Array) -> jax.Array:
        rows = leaf.shape[0]
        if rows % micro_batches:
            raise ValueError(f"{rows} rows do not divide into {micro_batches} micro-batches.")
        shape = (rows // micro_batches, micro_batches, *leaf.shape[1:])
        return leaf.reshape(shape).swapaxes(0, 1)

    return jax.tree.map(regroup, batch)


def _gradients(
    model: Model,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    micro_batches: int,
    options: Mapping[str, float],
):
    """Return (loss_sum, tokens, gradients of loss_sum), summed over the micro-batches.

    options: of `loss`.
    """
    keys = jax.random.split(jax.random.fold_in(state.rng, state.step), micro_batches)
    grad = jax.value_and_grad(
        lambda trainable, rows, key: loss(
            model, trainable, frozen, rows, {"dropout": key}, **options
        ),
        has_aux=True,
    )
    if micro_batches == 1:
        (loss_sum, tokens), grads = grad(state.trainable, batch, keys[0])
        return loss_sum, tokens, grads

    def body(total, inputs):
        (loss_sum, tokens), grads = grad(state.trainable, *inputs)
        return jax.tree.map(jnp.add, total, (loss_sum, tokens, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    start = (jnp.float32(0.0), jnp.float32(0.0), zeros)
    return jax.lax.scan(body, start, (split_rows(batch, micro_batches), keys))[0]


def make_step(
    model: Model,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
    *,
    label_smoothing: float = 0.0,
    neftune_alpha: float = 0.0,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Return `step(state, frozen, batch) -> (state, metrics)`: pure, jittable, donatable.

    The loss is the sum over all micro-batches divided by all their answer tokens, so that the
    gradient does not depend on how rows are split. label_smoothing, neftune_alpha: see `loss`.
    metrics: float32 scalars: loss, tokens, grad_norm (before clipping) and grad_norm/<component>
    of each component that trains.
    """

    options = {"label_smoothing": label_smoothing, "neftune_alpha": neftune_alpha}

    def step(state: TrainState, frozen: Any, batch: Batch):
        loss_sum, tokens, grads = _gradients(model, state, frozen, batch, micro_batches, options)
        # A batch without an answer token (all rows padding) must not turn into NaN.
        scale = 1.0 / jnp.maximum(tokens, 1e-9)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        metrics = {"loss": loss_sum * scale, "tokens": tokens}
        metrics["grad_norm"] = optax.tree.norm(grads)
        parts: dict[str, dict[str, Any]] = {}
        for path, leaf in flatten(grads).items():
            parts.setdefault(model.component(path), {})[path] = leaf
        for component, leaves in parts.items():
            metrics[f"grad_norm/{component}"] = optax.tree.norm(leaves)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state, state.rng), metrics

    return step
