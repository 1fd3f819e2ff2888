"""The CLIP (https://arxiv.org/abs/2103.00020) and SigLIP (https://arxiv.org/abs/2303.15343) towers.

Letters: B rows, I images, S tower tokens an image (patches, with CLIP's class token first),
P = S x images a row, C values a patch, E tower width.
Images have one size, so a row's P slots are equal runs of S, and attention runs image by image.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.clip_config import Tower
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.block import Compute, tower_block
from vlm_jax.models.layers.linear import Embed, Linear, parameter
from vlm_jax.models.layers.norm import LayerNorm
from vlm_jax.models.layers.remat import QKV
from vlm_jax.models.layers.scan import Stack


class TowerAttention(nn.Module):
    """Full self-attention within one image: [I, S, E] to [I, S, E], all linear layers with bias.

    context and layer: unused.
    """

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x_ISE, context, layer):
        images, slots, E = x_ISE.shape
        q, k, v = (
            self.compute.linear(name, E)(x_ISE).reshape(images, slots, self.heads, E // self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k, v = checkpoint_name((q, k, v), QKV)
        out = attention(q, k, v, None, None, causal=False, implementation=self.compute.attention)
        return self.compute.linear("out_proj", E)(out.reshape(images, slots, E)), None


class Embeddings(nn.Module):
    """Patches [B, P, C] to [B, P, E]: projection, class token in slot 0, learned positions."""

    vision: Tower
    dtype: Any

    @nn.compact
    def __call__(self, patches_BPC, positions_BP):
        vision, dtype = self.vision, self.dtype
        # The reference's convolution has stride = kernel: a matrix product over flat patches.
        linear = Linear(vision.width, vision.kind.patch_bias, dtype, name="patch_embedding")
        x_BPE = linear(patches_BPC)
        if vision.kind.has_class_token:
            init = nn.initializers.normal(vision.width**-0.5)
            token_E = parameter(self, "class_embedding", init, (vision.width,)).astype(dtype)
            x_BPE = jnp.where((positions_BP == 0)[:, :, None], token_E[None, None, :], x_BPE)
        places = Embed(vision.slots, vision.width, dtype, name="position_embedding")
        return x_BPE + places(positions_BP)


class Encoder(nn.Module):
    """The blocks: embedded slots [I, S, E] to hidden states [I, S, E x len(wanted)], side by side.

    wanted: hidden states counted from 0, the first block's input; blocks above the last one
    wanted are not run.
    """

    vision: Tower
    wanted: tuple[int, ...]
    compute: Compute

    @nn.compact
    def __call__(self, x_ISE):
        vision, compute = self.vision, self.compute
        make_block = functools.partial(
            tower_block(
                vision,
                TowerAttention,
                ("layer_norm1", "layer_norm2", "self_attn"),
                vision.epsilon,
                compute,
            ),
            keep=len(self.wanted) > 1,
        )
        out, kept = Stack(make_block, vision.depth, compute.remat, name="layers")(
            x_ISE, (), upto=max(self.wanted)
        )
        if len(self.wanted) == 1:
            return out
        states = [x_ISE if layer == 0 else kept[layer - 1] for layer in self.wanted]
        return jnp.concatenate(states, axis=-1)


class VisionTower(nn.Module):
    """Patches [B, P, C] to the wanted hidden states side by side [B, P, E x len(wanted)].

    wanted: as in `Encoder`. last_norm: normalise what the last block gives.
    """

    vision: Tower
    wanted: tuple[int, ...]
    compute: Compute
    last_norm: bool = False

    @nn.compact
    def __call__(self, patches_BPC, positions_BP) -> jax.Array:
        vision, dtype = self.vision, self.compute.dtype
        x_BPE = Embeddings(vision, dtype, name="embeddings")(patches_BPC, positions_BP)
        if vision.kind.pre_norm:  # in the checkpoints' spelling
            x_BPE = LayerNorm(vision.epsilon, dtype, name="pre_layrnorm")(x_BPE)
        B, P, E = x_BPE.shape
        x_ISE = x_BPE.reshape(-1, vision.slots, E)
        out = Encoder(vision, self.wanted, self.compute, name="encoder")(x_ISE)
        if self.last_norm:
            out = LayerNorm(vision.epsilon, dtype, name="post_layernorm")(out)
        return out.reshape(B, P, out.shape[-1])
