"""Attention in plain XLA: all scores of a row at once, [T, S]. The reference of the others.

Letters: B batch, T query, S key, N heads, K kv heads, G query heads a kv head, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.layers.attention.mask import Form, Mask, seen
from vlm_jax.models.layers.partition import gather_places
from vlm_jax.models.layers.remat import ATTENDED


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, form: Form
) -> jax.Array:
    """Return [B, T, N, H]; scores and softmax in float32."""
    k_BSKH, v_BSKH, mask = gather_places(k_BSKH), gather_places(v_BSKH), _gathered(mask)
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    # float32 scores and softmax: bf16 keeps 8 bits, which flattens long rows.
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = scores * form.scale
    if form.soft_cap is not None:
        scores = form.soft_cap * jnp.tanh(scores / form.soft_cap)
    seen_BTS = seen(mask, form)
    if seen_BTS is not None:
        scores = jnp.where(seen_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BTNH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return checkpoint_name(out_BTKGH.reshape(B, T, N, H), ATTENDED)


def _gathered(mask: Mask) -> Mask:
    """Return the mask with what it says of keys on each device of a row."""
    rows: dict[str, Any] = {
        name: None if leaf is None else gather_places(leaf)
        for name, leaf in mask.k._asdict().items()
        if name != "places_T"
    }
    return mask._replace(k=mask.k._replace(**rows))
