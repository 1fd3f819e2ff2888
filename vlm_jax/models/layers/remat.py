"""Rematerialisation: what the forward pass keeps for the backward one, by a policy's name.

Values are named where they are made, with `jax.ad_checkpoint.checkpoint_name`; a policy says which
names are kept. The rest is recomputed.
"""

from typing import Any

import jax

BLOCK_INPUT = "block_input"
QKV = "qkv"  # queries, keys and values, after rotary positions; before their norms, where they have
ATTENDED = "attended"  # what attention gives, and the log-sum-exp of its scores where a kernel does
# The residual stream between attention and MLP; what both give, where norms stand behind them.
MID = "mid"
LOW = "low"  # x A of LoRA, [..., R]
GATE = "gate"  # what the first layer of a gated MLP gives, before its activation
UP = "up"  # what its second layer gives, or the first one of an MLP without gate

# Policy -> what of a block is kept for the backward pass, its input always: in memory, and in the
# host's. Of "none" and "dots", which go by no names, what of it has one.
KEPT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # from the one that recomputes most; each keeps more than the one before
    "offload": ((), (BLOCK_INPUT,)),  # its input too lies in the host's memory
    "block": ((), ()),
    # what attention gives, whose scores are the dearest to recompute in long rows
    "block_save_attention": ((ATTENDED,), ()),
    "qkv": ((ATTENDED, QKV), ()),
    "residual": ((ATTENDED, QKV, MID, LOW), ()),
    "gate": ((ATTENDED, QKV, MID, LOW, GATE), ()),
    # every product with a weight but a block's last: no product is computed twice
    "products": ((ATTENDED, QKV, MID, LOW, GATE, UP), ()),
    "products_offload": ((ATTENDED, QKV, MID, LOW), (GATE, UP)),
    # the same products, before what is added to them; attention's own two are recomputed
    "dots": ((QKV, MID, LOW, GATE, UP), ()),
    "none": ((ATTENDED, QKV, MID, LOW, GATE, UP), ()),  # and everything else
}
# Policies from the fastest, which keeps most, to the one that keeps least. What "none" keeps beside
# the products are elementwise values, which are recomputed in less time than they are stored, on a
# CPU too (docs/LOG.md).
ON_ACCELERATORS = ("products", "gate", "residual", "qkv", "block", "offload")
FASTEST = {
    "tpu": ON_ACCELERATORS,
    "gpu": ON_ACCELERATORS,
    "cpu": ON_ACCELERATORS[:-1],  # what a CPU calls the host's memory is its own
}


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep every value but those that `partition.gathered_layer` makes of a layer's weights.

    Whole weights of all layers would be a copy of the model; they are gathered again. Rows that
    `partition` lays out are what they were before, so that nothing is lost with them.
    """
    return primitive.name not in ("sharding_constraint", "custom_vjp_call")


def _named(policy: str) -> Any:
    """Return JAX's policy that keeps the names of ours."""
    device, host = KEPT[policy]
    if not host:
        return jax.checkpoint_policies.save_only_these_names(*device)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(device),
        names_which_can_be_offloaded=list(host),
        offload_src="device",
        offload_dst="pinned_host",
    )


# Policy -> JAX's own.
REMAT: dict[str, Any] = {
    **{policy: _named(policy) for policy in KEPT},
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": _all_but_weights,  # where `partition.weights_are_spread`; else nothing is wrapped
}
