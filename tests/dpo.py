"""Direct preference optimisation, as an objective: https://arxiv.org/abs/2305.18290, equation 7.

The first half of a batch's rows are chosen answers, the second half the rejected ones, in the same
order. The reference model is the base: the same weights with the adapter switched off.
"""

import jax
import jax.numpy as jnp

from vlm_jax.models.layers.linear import is_lora
from vlm_jax.train.losses import summed_losses
from vlm_jax.trees import flatten, unflatten


def dpo(model, params, batch, rngs=None, *, label_smoothing=0.0, neftune_alpha=0.0, beta=0.1):
    """Return (sum over pairs, pairs, {"reward_accuracy": pairs that are told apart rightly})."""
    base = unflatten({path: leaf for path, leaf in flatten(params).items() if not is_lora(path)})
    policy = summed_losses(model, params, batch, rngs, neftune_alpha=neftune_alpha, per_row=True)
    reference = summed_losses(model, base, batch, per_row=True)
    chosen, rejected = jnp.split(jax.lax.stop_gradient(reference) - policy, 2)
    margin = beta * (chosen - rejected)
    losses = -jax.nn.log_sigmoid(margin) * (1 - label_smoothing)
    losses -= jax.nn.log_sigmoid(-margin) * label_smoothing
    # A pair of padding rows counts nothing.
    pairs = jnp.any(jnp.asarray(batch.weights) > 0, axis=1)[: len(margin)].astype(jnp.float32)
    right = (margin > 0).astype(jnp.float32)
    return jnp.sum(losses * pairs), jnp.sum(pairs), {"reward_accuracy": jnp.sum(right * pairs)}
