"""The CLIP (https://arxiv.org/abs/2103.00020) and SigLIP (https://arxiv.org/abs/2303.15343) towers.

Letters: B rows, I images, S tower tokens an image (patches, with CLIP's class token first),
P = S x images a row, C values a patch, E tower width.
Images have one size, so a row's P slots are equal runs of S, and attention runs image by image.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.files.limits import number
from vlm_jax.models.hf_config import Fields
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.bottleneck import ATTENTION, OUTPUT, Bottleneck, Residual
from vlm_jax.models.layers.linear import Linear, LoRAScale, parameter
from vlm_jax.models.layers.norm import LayerNorm
from vlm_jax.models.layers.scan import Stack


@dataclasses.dataclass(frozen=True)
class TowerKind:
    """How one tower differs from the other: its extras, and what a config.json may leave out."""

    has_class_token: bool
    patch_bias: bool
    pre_norm: bool
    defaults: dict[str, Any] = dataclasses.field(hash=False)


TOWERS = {
    "clip_vision_model": TowerKind(True, False, True, dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )),
    "siglip_vision_model": TowerKind(False, True, False, dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
    )),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tower:
    """Sizes of the vision tower. slots: S, the tower's tokens an image."""

    kind: TowerKind
    width: int
    intermediate_size: int
    depth: int
    num_heads: int
    image_size: int
    patch_size: int
    channels: int
    activation: str
    epsilon: float

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def slots(self) -> int:
        return self.grid**2 + int(self.kind.has_class_token)


def tower_from_hf(raw: dict[str, Any]) -> Tower:
    where = "config.json, vision_config"
    fields = Fields(raw, where, "vocab_size vision_use_head")
    model_type = fields.peek("model_type", "clip_vision_model")
    if not isinstance(model_type, str) or model_type not in TOWERS:
        raise UserError(
            f"The {where} has a tower of type '{model_type}', which is not supported; supported: "
            f"{', '.join(TOWERS)}."
        )
    kind = TOWERS[model_type]

    def size(name: str) -> Any:
        return fields.size(name, kind.defaults[name])

    fields.require("attention_dropout", (0.0, 0), 0.0)
    tower = Tower(
        kind=kind,
        width=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        depth=size("num_hidden_layers"),
        num_heads=size("num_attention_heads"),
        image_size=size("image_size"),
        patch_size=size("patch_size"),
        channels=fields.size("num_channels", 3),
        activation=fields.require("hidden_act", tuple(ACTIVATIONS), kind.defaults["hidden_act"]),
        epsilon=fields.positive("layer_norm_eps", kind.defaults["layer_norm_eps"]),
    )
    number("patch_values", tower.channels * tower.patch_size**2, f"{where} (channels x size^2)")
    if tower.image_size < tower.patch_size or tower.width % tower.num_heads:
        raise UserError(
            f"The {where} has images of {tower.image_size} pixels in patches of "
            f"{tower.patch_size}, and a width of {tower.width} for {tower.num_heads} heads: a "
            f"patch must fit the image, and the heads must divide the width."
        )
    fields.finish()
    return tower


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


def cut_patches(vision: Tower, pixel_values: np.ndarray) -> np.ndarray:
    """Return [I, S, C] of pixels [I, channels, height, width]; a class token's slot is zeros."""
    size, patch, grid = vision.image_size, vision.patch_size, vision.grid
    images = np.asarray(pixel_values)
    if images.ndim != 4 or images.shape[1:] != (vision.channels, size, size):
        raise UserError(
            f"pixel_values has the shape {list(images.shape)}; this tower takes "
            f"[images, {vision.channels}, {size}, {size}]. Check the image processor's size."
        )
    images = images[:, :, : grid * patch, : grid * patch]  # a convolution drops the remainder
    images = images.reshape(len(images), vision.channels, grid, patch, grid, patch)
    flat = images.transpose(0, 2, 4, 1, 3, 5).reshape(
        len(images), grid * grid, vision.channels * patch * patch
    )
    return np.pad(flat, ((0, 0), (int(vision.kind.has_class_token), 0), (0, 0)))
