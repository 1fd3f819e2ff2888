"""Qwen2-VL's Linen module: a ViT with 2-D rotary positions, a merger of its patches, a decoder.

https://arxiv.org/abs/2409.12191, section 2.1. Letters: B rows, P patches, C values a patch,
D model, E tower width, F merged features.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.decoder import Decoder
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.block import MLP, Compute, tower_block
from vlm_jax.models.layers.linear import Linear
from vlm_jax.models.layers.norm import LayerNorm
from vlm_jax.models.layers.remat import QKV
from vlm_jax.models.layers.rope import apply_rope, grid_angles
from vlm_jax.models.layers.scan import Stack
from vlm_jax.models.qwen2_vl import Qwen2VL, Tower
from vlm_jax.models.vlm import VisionLanguageModel

EPSILON = 1e-6  # of the tower's norms


class TowerAttention(nn.Module):
    """Full self-attention among patches of one segment: [B, P, E] to [B, P, E].

    context: cos and sin [B, P, H], 2-D rotary angles by (height, width), and segments [B, P]: a
    number for each image, or frames of a video that share patches; 0 for padding. layer: unused.
    q, k and v are one kernel, as on disk.
    """

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x_BPE, context, layer):
        cos, sin, segments_BP = context
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

    merge: int
    features: int
    compute: Compute

    @nn.compact
    def __call__(self, x_BPE):
        x_BPE = LayerNorm(EPSILON, self.compute.dtype, name="ln_q")(x_BPE)
        B, P, E = x_BPE.shape
        merged = E * self.merge**2
        x_BFE = x_BPE.reshape(B, P // self.merge**2, merged)
        widths = (merged, self.features)
        return MLP(("0", "2"), widths, "gelu", self.compute, name="mlp")(x_BFE)


class PatchEmbed(nn.Module):
    """Patches [B, P, C] to [B, P, E], without bias."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, patches_BPC):
        # The reference's 3-D convolution has stride = kernel: a matrix product over flat patches.
        return Linear(self.width, False, self.dtype, name="proj")(patches_BPC)


class Visual(nn.Module):
    """Tower and projector, named as in the checkpoint: a `Batch` to image features [B, F, D].

    F = P / merge^2. features: D, the decoder's width.
    """

    vision: Tower
    features: int
    compute: Compute

    @nn.compact
    def __call__(self, batch) -> jax.Array:
        vision, compute = self.vision, self.compute
        make_block = tower_block(
            vision, TowerAttention, ("norm1", "norm2", "attn"), EPSILON, compute
        )
        head_dim = vision.width // vision.num_heads
        cos, sin = grid_angles(batch.patch_positions, head_dim, vision.theta)
        x_BPE = PatchEmbed(vision.width, compute.dtype, name="patch_embed")(batch.patches)
        x_BPE, _ = Stack(make_block, vision.depth, compute.remat, name="blocks")(
            x_BPE, (cos, sin, batch.patch_segments)
        )
        return Merger(vision.merge, self.features, compute, name="merger")(x_BPE)


class Body(nn.Module):
    """`model` in the checkpoint: the tower and the decoder, named as there."""

    cfg: Qwen2VL
    compute: Compute

    def setup(self) -> None:
        text = self.cfg.text
        self.visual = Visual(self.cfg.vision, text.hidden_size, self.compute)
        self.language_model = Decoder(text, self.compute)

    def features(self, batch) -> jax.Array:
        return self.visual(batch)


class Module(VisionLanguageModel):
    """`apply({"params": params}, batch)` gives float32 logits [B, T, V]."""

    BODY = Body
