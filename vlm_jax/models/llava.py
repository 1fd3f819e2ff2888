"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744): a CLIP or SigLIP tower, a projector, a decoder."""

import dataclasses
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models.clip_config import tower_from_hf
from vlm_jax.models.decoder_config import decoder_from_hf
from vlm_jax.models.family import Grid, components
from vlm_jax.models.fixed_size import HEAD, TOWER_AXES, FixedSize
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
class Llava(FixedSize):
    """What the computation depends on. layers: the tower's hidden states that are concatenated,
    counted from 0, the tower's input. drop_first: strategy "default"."""

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
    COMPONENTS = components("vision_tower", "multi_modal_projector")
    AXES = [
        *TOWER_AXES,
        (r"model/multi_modal_projector/linear_1/kernel", ("embed", "wide")),
        (r"model/multi_modal_projector/linear_2/kernel", ("wide", "embed")),
        (r"model/multi_modal_projector/.*bias", (None,)),
    ]
    # Features are taken before the tower's last norm, and SigLIP's pooling head has no use here.
    UNUSED = [
        r".*rotary_emb\.inv_freq",
        r"model\.vision_tower\.post_layernorm\..*",
        *HEAD,
    ]
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
    def unit_features(self) -> int:
        return self.vision.slots

    def used_features(self) -> np.ndarray:
        return np.arange(int(self.drop_first), self.vision.slots)

    @property
    def vision_layers(self) -> int:
        return max(self.layers)

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
