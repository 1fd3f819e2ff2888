"""One attention for decoder and towers; the mask is described, not built by the caller.

Letters: B batch, T query, S key, N heads, K kv heads, G query heads a kv head, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.layers.partition import gather_places
from vlm_jax.models.layers.remat import ATTENDED


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    *,
    causal: bool,
    window: Any = None,
    q_start: Any = 0,
) -> jax.Array:
    """Return [B, T, N, H]; scores are scaled by 1/sqrt(H) and softmaxed in float32.

    A query attends to the keys of its own segment (None: to all); `causal`: of those, to keys at
    its own slot or before, where queries sit in slots q_start, q_start + 1, ... and keys in 0, 1,
    ...; `window` (int or int32 scalar): only to keys less than that many slots before it.
    K/V heads serve N/K query heads each and are never repeated in memory.
    """
    k_BSKH, v_BSKH = gather_places(k_BSKH), gather_places(v_BSKH)
    if k_segments_BS is not None:
        k_segments_BS = gather_places(k_segments_BS)
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    # float32 scores and softmax: bf16 keeps 8 bits, which flattens long rows.
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = scores * H**-0.5
    mask_BTS = jnp.ones((1, 1, 1), bool)
    if q_segments_BT is not None and k_segments_BS is not None:
        mask_BTS = q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    if causal:
        distance_TS = (q_start + jnp.arange(T))[:, None] - jnp.arange(S)[None, :]
        allowed_TS = distance_TS >= 0
        if window is not None:
            allowed_TS = allowed_TS & (distance_TS < window)
        mask_BTS = mask_BTS & allowed_TS[None]
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BTNH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return checkpoint_name(out_BTKGH.reshape(B, T, N, H), ATTENDED)
