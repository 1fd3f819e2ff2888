"""Rematerialisation: what the forward pass keeps for the backward one, by a policy's name.

Values are named where they are made, with `jax.ad_checkpoint.checkpoint_name`; a policy says which
names are kept. The rest is recomputed.
"""

from typing import Any

import jax

BLOCK_INPUT = "block_input"
QKV = "qkv"  # queries, keys and values, after rotary positions
ATTENDED = "attended"  # what attention gives, and the log-sum-exp of its scores where a kernel does
MID = "mid"  # the residual stream between attention and MLP
LOW = "low"  # x A of LoRA, [..., R]
GATE = "gate"  # what the first layer of a gated MLP gives, before its activation
UP = "up"  # what its second layer gives, or the first one of an MLP without gate

_keep = jax.checkpoint_policies.save_only_these_names

# What the forward pass keeps for the backward one, each block's input always; the rest is
# recomputed. Those of names each keep more than the one before.
REMAT: dict[str, Any] = {
    "none": None,  # everything
    "block": jax.checkpoint_policies.nothing_saveable,
    "qkv": _keep(ATTENDED, QKV),
    "residual": _keep(ATTENDED, QKV, MID, LOW),
    "gate": _keep(ATTENDED, QKV, MID, LOW, GATE),
    "products": _keep(ATTENDED, QKV, MID, LOW, GATE, UP),
    # what attention gives, whose scores are the dearest to recompute in long rows
    "block_save_attention": _keep(ATTENDED),
    # each product with a weight
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # each block's input, in the host's memory
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
