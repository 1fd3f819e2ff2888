"""One attention for decoder and towers; the mask is described, not built by the caller.

A kernel is a file here and a row of `choice.KERNELS`.
Letters: B batch, T query, S key, N heads, K kv heads, G query heads a kv head, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.models.layers.attention.choice import (
    KERNELS,
    case_of,
    choose,
    recorded,
)
from vlm_jax.models.layers.attention.mask import Form, Mask, Side

__all__ = ["KERNELS", "attention", "recorded"]


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
    scale: float | None = None,
    soft_cap: float | None = None,
    blocks: tuple[jax.Array, jax.Array] | None = None,
    window_bounds_blocks: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """Return [B, T, N, H]; softmax in float32 of scores times `scale`, by default 1/sqrt(H).

    A query attends to the keys of its own segment (None: to all); `causal`: of those, to keys at
    its own slot or before, where queries sit in slots q_start, q_start + 1, ... and keys in 0, 1,
    ...; `window` (int or int32 scalar): only to keys less than that many slots before it.
    K/V heads serve N/K query heads each and are never repeated in memory.
    soft_cap: c of c tanh(score / c), before masking. blocks: int32 of queries [B, T] and keys
    [B, S], 0 for none: with `causal`, also to the keys of its block and segment that lie behind it;
    window_bounds_blocks: only to those within the window. implementation: a name of
    `choice.KERNELS`; None: the fastest for such arrays on such devices.
    """
    if q_segments_BT is None or k_segments_BS is None:
        q_segments_BT = k_segments_BS = None
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    form = Form(causal, H**-0.5 if scale is None else scale, soft_cap, window_bounds_blocks)
    window = window if causal else None
    blocks = blocks if causal else None
    q_blocks_BT, k_blocks_BS = (None, None) if blocks is None else blocks
    mask = Mask(
        Side(q_start + jnp.arange(T, dtype=jnp.int32), q_segments_BT, q_blocks_BT),
        Side(jnp.arange(k_BSKH.shape[1], dtype=jnp.int32), k_segments_BS, k_blocks_BS),
        None if window is None else jnp.asarray(window, jnp.int32),
    )
    case = case_of(
        q_BTNH, k_BSKH, form,
        window=window is not None,
        blocks=blocks is not None,
        cached=not isinstance(q_start, int) or q_start != 0,
    )  # fmt: skip
    chosen = choose(case, implementation)
    return KERNELS[chosen].attend(q_BTNH, k_BSKH, v_BSKH, mask, form)
