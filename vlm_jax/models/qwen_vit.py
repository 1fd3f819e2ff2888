"""The ViT of the Qwen line: patches of images of any size, 2-D rotary positions, merged features.

https://arxiv.org/abs/2409.12191, section 2.1; with windows https://arxiv.org/abs/2502.13923,
section 2.1.1. Letters: B rows, P patches, C values a patch, D model, E tower width, F merged
features, A added features.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.batch import Batch
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.block import MLP, Compute, tower_block
from vlm_jax.models.layers.linear import Linear, parameter
from vlm_jax.models.layers.norm import LayerNorm, RMSNorm
from vlm_jax.models.layers.remat import QKV
from vlm_jax.models.layers.rope import apply_rope, grid_angles
from vlm_jax.models.layers.scan import Stack
from vlm_jax.models.qwen_vit_config import Tower

EPSILON = 1e-6  # of the tower's norms
NORMS = {"layer": LayerNorm, "rms": RMSNorm}


class TowerAttention(nn.Module):
    """Full self-attention among patches of one segment: [B, P, E] to [B, P, E].

    context: cos and sin [B, P, H], 2-D rotary angles by (height, width), segments [B, P], a number
    for each image, or frames of a video that share patches, 0 for padding; and windows [B, P], or
    None. layer: where there are windows, {"full": whether this block attends beyond them}.
    q, k and v are one kernel, as on disk.
    """

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x_BPE, context, layer):
        cos, sin, segments_BP, windows_BP = context
        if windows_BP is not None:
            segments_BP = jnp.where(layer["full"], segments_BP, windows_BP)
        B, P, E = x_BPE.shape
        qkv = self.compute.linear("qkv", 3 * E)(x_BPE)
        qkv = qkv.reshape(B, P, 3, self.heads, E // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = checkpoint_name((q, k, v), QKV)
        out = attention(
            q, k, v, segments_BP, segments_BP,
            causal=False, implementation=self.compute.attention,
        )  # fmt: skip
        return self.compute.linear("proj", E)(out.reshape(B, P, E)), None


class Merger(nn.Module):
    """The projector: merge x merge neighbouring patches [B, P, E] to one token [B, F, D].

    Patches of one token are consecutive, so that merging is a reshape.
    """

    vision: Tower
    features: int
    compute: Compute

    @nn.compact
    def __call__(self, x_BPE):
        x_BPE = NORMS[self.vision.norm](EPSILON, self.compute.dtype, name="ln_q")(x_BPE)
        x_BFE = merged(x_BPE, self.vision.merge)
        widths = (x_BFE.shape[-1], self.features)
        return MLP(("0", "2"), widths, "gelu", self.compute, name="mlp")(x_BFE)


def merged(x_BPE: jax.Array, merge: int) -> jax.Array:
    """Return [B, P / merge^2, E merge^2]: the patches of a token side by side."""
    B, P, E = x_BPE.shape
    return x_BPE.reshape(B, P // merge**2, E * merge**2)


class PatchEmbed(nn.Module):
    """Patches [B, P, C] to [B, P, E]."""

    width: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, patches_BPC):
        # The reference's 3-D convolution has stride = kernel: a matrix product over flat patches.
        return Linear(self.width, self.use_bias, self.dtype, name="proj")(patches_BPC)


class PositionTable(nn.Module):
    """A learned table of side x side positions, read between its rows: a `Batch` to [B, P, E]."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        start = nn.initializers.normal(0.02)
        table = parameter(self, "embedding", start, (self.rows, self.width)).astype(jnp.float32)
        taps_BPK: Any = batch.patch_taps
        weights_BPK: Any = batch.patch_tap_weights
        parts = (table[taps_BPK[..., k]] * weights_BPK[..., k, None] for k in range(4))
        return functools.reduce(jnp.add, parts)


class Visual(nn.Module):
    """Tower and projector, named as in the checkpoint: a `Batch` to image features [B, F, D].

    F = P / merge^2. Where features of blocks on the way are added in the decoder, to (those,
    [A, B, F, D]). features: D, the decoder's width. merger: makes a projector of (vision, features,
    compute). added: makes the projectors of the former.
    """

    vision: Tower
    features: int
    compute: Compute
    merger: Callable[..., nn.Module] = Merger
    added: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, batch: Batch) -> Any:
        vision, compute = self.vision, self.compute
        make_block = tower_block(
            vision, TowerAttention, ("norm1", "norm2", "attn"), EPSILON, compute,
            norm=NORMS[vision.norm], mlp=vision.mlp,
        )  # fmt: skip
        head_dim = vision.width // vision.num_heads
        cos, sin = grid_angles(batch.patch_positions, head_dim, vision.theta)
        x_BPE = PatchEmbed(vision.width, vision.patch_bias, compute.dtype, name="patch_embed")(
            batch.patches
        )
        if vision.table:
            table = PositionTable(vision.table**2, vision.width, name="pos_embed")
            x_BPE += table(batch).astype(x_BPE.dtype)
        per_layer = None
        if vision.window:
            per_layer = {"full": jnp.asarray(vision.full_blocks)}
        context = (cos, sin, batch.patch_segments, batch.patch_windows if vision.window else None)
        x_BPE, _ = Stack(make_block, vision.depth, compute.remat, name="blocks")(
            x_BPE, context, per_layer, kept=vision.added
        )
        sizes = (vision, self.features, compute)
        if not vision.added:
            return self.merger(*sizes, name="merger")(x_BPE)
        x_BPE, states_ABPE = x_BPE
        assert self.added is not None
        added_ABFD = self.added(*sizes, name="deepstack_merger_list")(states_ABPE)
        return self.merger(*sizes, name="merger")(x_BPE), added_ABFD
