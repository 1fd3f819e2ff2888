"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744): a CLIP or SigLIP tower, a projector, a decoder.

Letters: T tokens, I images, S tower tokens an image, C values a patch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models.clip_config import Tower, cut_patches, tower_from_hf
from vlm_jax.models.decoder_config import decoder_from_hf
from vlm_jax.models.family import Family, Grid, components
from vlm_jax.models.hf_config import ACTIVATION_NAMES, Fields


def _published(**text: int) -> dict[str, Any]:
    """Return the config.json of LLaVA-1.5; text: what differs from a 7B LLaMA."""
    return {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
        "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
        "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": 32064,
        "text_config": {
            "_name_or_path": "lmsys/vicuna", "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
            "torch_dtype": "float16", "vocab_size": 32064, **text,
        },
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
            "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
            "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
        },
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Llava(Family):
    """What the computation depends on. layers: the tower's hidden states that are concatenated,
    counted from 0, the tower's input. drop_first: strategy "default"."""

    vision: Tower
    layers: tuple[int, ...]
    drop_first: bool
    projector_activation: str
    projector_bias: bool

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "Llava":
        # image_seq_length follows from the tower; where it disagrees only the processor reads it.
        top = Fields(raw, "config.json", "image_seq_length vision_config text_config vocab_size")
        text = top.take("text_config", kind=dict)
        tower = tower_from_hf(top.take("vision_config", kind=dict))
        given = top.take("vision_feature_layer", -2, object)
        layers = tuple(given) if isinstance(given, list | tuple) else (given,)
        states = range(-tower.depth - 1, tower.depth + 1)
        if not all(isinstance(layer, int) and layer in states for layer in layers):
            raise UserError(
                f"config.json asks for vision_feature_layer {given!r}, but the tower "
                f"has {tower.depth} layers: expected one of their numbers, or a list of them."
            )
        strategy = top.require("vision_feature_select_strategy", ("default", "full"), "default")
        return top.finish(
            cls(
                text=decoder_from_hf(
                    text,
                    text.get("model_type", "llama"),
                    top.take("tie_word_embeddings", False),
                    "config.json, text_config",
                ),
                vision=tower,
                image_token_id=top.size("image_token_index", top.size("image_token_id", 32000)),
                video_token_id=None,
                layers=tuple(layer % (tower.depth + 1) for layer in layers),
                drop_first=strategy == "default",
                projector_activation=top.require("projector_hidden_act", ACTIVATION_NAMES, "gelu"),
                projector_bias=top.take("multimodal_projector_bias", True),
            )
        )

    MODULE = "vlm_jax.models.llava_module:Module"
    PROJECTOR = "multi_modal_projector"
    VISION = "vision_tower"
    COMPONENTS = components("vision_tower", "multi_modal_projector")
    AXES = [
        (r"model/vision_tower/.*/([qkv]_proj|fc1|patch_embedding)/kernel", ("embed", "wide")),
        (r"model/vision_tower/.*/(out_proj|fc2)/kernel", ("wide", "embed")),
        (r"model/vision_tower/.*/position_embedding/embedding", (None, "embed")),
        (r"model/vision_tower/.*(scale|bias|class_embedding)", (None,)),
        (r"model/multi_modal_projector/linear_1/kernel", ("embed", "wide")),
        (r"model/multi_modal_projector/linear_2/kernel", ("wide", "embed")),
        (r"model/multi_modal_projector/.*bias", (None,)),
    ]
    RENAMES = [
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.lm_head$", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ]
    # Features are taken before the tower's last norm, and SigLIP's pooling head has no use here.
    UNUSED = [
        r".*rotary_emb\.inv_freq",
        r"model\.vision_tower\.embeddings\.position_ids",
        r"model\.vision_tower\.post_layernorm\..*",
        r"model\.vision_tower\.head\..*",
    ]
    HAS_GRIDS = False  # every image has the tower's own size
    KNOWN = {
        "llava-hf/llava-1.5-7b-hf": _published(),
        "llava-hf/llava-1.5-13b-hf": _published(
            hidden_size=5120,
            intermediate_size=13824,
            num_attention_heads=40,
            num_hidden_layers=40,
            num_key_value_heads=40,
        ),
    }

    def image_tokens(self, grid: Grid = None) -> int:
        return self.vision.slots - int(self.drop_first)

    @property
    def patch_unit(self) -> int:
        return self.vision.slots

    @property
    def unit_features(self) -> int:
        return self.vision.slots

    def layout(self, tokens: np.ndarray, media: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return `Family.layout`; media: pixel_values [I, channels, height, width]."""
        vision = self.vision
        size = (vision.patch_shape[0], vision.image_size, vision.image_size)
        pixel_values = media.get("pixel_values", np.zeros((0, *size), np.float32))
        if pixel_values.shape[1:] != size:
            raise UserError(
                f"pixel_values must be [images, {', '.join(map(str, size))}]; it is "
                f"{list(pixel_values.shape)}. Take it from the checkpoint's own processor."
            )
        patches = cut_patches(vision, pixel_values)
        images, slots, values = patches.shape
        places = np.flatnonzero(tokens == self.image_token_id)
        each = self.image_tokens()
        if len(places) != images * each:
            raise UserError(
                f"An example holds {len(places)} image tokens, but its {images} images stand for "
                f"{images * each} ({each} each). Tokens and images must agree exactly: check that "
                f"nothing was truncated and that every placeholder was expanded."
            )
        used = np.arange(int(self.drop_first), slots)
        image_index = np.full(len(tokens), -1, np.int32)
        image_index[places] = (np.arange(images)[:, None] * slots + used[None, :]).reshape(-1)
        return {
            "positions": np.arange(len(tokens), dtype=np.int32),
            "image_index": image_index,
            "patches": patches.reshape(images * slots, values),
            "patch_segments": np.repeat(np.arange(1, images + 1, dtype=np.int32), slots),
            "patch_positions": np.tile(np.arange(slots, dtype=np.int32), images),
        }

    def pixels(self, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return `Family.pixels`, without what the tower's last whole patch leaves out."""
        (channels, size, _), grid = self.vision.patch_shape, self.vision.grid
        held = patches[np.argsort(positions)][-(grid**2) :]  # a class token has no pixels
        image = held.reshape(grid, grid, channels, size, size).transpose(0, 3, 1, 4, 2)
        return image.reshape(1, grid * size, grid * size, channels)

    def holds_pixels(self, positions: Any) -> Any:
        return positions >= int(self.vision.kind.has_class_token)

    @property
    def cell(self) -> int:
        return self.vision.patch_shape[-1]

    @property
    def vision_layers(self) -> int:
        return max(self.layers)

    def attended_patches(self, patches: int) -> int:
        return self.vision.slots  # of its own image

    @property
    def unused_parameters(self) -> int:
        width, wide = self.vision.width, self.vision.intermediate_size
        norm = 2 * width
        if self.vision.kind.has_class_token:
            return norm
        attention = 4 * width * width + 4 * width  # q, k, v in one, and the output
        mlp = 2 * width * wide + wide + width
        # SigLIP's pooling head: the last norm, the query, attention, norm and MLP.
        return norm + width + attention + norm + mlp
