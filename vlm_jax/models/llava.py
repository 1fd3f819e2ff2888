"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744): a CLIP or SigLIP tower, a projector, a decoder.

Letters: B rows, T tokens, I images a row, S tower tokens an image (patches, with CLIP's class token
first), P = I x S, C values a patch, E tower width, D model.
Images have one size, so a row's P slots are I equal runs of S, and attention runs image by image.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.layers.activations import ACTIVATIONS
from vlm_jax.layers.attention import attention
from vlm_jax.layers.linear import Linear, LoRAScale, parameter
from vlm_jax.layers.norm import LayerNorm
from vlm_jax.layers.scan import Stack
from vlm_jax.models.decoder import AXES as DECODER_AXES
from vlm_jax.models.decoder import Decoder, DecoderConfig, decoder_from_hf
from vlm_jax.models.hf_config import Fields
from vlm_jax.models.vlm import VisionLanguageModel


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


@dataclasses.dataclass(frozen=True)
class Config:
    """What the computation depends on. layers: the tower's hidden states that are concatenated,
    counted from 0, the tower's input. drop_first: strategy "default"."""

    text: DecoderConfig
    vision: Tower
    image_token_id: int
    layers: tuple[int, ...]
    drop_first: bool
    projector_activation: str
    projector_bias: bool
    video_token_id: None = None

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "Config":
        # image_seq_length follows from the tower; where it disagrees only the processor reads it.
        top = Fields(raw, "config.json", "image_seq_length vision_config text_config vocab_size")
        text = dict(top.take("text_config"))
        tower = _tower_from_hf(dict(top.take("vision_config")))
        layers = top.take("vision_feature_layer", -2)
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        for layer in layers:
            if not -tower.depth - 1 <= layer <= tower.depth:
                raise UserError(
                    f"config.json asks for vision_feature_layer {layer}, but the tower has "
                    f"{tower.depth} layers."
                )
        strategy = top.require("vision_feature_select_strategy", ("default", "full"), "default")
        config = cls(
            text=decoder_from_hf(
                text,
                text.get("model_type", "llama"),
                top.take("tie_word_embeddings", False),
                "config.json, text_config",
            ),
            vision=tower,
            image_token_id=top.take("image_token_index", top.take("image_token_id", 32000)),
            layers=tuple(layer % (tower.depth + 1) for layer in layers),
            drop_first=strategy == "default",
            projector_activation=top.require("projector_hidden_act", tuple(ACTIVATIONS), "gelu"),
            projector_bias=top.take("multimodal_projector_bias", True),
        )
        top.finish()
        return config


def _tower_from_hf(raw: dict[str, Any]) -> Tower:
    where = "config.json, vision_config"
    model_type = raw.get("model_type", "clip_vision_model")
    if model_type not in TOWERS:
        raise UserError(
            f"The {where} has a tower of type '{model_type}', which is not supported; supported: "
            f"{', '.join(TOWERS)}."
        )
    kind = TOWERS[model_type]
    fields = Fields(raw, where, "vocab_size vision_use_head")

    def size(name: str) -> Any:
        return fields.take(name, kind.defaults[name])

    fields.require("attention_dropout", (0.0, 0), 0.0)
    tower = Tower(
        kind=kind,
        width=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        depth=size("num_hidden_layers"),
        num_heads=size("num_attention_heads"),
        image_size=size("image_size"),
        patch_size=size("patch_size"),
        channels=fields.take("num_channels", 3),
        activation=fields.require("hidden_act", tuple(ACTIVATIONS), kind.defaults["hidden_act"]),
        epsilon=size("layer_norm_eps"),
    )
    if not isinstance(tower.image_size, int) or not isinstance(tower.patch_size, int):
        raise UserError(f"The {where} has an image or patch size that is not one integer.")
    fields.finish()
    return tower


