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

from vlm_jax.models.clip_config import Tower
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.bottleneck import ATTENTION, OUTPUT, Bottleneck, Residual
from vlm_jax.models.layers.linear import Linear, LoRAScale, parameter
from vlm_jax.models.layers.norm import LayerNorm
from vlm_jax.models.layers.scan import Stack


class TowerAttention(nn.Module):
    """Full self-attention within one image: [I, S, E] to [I, S, E], all linear layers with bias."""

    vision: Tower
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x_ISE):
        images, slots, E = x_ISE.shape
        heads = self.vision.num_heads

        def linear(name: str, x: jax.Array) -> jax.Array:
            return Linear(E, True, self.dtype, self.lora, name=name)(x)

        def project(name: str) -> jax.Array:
            return linear(name, x_ISE).reshape(images, slots, heads, E // heads)

        out = attention(
            project("q_proj"), project("k_proj"), project("v_proj"), None, None, causal=False
        )
        return linear("out_proj", out.reshape(images, slots, E))


class TowerMLP(nn.Module):
    """Two layers with an activation between: [I, S, E] to [I, S, E]."""

    vision: Tower
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x_ISE):
        sizes = {"fc1": self.vision.intermediate_size, "fc2": self.vision.width}

        def linear(name: str, x: jax.Array) -> jax.Array:
            return Linear(sizes[name], True, self.dtype, self.lora, name=name)(x)

        return linear("fc2", ACTIVATIONS[self.vision.activation](linear("fc1", x_ISE)))


class TowerBlock(nn.Module):
    """Pre-norm ViT block, https://arxiv.org/abs/2010.11929: x_ISE [I, S, E] to (x_ISE, kept).

    kept: the output again where `keep_all` (features of several layers), else None. context and
    layer: unused.
    """

    vision: Tower
    dtype: Any
    lora: LoRAScale | None
    keep_all: bool
    adapter: Bottleneck | None = None

    @nn.compact
    def __call__(self, x_ISE, context, layer):
        epsilon, dtype = self.vision.epsilon, self.dtype
        normed = LayerNorm(epsilon, dtype, name="layer_norm1")(x_ISE)
        attended = TowerAttention(self.vision, dtype, self.lora, name="self_attn")(normed)
        x_ISE = Residual(self.adapter, dtype, name=ATTENTION)(x_ISE, attended)
        normed = LayerNorm(epsilon, dtype, name="layer_norm2")(x_ISE)
        out = TowerMLP(self.vision, dtype, self.lora, name="mlp")(normed)
        x_ISE = Residual(self.adapter, dtype, name=OUTPUT)(x_ISE, out)
        return x_ISE, (x_ISE if self.keep_all else None)


class Table(nn.Module):
    """A learned table [positions, E], named as an embedding on disk."""

    rows: int
    width: int

    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(0.02)
        return parameter(self, "embedding", init, (self.rows, self.width))


class Embeddings(nn.Module):
    """Patches [B, P, C] to [B, P, E]: projection, class token in slot 0, learned positions."""

    vision: Tower
    dtype: Any

    @nn.compact
    def __call__(self, patches_BPC, positions_BP):
        vision, dtype = self.vision, self.dtype
        # The reference's convolution has stride = kernel: a matrix product over flat patches.
        projection = Linear(vision.width, vision.kind.patch_bias, dtype, name="patch_embedding")
        x_BPE = projection(patches_BPC)
        if vision.kind.has_class_token:
            init = nn.initializers.normal(vision.width**-0.5)
            token_E = parameter(self, "class_embedding", init, (vision.width,)).astype(dtype)
            x_BPE = jnp.where((positions_BP == 0)[:, :, None], token_E[None, None, :], x_BPE)
        table = Table(vision.slots, vision.width, name="position_embedding")()
        return x_BPE + table.astype(dtype)[positions_BP]


class Encoder(nn.Module):
    """The blocks: embedded slots [I, S, E] to hidden states [I, S, E x len(wanted)].

    wanted: hidden states counted from 0, the first block's input; blocks above the last one
    wanted are not run.
    """

    vision: Tower
    dtype: Any
    lora: LoRAScale | None
    remat: str
    wanted: tuple[int, ...]
    adapter: Bottleneck | None = None

    def setup(self) -> None:
        keep_all = len(self.wanted) > 1
        make = functools.partial(
            TowerBlock, self.vision, self.dtype, self.lora, keep_all, self.adapter
        )
        self.layers = Stack(make, self.vision.depth, self.remat)

    def __call__(self, x_ISE):
        """Return the wanted hidden states side by side; later layers are never run."""
        out, kept = self.layers(x_ISE, (), None, upto=max(self.wanted))
        if len(self.wanted) == 1:
            return out
        states = [x_ISE if layer == 0 else kept[layer - 1] for layer in self.wanted]
        return jnp.concatenate(states, axis=-1)


class VisionTower(nn.Module):
    """Patches [B, P, C] to the wanted hidden states side by side [B, P, E x len(wanted)].

    wanted: hidden states counted from 0, the first layer's input.
    """

    vision: Tower
    dtype: Any
    lora: LoRAScale | None
    remat: str
    wanted: tuple[int, ...]
    adapter: Bottleneck | None = None

    def setup(self) -> None:
        vision = self.vision
        self.embeddings = Embeddings(vision, self.dtype)
        if vision.kind.pre_norm:
            self.pre_layrnorm = LayerNorm(vision.epsilon, self.dtype)  # the checkpoints' spelling
        self.encoder = Encoder(vision, self.dtype, self.lora, self.remat, self.wanted, self.adapter)

    def __call__(self, patches_BPC, positions_BP) -> jax.Array:
        x_BPE = self.embeddings(patches_BPC, positions_BP)
        if self.vision.kind.pre_norm:
            x_BPE = self.pre_layrnorm(x_BPE)
        B, P, E = x_BPE.shape
        out = self.encoder(x_BPE.reshape(-1, self.vision.slots, E))
        return out.reshape(B, P, out.shape[-1])
