"""What a training step minimises: next-token cross-entropy, and the table of all objectives.

Logits are made of weighted positions only, chunk by chunk; no [B, T, V] array ever exists.
Letters: B rows, T tokens, C positions of a chunk, D model, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.adapters.added_tokens import HEAD
from vlm_jax.batch import Batch
from vlm_jax.model import Model
from vlm_jax.models.layers import partition
from vlm_jax.models.layers.cross_entropy import losses_of, summed
from vlm_jax.sharding import gathered
from vlm_jax.trees import flatten, join, unflatten

NOISE = 0x6E6F  # sets the key of embeddings' noise apart from dropout's


def head_of(model: Model) -> str:
    """Return the module that gives the logits: the embedding where the head is tied to it."""
    return model.config.embedding if model.config.text.tied else HEAD


def _head(model: Model, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that logits are made of, replicated: for all chunks alike."""
    flat = flatten(params)
    own = unflatten({p: leaf for p, leaf in flat.items() if p.startswith(f"{head_of(model)}/")})
    mesh = partition.mesh()
    return own if mesh is None or mesh.shape["fsdp"] == 1 else gathered(model, own, mesh)


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
    head = _head(model, params)

    def chunk_loss(head, x_BCD, targets_BC, weights_BC):
        x_BCD = partition.constrain_rows(x_BCD)
        logits_BCV: Any = module.apply({"params": head}, x_BCD, method="logits", rngs=rngs)
        losses_BC = losses_of(logits_BCV, targets_BC, label_smoothing)
        return jnp.sum(losses_BC * weights_BC, axis=1)

    of_batch = x_BTD, batch.targets, batch.weights
    return summed(chunk_loss, head, *of_batch, per_row=per_row)


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