class TowerAttention(nn.Module):
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
    """Returns the layer's output twice where `keep_all`: several layers' features are wanted."""

    vision: Tower
    dtype: Any
    lora: LoRAScale | None
    keep_all: bool

    @nn.compact
    def __call__(self, x_ISE, context, layer):
        epsilon = self.vision.epsilon
        normed = LayerNorm(epsilon, self.dtype, name="layer_norm1")(x_ISE)
        x_ISE = x_ISE + TowerAttention(self.vision, self.dtype, self.lora, name="self_attn")(normed)
        normed = LayerNorm(epsilon, self.dtype, name="layer_norm2")(x_ISE)
        x_ISE = x_ISE + TowerMLP(self.vision, self.dtype, self.lora, name="mlp")(normed)
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
    vision: Tower
    dtype: Any
    lora: LoRAScale | None
    remat: str
    wanted: tuple[int, ...]

    def setup(self) -> None:
        keep_all = len(self.wanted) > 1
        make = functools.partial(TowerBlock, self.vision, self.dtype, self.lora, keep_all)
        self.layers = Stack(make, self.vision.depth, self.remat)

    def __call__(self, x_ISE):
        """Return the wanted hidden states side by side; later layers are never run."""
        out, kept = self.layers(x_ISE, (), None, upto=max(self.wanted))
        if len(self.wanted) == 1:
            return out
        states = [x_ISE if layer == 0 else kept[layer - 1] for layer in self.wanted]
        return jnp.concatenate(states, axis=-1)


