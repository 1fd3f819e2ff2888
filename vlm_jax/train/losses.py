"""What a training step minimises: next-token cross-entropy, and the table of all objectives.

Logits are made of weighted positions only, chunk by chunk; no [B, T, V] array ever exists.
Letters: B rows, T tokens, C positions of a chunk, D model, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.adapters.added_tokens import HEAD
from vlm_jax.batch import Batch
from vlm_jax.model import Model
from vlm_jax.models.layers import partition
from vlm_jax.sharding import gathered
from vlm_jax.trees import flatten, join, unflatten

# Logits of about this many positions exist at a time on a device.
CHUNK_POSITIONS = 1024
NOISE = 0x6E6F  # sets the key of embeddings' noise apart from dropout's


def _gather_weighted(x_BTD, targets_BT, weights_BT, chunk: int):
    """Return the three arrays with each row's weighted positions first, in chunks [N, B, C, ...].

    Rows are reordered one by one, so sharding over rows stays as it is.
    """
    B, T, D = x_BTD.shape
    chunks = -(-T // chunk)
    order_BT = jnp.argsort(weights_BT <= 0, axis=1, stable=True)
    order_BT = jnp.pad(order_BT, ((0, 0), (0, chunks * chunk - T)))
    weights = jnp.take_along_axis(weights_BT, order_BT, axis=1)
    weights = jnp.where((jnp.arange(chunks * chunk) < T)[None, :], weights, 0.0)
    targets = jnp.take_along_axis(targets_BT, order_BT, axis=1)
    x = jnp.take_along_axis(x_BTD, order_BT[:, :, None], axis=1)
    return (
        x.reshape(B, chunks, chunk, D).swapaxes(0, 1),
        targets.reshape(B, chunks, chunk).swapaxes(0, 1),
        weights.reshape(B, chunks, chunk).swapaxes(0, 1),
    )


def head_of(model: Model) -> str:
    """Return the module that gives the logits: the embedding where the head is tied to it."""
    return model.config.embedding if model.config.text.tied else HEAD


def _head_gathered(model: Model, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with those of the head replicated, for all chunks alike."""
    mesh = partition.mesh()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params
    flat = flatten(params)
    own = {path: leaf for path, leaf in flat.items() if path.startswith(f"{head_of(model)}/")}
    return unflatten({**flat, **flatten(gathered(model, unflatten(own), mesh))})


def joined(model: Model, trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole tree to compute with: float32 masters are cast once, not at every use."""
    return join(jax.tree.map(lambda leaf: leaf.astype(model.dtype), dict(trainable)), frozen)


def summed_losses(
    model: Model,
    params: dict[str, Any],
    batch: Batch,
    rngs: dict[str, jax.Array] | None = None,
    *,
    label_smoothing: float = 0.0,
    neftune_alpha: float = 0.0,
    per_row: bool = False,
) -> jax.Array:
    """Return the weighted sum of tokens' cross-entropies, float32 []; per_row: of each row, [B].

    Without smoothing a row's is minus the log-probability of its answer. Positions without weight
    cost no logits: each row's weighted positions are gathered first, and chunks that hold none are
    skipped.
    rngs: {"dropout": key} turns LoRA's dropout on. label_smoothing: the share of each target that
    is spread over the whole vocabulary, transformers' label_smoothing_factor. neftune_alpha: above
    0, noise of the same key on the embeddings of text, its neftune_noise_alpha.
    """
    variables, module = {"params": params}, model.module
    batch = jax.tree.map(jnp.asarray, batch)
    if neftune_alpha > 0:
        if not rngs:
            raise ValueError('Noise on embeddings needs rngs={"dropout": key}.')
        rngs = {**rngs, "noise": jax.random.fold_in(rngs["dropout"], NOISE)}
    x_BTD, _ = module.apply(variables, batch, None, neftune_alpha, method="hidden", rngs=rngs)
    B, T, _ = x_BTD.shape
    over_rows, over_tokens = partition.parts()
    chunk = max(16, CHUNK_POSITIONS * over_rows * over_tokens // B)
    chunk = min(T, -(-chunk // over_tokens) * over_tokens)  # its positions are spread as tokens are
    chunks = _gather_weighted(x_BTD, batch.targets, batch.weights, chunk)
    variables = {"params": _head_gathered(model, params)}
    zero = functools.partial(jnp.zeros, (B,) if per_row else (), jnp.float32)

    def chunk_loss(x_BCD, targets_BC, weights_BC):
        x_BCD = partition.constrain_rows(x_BCD)
        logits_BCV: Any = module.apply(variables, x_BCD, method="logits", rngs=rngs)
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        if label_smoothing:
            everywhere_BC = jnp.mean(logits_BCV, axis=-1)
            picked_BC = (1 - label_smoothing) * picked_BC + label_smoothing * everywhere_BC
        losses_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC
        return jnp.sum(losses_BC * weights_BC, 1 if per_row else None)

    # The backward pass makes a chunk's logits again rather than keep them. It is the body that is
    # computed again and not the branch, whose inputs, the head among them, a chunk would keep.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total, inputs):
        some = jnp.any(inputs[2] > 0)
        return total + jax.lax.cond(some, chunk_loss, lambda *_: zero(), *inputs), None

    return jax.lax.scan(body, zero(), chunks)[0]


def cross_entropy(
    model: Model,
    params: dict[str, Any],
    batch: Batch,
    rngs: dict[str, jax.Array] | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Return (weighted sum of the tokens' cross-entropies, sum of weights, {}).

    options: label_smoothing and neftune_alpha, as `summed_losses` takes them.
    """
    return summed_losses(model, params, batch, rngs, **options), jnp.sum(batch.weights), {}


# An objective is called as `cross_entropy` is, and returns (sum, count, {name: sum}). Micro-batches
# are added up; sum / count of the whole batch is minimised, and {name: sum / count} is logged
# beside it. Only what trains has a gradient, whatever else of params is used.
Objective = Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
# training.objective -> what a step minimises. To add one, write a file and add a line.
OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy}


def loss(
    model: Model,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batch: Batch,
    rngs: dict[str, jax.Array] | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return `(loss_sum, tokens)` of `cross_entropy`, differentiable in `trainable`.

    Divide by the tokens of the whole global batch. options: as `cross_entropy` takes them.
    """
    return cross_entropy(model, joined(model, trainable, frozen), batch, rngs, **options)[:2]
