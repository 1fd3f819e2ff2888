"""The training step: pure, jitted once a shape, donating its state.

Weights of 16 bits are updated with stochastic rounding: a bfloat16 has 8 bits, so that an update
below 1/512 of its weight would be lost each time, rounded to the nearest.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.batch import Batch
from vlm_jax.model import Model
from vlm_jax.train.losses import Objective, cross_entropy, joined
from vlm_jax.trees import flatten, map_leaves

ROUNDING = 0x726F  # sets this key apart from dropout's and noise's of the same step


def is_key(leaf: Any) -> bool:
    """Return whether an array, or its shape, is of random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Return float32 `x` as bfloat16: one of its two neighbours, whose expectation is x.

    Random bits are added to the 16 that bfloat16 has not, then those are cut off; so what is a
    bfloat16 stays as it is. Numbers that are not finite are converted as always.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = ((bits + drawn) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def stored(masters: Any, like: Any, rng: jax.Array, step: jax.Array) -> Any:
    """Return float32 weights in the dtypes of `like`; by stochastic rounding from rng and step."""
    key = jax.random.fold_in(jax.random.fold_in(rng, step), ROUNDING)
    kinds = {path: leaf.dtype for path, leaf in flatten(like).items()}

    def one(path: str, leaf: jax.Array) -> jax.Array:
        return (
            leaf
            if kinds[path] == leaf.dtype
            else stochastic_round(leaf, jax.random.fold_in(key, zlib.crc32(path.encode())))
        )

    return map_leaves(one, masters)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    step: int32, steps done. trainable: masters, float32 or bfloat16. ema: the float32 moving
    average of what trains, None where there is none.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    rng: jax.Array
    ema: Any = None

    @property
    def result(self) -> Any:
        """The trainable leaves to evaluate and to keep: their average where there is one."""
        return self.trainable if self.ema is None else self.ema


def init_state(
    trainable: Mapping[str, Any],
    tx: optax.GradientTransformation,
    seed: int = 0,
    param_dtype: Any = jnp.float32,
    ema: bool = False,
) -> TrainState:
    """Return the state before the first step.

    Args:
        trainable: the first tree of `split`; its leaves become masters of param_dtype.
        tx: of `optimizer`; its state is float32 in any case.
        seed: of dropout, noise and stochastic rounding.
        param_dtype: of the masters.
        ema: whether the state holds a moving average too.
    """
    # A copy even of float32 leaves: the step donates its state, and the caller keeps the tree.
    copied = lambda tree, dtype: jax.tree.map(  # noqa: E731
        lambda leaf: jnp.array(leaf, dtype, copy=True), dict(tree)
    )
    masters = copied(trainable, jnp.float32)
    opt_state, average = tx.init(masters), copied(trainable, jnp.float32) if ema else None
    if param_dtype != jnp.float32:
        masters = copied(masters, param_dtype)
    return TrainState(jnp.zeros((), jnp.int32), masters, opt_state, jax.random.key(seed), average)


def split_rows(batch: Batch, micro_batches: int) -> Batch:
    """Return the batch as [micro_batches, rows / micro_batches, ...]; one takes every n-th row.

    Rows that lie together on a device stay there: each micro-batch has rows of every device.
    """

    def regroup(leaf: jax.Array) -> jax.Array:
        rows, *sizes = leaf.shape
        if rows % micro_batches:
            raise ValueError(f"{rows} rows do not divide into {micro_batches} micro-batches.")
        return leaf.reshape(rows // micro_batches, micro_batches, *sizes).swapaxes(0, 1)

    return jax.tree.map(regroup, batch)


def averaged(ema: Any, new: Any, decay: float, step: jax.Array) -> Any:
    """Return decay * ema + (1 - decay) * new; after the first step `new`, as torch's swa_utils."""
    keep = jnp.where(step == 0, 0.0, decay)
    return jax.tree.map(lambda old, leaf: leaf + keep * (old - leaf), ema, new)


def _gradients(
    model: Model,
    masters: Any,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    micro_batches: int,
    objective: Objective,
):
    """Return (sum, count, {name: sum}, gradients of the sum), summed over the micro-batches."""
    keys = jax.random.split(jax.random.fold_in(state.rng, state.step), micro_batches)

    def value(trainable: Any, rows: Batch, key: jax.Array):
        total, count, others = objective(
            model, joined(model, trainable, frozen), rows, {"dropout": key}
        )
        return total, (count, others)

    grad = jax.value_and_grad(value, has_aux=True)
    if micro_batches == 1:
        (total, (count, others)), grads = grad(masters, batch, keys[0])
        return total, count, others, grads

    def body(sums, inputs):
        (total, (count, others)), grads = grad(masters, *inputs)
        return jax.tree.map(jnp.add, sums, (total, count, grads)), others

    start = (jnp.float32(0.0), jnp.float32(0.0), jax.tree.map(jnp.zeros_like, masters))
    inputs = (split_rows(batch, micro_batches), keys)
    (total, count, grads), others = jax.lax.scan(body, start, inputs)
    return total, count, jax.tree.map(lambda each: jnp.sum(each, 0), others), grads


def make_step(
    model: Model,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
    *,
    objective: Objective = cross_entropy,
    label_smoothing: float = 0.0,
    neftune_alpha: float = 0.0,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Return `step(state, frozen, batch) -> (state, metrics)`: pure, jittable, donatable.

    The loss is the sum over all micro-batches divided by all their answer tokens, so that the
    gradient does not depend on how rows are split. objective: of `losses.OBJECTIVES`, or any that
    is called as those are; label_smoothing and neftune_alpha are its options. ema_decay: of the
    state's moving average, where it has one. Masters of 16 bits are computed with in float32 and
    then rounded stochastically, see `stored`.
    metrics: float32 scalars: loss, tokens (the objective's count) and its other means; grad_norm
    (before clipping) and grad_norm/<component> of each component that trains.
    """

    objective = functools.partial(
        objective, label_smoothing=label_smoothing, neftune_alpha=neftune_alpha
    )

    def step(state: TrainState, frozen: Any, batch: Batch):
        masters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.trainable)
        loss_sum, tokens, others, grads = _gradients(
            model, masters, state, frozen, batch, micro_batches, objective
        )
        # A batch without an answer token (all rows padding) must not turn into NaN.
        scale = 1.0 / jnp.maximum(tokens, 1e-9)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = tx.update(grads, state.opt_state, masters)
        metrics = {
            **{name: total * scale for name, total in others.items()},
            "loss": loss_sum * scale,
            "tokens": tokens,
            "grad_norm": optax.tree.norm(grads),
        }
        flat = flatten(grads)
        for component in dict.fromkeys(model.component(path) for path in flat):
            leaves = {path: flat[path] for path in flat if model.component(path) == component}
            metrics[f"grad_norm/{component}"] = optax.tree.norm(leaves)
        masters = optax.apply_updates(masters, updates)
        ema = None if state.ema is None else averaged(state.ema, masters, ema_decay, state.step)
        trainable = stored(masters, state.trainable, state.rng, state.step)
        return TrainState(state.step + 1, trainable, opt_state, state.rng, ema), metrics

    return step