class VisionTower(nn.Module):
    cfg: Config
    dtype: Any
    lora: LoRAScale | None
    remat: str

    def setup(self) -> None:
        vision = self.cfg.vision
        self.embeddings = Embeddings(vision, self.dtype)
        if vision.kind.pre_norm:
            self.pre_layrnorm = LayerNorm(vision.epsilon, self.dtype)  # the checkpoints' spelling
        self.encoder = Encoder(vision, self.dtype, self.lora, self.remat, self.cfg.layers)

    def __call__(self, batch) -> jax.Array:
        slots = self.cfg.vision.slots
        x_BPE = self.embeddings(batch.patches, batch.patch_positions)
        if self.cfg.vision.kind.pre_norm:
            x_BPE = self.pre_layrnorm(x_BPE)
        B, P, E = x_BPE.shape
        out = self.encoder(x_BPE.reshape(B * P // slots, slots, E))
        return out.reshape(B, P, out.shape[-1])


class Projector(nn.Module):
    cfg: Config
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg

        def linear(name: str, x: jax.Array) -> jax.Array:
            width = cfg.text.hidden_size
            return Linear(width, cfg.projector_bias, self.dtype, self.lora, name=name)(x)

        return linear("linear_2", ACTIVATIONS[cfg.projector_activation](linear("linear_1", x)))


class Body(nn.Module):
    """`model` in the checkpoint: tower, projector and decoder, named as there."""

    cfg: Config
    dtype: Any
    lora: LoRAScale | None
    remat: str

    def setup(self) -> None:
        self.vision_tower = VisionTower(self.cfg, self.dtype, self.lora, self.remat)
        self.multi_modal_projector = Projector(self.cfg, self.dtype, self.lora)
        self.language_model = Decoder(self.cfg.text, self.dtype, self.lora, self.remat)

    def features(self, batch) -> jax.Array:
        return self.multi_modal_projector(self.vision_tower(batch))


class Module(VisionLanguageModel):
    """`apply({"params": params}, batch)` gives float32 logits [B, T, V]."""

    def make_body(self) -> nn.Module:
        return Body(self.cfg, self.dtype, self.lora, self.remat)


def image_tokens(cfg: Config, grid_thw: tuple[int, int, int] | None = None) -> int:
    """Return how many placeholders an image stands for."""
    return cfg.vision.slots - int(cfg.drop_first)


def _patches(cfg: Config, pixel_values: np.ndarray) -> np.ndarray:
    """Return [I, S, C] of pixels [I, channels, height, width]; a class token's slot is zeros."""
    vision = cfg.vision
    size, patch, grid = vision.image_size, vision.patch_size, vision.grid
    images = np.asarray(pixel_values, np.float32)
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


def layout(
    cfg: Config, tokens: np.ndarray, pixel_values: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return one example's arrays of `Batch` beside its tokens.

    tokens int [T] without padding; pixel_values [I, channels, height, width]. Raises `UserError`
    where placeholders and images disagree.
    """
    vision = cfg.vision
    if pixel_values is None:
        size = vision.image_size
        pixel_values = np.zeros((0, vision.channels, size, size), np.float32)
    patches = _patches(cfg, pixel_values)
    images, slots, values = patches.shape
    places = np.flatnonzero(tokens == cfg.image_token_id)
    each = image_tokens(cfg)
    if len(places) != images * each:
        raise UserError(
            f"An example holds {len(places)} image tokens, but its {images} images stand for "
            f"{images * each} ({each} each). Tokens and images must agree exactly: check that "
            f"nothing was truncated and that every placeholder was expanded."
        )
    used = np.arange(int(cfg.drop_first), slots)
    image_index = np.full(len(tokens), -1, np.int32)
    image_index[places] = (np.arange(images)[:, None] * slots + used[None, :]).reshape(-1)
    return {
        "positions": np.arange(len(tokens), dtype=np.int32),
        "image_index": image_index,
        "patches": patches.reshape(images * slots, values),
        "patch_segments": np.repeat(np.arange(1, images + 1, dtype=np.int32), slots),
        "patch_positions": np.tile(np.arange(slots, dtype=np.int32), images),
    }


def values_per_image(cfg: Config, grid_thw: Any = None) -> int:
    """Return how many rows of the processor's pixel_values one image takes."""
    return 1


def merged_patches(cfg: Config) -> int:
    """Return how many patches of a row make one image feature."""
    return 1


def patch_unit(cfg: Config) -> int:
    """Return what the number of patches of a row must be a multiple of."""
    return cfg.vision.slots


def stacks(cfg: Config) -> dict[str, int]:
    """Return the layers that are stacked in the tree: {prefix: number of layers}."""
    return {
        "model/vision_tower/encoder/layers": cfg.vision.depth,
        "model/language_model/layers": cfg.text.num_layers,
    }


def disk_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Return the convolutions: {path of the kernel: its shape on disk, outputs first}."""
    vision = cfg.vision
    shape = (vision.width, vision.channels, vision.patch_size, vision.patch_size)
    return {"model/vision_tower/embeddings/patch_embedding/kernel": shape}


ARCHITECTURE = "LlavaForConditionalGeneration"
# Parameter path -> component; first match wins.
COMPONENTS = [
    (r"model/multi_modal_projector/.*", "projector"),
    (r"model/vision_tower/.*", "vision"),
    (r"model/language_model/embed_tokens/.*", "embeddings"),
    (r"model/language_model/.*", "language_model"),
    (r"lm_head/.*", "head"),
]
# Logical axes of the parameters; first match wins.
AXES = [
    (r"model/vision_tower/.*/(q_proj|k_proj|v_proj|fc1|patch_embedding)/kernel", ("embed", "wide")),
    (r"model/vision_tower/.*/(out_proj|fc2)/kernel", ("wide", "embed")),
    (r"model/vision_tower/.*/position_embedding/embedding", (None, "embed")),
    (r"model/vision_tower/.*(scale|bias|class_embedding)", (None,)),
    (r"model/multi_modal_projector/linear_1/kernel", ("embed", "wide")),
    (r"model/multi_modal_projector/linear_2/kernel", ("wide", "embed")),
    (r"model/multi_modal_projector/.*bias", (None,)),
    *DECODER_AXES,
]
# Any layout of tensor names in use -> the current one; every row is applied, in order.
RENAMES = [
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.lm_head$", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
]
# Tensors that the computation never reads; kept on export. The features are taken before the
# tower's last norm, and SigLIP's pooling head has no use here.
UNUSED = [
    r".*rotary_emb\.inv_freq",
    r"model\.vision_tower\.embeddings\.position_ids",
    r"model\.vision_tower\.post_layernorm\..*",
    r"model\.vision_tower\.head\..*",
]
# The modules of the projector and of the vision side, by the names PEFT uses.
PROJECTOR = "multi_modal_projector"
VISION = "vision_tower"
