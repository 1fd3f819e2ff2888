"""Bytes that a remat policy keeps of a token and layer: one table, for estimates and for `auto`."""

from vlm_jax.model import Model
from vlm_jax.models.layers.remat import (
    ATTENDED,
    BLOCK_INPUT,
    GATE,
    KEPT,
    LOW,
    MID,
    QKV,
    UP,
)

Sizes = dict[str, int]  # what is kept -> bytes of a token, or of a patch, and layer
REST = "rest"  # what "none" keeps that has no name; attention's scores are counted by themselves
# Bytes of it for each number of a block's width: float32 values in and around two norms.
NORMS = 24


def decoder_bytes(model: Model) -> Sizes:
    """Return the bytes of each named value of the decoder's blocks."""
    text, size = model.config.text, model.dtype.itemsize
    heads, grouped = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    rank = 0 if model.lora is None else model.lora.rank
    return {
        BLOCK_INPUT: text.hidden_size * size,
        QKV: (heads + 2 * grouped) * size,
        ATTENDED: heads * size + text.num_heads * 4,  # and a float32 log-sum-exp a head
        MID: text.hidden_size * size,
        LOW: 7 * rank * size,  # of all products of a block
        GATE: text.intermediate_size * size,
        UP: text.intermediate_size * size,
        REST: 3 * text.intermediate_size * size + NORMS * text.hidden_size,
    }


def tower_bytes(model: Model) -> Sizes:
    """Return the bytes of each named value of the vision tower's blocks, whose MLP has no gate."""
    vision, size = model.config.vision, model.dtype.itemsize
    rank = 0 if model.lora is None else model.lora.rank
    return {
        BLOCK_INPUT: vision.width * size,
        QKV: 3 * vision.width * size,
        ATTENDED: vision.width * size + vision.num_heads * 4,
        MID: vision.width * size,
        LOW: 6 * rank * size,
        GATE: 0,
        UP: vision.intermediate_size * size,
        REST: 2 * vision.intermediate_size * size + NORMS * vision.width,
    }


def kept(sizes: Sizes, policy: str) -> tuple[int, int]:
    """Return the bytes of a token and layer that a policy keeps: on the device, on the host."""
    device, host = (sum(sizes[name] for name in names) for names in KEPT[policy])
    rest = sizes[REST] if policy == "none" else 0
    return device + rest + (0 if BLOCK_INPUT in KEPT[policy][1] else sizes[BLOCK_INPUT]), host
