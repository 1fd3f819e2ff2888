"""Qwen2-VL's Linen module: a ViT with 2-D rotary positions, a merger of its patches, a decoder.

https://arxiv.org/abs/2409.12191, section 2.1. Letters: B rows, P patches, C values a patch,
D model, E tower width, F merged features.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from vlm_jax.models.decoder import Decoder
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.bottleneck import ATTENTION, OUTPUT, Bottleneck, Residual
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.models.layers.norm import LayerNorm
from vlm_jax.models.layers.rope import apply_rope, grid_angles
from vlm_jax.models.layers.scan import Stack
from vlm_jax.models.qwen2_vl import Qwen2VL, Tower
from vlm_jax.models.vlm import VisionLanguageModel


class TowerAttention(nn.Module):
    """Full self-attention among patches of one segment: [B, P, E] to [B, P, E].

    cos, sin [B, P, H]: 2-D rotary angles by (height, width). segments_BP: a number for
    each image, or frames of a video that share patches; 0 for padding. q, k and v are one kernel,
    as on disk.
    """

    vision: Tower
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x_BPE, cos, sin, segments_BP):
        vision = self.vision
        B, P, E = x_BPE.shape
        qkv = Linear(3 * E, True, self.dtype, self.lora, name="qkv")(x_BPE)
        qkv = qkv.reshape(B, P, 3, vision.num_heads, E // vision.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out = attention(q, k, v, segments_BP, segments_BP, causal=False)
        return Linear(E, True, self.dtype, self.lora, name="proj")(out.reshape(B, P, E))


class TowerMLP(nn.Module):
    """Two layers with an activation between: [B, P, E] to [B, P, E]."""

    vision: Tower
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x_BPE):
        hidden = Linear(self.vision.intermediate_size, True, self.dtype, self.lora, name="fc1")(
            x_BPE
        )
        hidden = ACTIVATIONS[self.vision.activation](hidden)
        return Linear(x_BPE.shape[-1], True, self.dtype, self.lora, name="fc2")(hidden)


class TowerBlock(nn.Module):
    """Pre-norm ViT block, https://arxiv.org/abs/2010.11929: x_BPE [B, P, E] to (x_BPE, None).

    context: cos, sin and segments, as in `TowerAttention`. layer: unused.
    """

    vision: Tower
    dtype: Any
    lora: LoRAScale | None
    adapter: Bottleneck | None = None

    @nn.compact
    def __call__(self, x_BPE, context, layer):
        cos, sin, segments_BP = context
        normed = LayerNorm(1e-6, self.dtype, name="norm1")(x_BPE)
        attn = TowerAttention(self.vision, self.dtype, self.lora, name="attn")
        attended = attn(normed, cos, sin, segments_BP)
        x_BPE = Residual(self.adapter, self.dtype, name=ATTENTION)(x_BPE, attended)
        normed = LayerNorm(1e-6, self.dtype, name="norm2")(x_BPE)
        mlp = TowerMLP(self.vision, self.dtype, self.lora, name="mlp")
        return Residual(self.adapter, self.dtype, name=OUTPUT)(x_BPE, mlp(normed)), None


class MergerMLP(nn.Module):
    """Two layers with a GELU between: [B, F, E x merge^2] to [B, F, D]."""

    features: int
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x):
        x = Linear(x.shape[-1], True, self.dtype, self.lora, name="0")(x)
        return Linear(self.features, True, self.dtype, self.lora, name="2")(ACTIVATIONS["gelu"](x))


class Merger(nn.Module):
    """The projector: merge x merge neighbouring patches [B, P, E] to one token [B, F, D].

    Patches of one token are consecutive, so that merging is a reshape.
    """

    merge: int
    features: int
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x_BPE):
        x_BPE = LayerNorm(1e-6, self.dtype, name="ln_q")(x_BPE)
        B, P, E = x_BPE.shape
        x_BFE = x_BPE.reshape(B, P // self.merge**2, E * self.merge**2)
        return MergerMLP(self.features, self.dtype, self.lora, name="mlp")(x_BFE)


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
    dtype: Any
    lora: LoRAScale | None
    remat: str
    adapter: Bottleneck | None = None

    def setup(self) -> None:
        vision = self.vision
        make_block = functools.partial(TowerBlock, vision, self.dtype, self.lora, self.adapter)
        self.patch_embed = PatchEmbed(vision.width, self.dtype)
        self.blocks = Stack(make_block, vision.depth, self.remat)
        self.merger = Merger(vision.merge, self.features, self.dtype, self.lora)

    def __call__(self, batch) -> jax.Array:
        """Return image features [B, P / merge^2, D]."""
        head_dim = self.vision.width // self.vision.num_heads
        cos, sin = grid_angles(batch.patch_positions, head_dim, self.vision.theta)
        x_BPE = self.patch_embed(batch.patches)
        x_BPE, _ = self.blocks(x_BPE, (cos, sin, batch.patch_segments))
        return self.merger(x_BPE)


class Body(nn.Module):
    """`model` in the checkpoint: the tower and the decoder, named as there."""

    cfg: Qwen2VL
    dtype: Any
    lora: LoRAScale | None
    remat: str
    adapter: Bottleneck | None

    def setup(self) -> None:
        how = (self.dtype, self.lora, self.remat, self.adapter)
        self.visual = Visual(self.cfg.vision, self.cfg.text.hidden_size, *how)
        self.language_model = Decoder(self.cfg.text, *how)

    def features(self, batch) -> jax.Array:
        return self.visual(batch)


class Module(VisionLanguageModel):
    """`apply({"params": params}, batch)` gives float32 logits [B, T, V]."""

    cfg: Qwen2VL

    def make_body(self) -> nn.Module:
        return Body(self.cfg, self.dtype, self.lora, self.remat, self.adapter)
