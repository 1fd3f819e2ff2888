"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744): a CLIP or SigLIP tower, a projector, a decoder.

Letters: T tokens, I images, S tower tokens an image, C values a patch.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models.clip import Tower, VisionTower, cut_patches, tower_from_hf
from vlm_jax.models.decoder import AXES as DECODER_AXES
from vlm_jax.models.decoder import Decoder, DecoderConfig, decoder_from_hf
from vlm_jax.models.hf_config import Fields
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.bottleneck import Bottleneck
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.models.vlm import VisionLanguageModel


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
        text = top.take("text_config", kind=dict)
        tower = tower_from_hf(top.take("vision_config", kind=dict))
        given = top.take("vision_feature_layer", -2, object)
        layers = tuple(given) if isinstance(given, list | tuple) else (given,)
        for layer in layers:
            if not isinstance(layer, int) or not -tower.depth - 1 <= layer <= tower.depth:
                raise UserError(
                    f"config.json asks for vision_feature_layer {given!r}, but the tower "
                    f"has {tower.depth} layers: expected one of their numbers, or a list of them."
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
            image_token_id=top.size("image_token_index", top.size("image_token_id", 32000)),
            layers=tuple(layer % (tower.depth + 1) for layer in layers),
            drop_first=strategy == "default",
            projector_activation=top.require("projector_hidden_act", tuple(ACTIVATIONS), "gelu"),
            projector_bias=top.take("multimodal_projector_bias", True),
        )
        top.finish()
        return config


class Projector(nn.Module):
    """Two layers with an activation between, https://arxiv.org/abs/2310.03744.

    Hidden states of the tower [B, P, E x len(layers)] to features [B, P, D].
    """

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
    """`model` in the checkpoint: tower, projector and decoder, named as there.

    features: a `Batch` of patches [B, P, C] to [B, P, D], one feature a slot.
    """

    cfg: Config
    dtype: Any
    lora: LoRAScale | None
    remat: str
    adapter: Bottleneck | None

    def setup(self) -> None:
        cfg, form = self.cfg, self.adapter
        self.vision_tower = VisionTower(
            cfg.vision, self.dtype, self.lora, self.remat, cfg.layers, form
        )
        self.multi_modal_projector = Projector(cfg, self.dtype, self.lora)
        self.language_model = Decoder(cfg.text, self.dtype, self.lora, self.remat, form)

    def features(self, batch) -> jax.Array:
        states = self.vision_tower(batch.patches, batch.patch_positions)
        return self.multi_modal_projector(states)


class Module(VisionLanguageModel):
    """LLaVA-1.5, https://arxiv.org/abs/2310.03744: a `Batch` to float32 logits [B, T, V]."""

    def make_body(self) -> nn.Module:
        return Body(self.cfg, self.dtype, self.lora, self.remat, self.adapter)


def image_tokens(cfg: Config, grid_thw: tuple[int, int, int] | None = None) -> int:
    """Return how many placeholders an image stands for."""
    return cfg.vision.slots - int(cfg.drop_first)


def layout(
    cfg: Config, tokens: np.ndarray, pixel_values: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return one example's arrays of `Batch` beside its tokens.

    tokens int [T] without padding; pixel_values [I, channels, height, width]. Raises `UserError`
    where placeholders and images disagree.
    """
    vision = cfg.vision
    size = (vision.channels, vision.image_size, vision.image_size)
    if pixel_values is None:
        pixel_values = np.zeros((0, *size), np.float32)
    if pixel_values.shape[1:] != size:
        raise UserError(
            f"pixel_values must be [images, {', '.join(map(str, size))}]; it is "
            f"{list(pixel_values.shape)}. Take it from the checkpoint's own processor."
        )
    patches = cut_patches(vision, pixel_values)
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


def pixels(cfg: Config, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return [1, height, width, channels] of one image's patches [P, C], as `layout` cut them.

    positions int [P]: `patch_positions`. What the tower's last whole patch leaves out is not there.
    """
    vision = cfg.vision
    grid, size = vision.grid, vision.patch_size
    cut = patches[np.argsort(positions)][vision.slots - grid**2 :]  # a class token has no pixels
    image = cut.reshape(grid, grid, vision.channels, size, size).transpose(0, 3, 1, 4, 2)
    return image.reshape(1, grid * size, grid * size, vision.channels)


def cell(cfg: Config) -> int:
    """Return the side in pixels of what one image feature sees."""
    return cfg.vision.patch_size


def values_per_image(cfg: Config, grid_thw: Any = None) -> int:
    """Return how many rows of the processor's pixel_values one image takes."""
    return 1


def merged_patches(cfg: Config) -> int:
    """Return how many patches of a row make one image feature."""
    return 1


def patch_unit(cfg: Config) -> int:
    """Return what the number of patches of a row must be a multiple of."""
    return cfg.vision.slots


def patch_axes(cfg: Config) -> tuple[int, int, int]:
    """Return what the values of a patch are, outermost first: channels, frames, pixels of one."""
    return cfg.vision.channels, 1, cfg.vision.patch_size**2


def holds_pixels(cfg: Config, positions: Any) -> Any:
    """Return which patch slots of an image hold pixels, by their `patch_positions`: a class
    token's does not."""
    return positions >= int(cfg.vision.kind.has_class_token)


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


def unused_parameters(cfg: Config) -> int:
    """Return how many parameters the reference has in the tensors of `UNUSED`."""
    width, wide = cfg.vision.width, cfg.vision.intermediate_size
    norm = 2 * width
    if cfg.vision.kind.has_class_token:
        return norm
    attention = 4 * width * width + 4 * width  # SigLIP's pooling: q, k, v in one, and the output
    mlp = 2 * width * wide + wide + width
    return norm + width + attention + norm + mlp  # the last norm, the query, and the head's


GROUNDING = None  # no one format of objects and boxes
HAS_GRIDS = False  # every image has the tower's own size
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
