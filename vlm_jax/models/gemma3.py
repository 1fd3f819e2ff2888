"""Gemma 3 (https://arxiv.org/abs/2503.19786): SigLIP, pooled features that see both ways."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.models.clip_config import tower_from_hf
from vlm_jax.models.decoder_config import nested
from vlm_jax.models.family import Grid, components
from vlm_jax.models.fixed_size import HEAD, TOWER_AXES, FixedSize
from vlm_jax.models.hf_config import Fields


def _published(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **text: int
) -> dict[str, Any]:
    """Return the config.json of Gemma 3; text: what differs from the defaults."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {
            "hidden_size": hidden, "intermediate_size": intermediate, "model_type": "gemma3_text",
            "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, **text,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gemma3(FixedSize):
    """What the computation depends on. side: of the square of features of an image."""

    side: int

    MODULE = "vlm_jax.models.gemma3_module:Module"
    COMPONENTS = components("vision_tower", "multi_modal_projector")
    AXES = [
        *TOWER_AXES,
        (r"model/multi_modal_projector/mm_input_projection_weight", ("embed", "wide")),
        (r"model/multi_modal_projector/mm_soft_emb_norm/scale", (None,)),
    ]
    UNUSED = HEAD
    FEATURES_SEE_BOTH_WAYS = True
    IMAGE_MARK = "<start_of_image>"
    KNOWN = {
        "google/gemma-3-4b-it": _published(2560, 10240, 34, 8, 4),
        "google/gemma-3-12b-it": _published(3840, 15360, 48, 16, 8),
        "google/gemma-3-27b-it": _published(
            5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168
        ),
    }

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "Gemma3":
        top = Fields(
            raw, "config.json", "boi_token_index eoi_token_index boi_token_id eoi_token_id"
        )
        text = top.take("text_config", {}, dict)
        # The reference's default of the head is tied, at both levels.
        tied = top.take("tie_word_embeddings", True)
        text = {**text, "tie_word_embeddings": tied}
        tower = tower_from_hf(
            {"model_type": "siglip_vision_model", **top.take("vision_config", {}, dict)}
        )
        features = top.size("mm_tokens_per_image", 256)
        side = math.isqrt(features)
        if side**2 != features or side > tower.grid or tower.grid // (tower.grid // side) != side:
            raise UserError(
                f"config.json has mm_tokens_per_image = {features}, to which the tower's "
                f"{tower.grid} x {tower.grid} patches cannot be pooled."
            )
        if tower.kind.has_class_token:
            raise UserError("config.json has a tower with a class token; expected SigLIP's.")
        image = top.size("image_token_index", top.size("image_token_id", 262144))
        return cls(nested(top, text, "gemma3_text", tied), tower, image, None, side)

    @property
    def unit_features(self) -> int:
        return self.side**2

    @property
    def pooled(self) -> int:
        """The side in patches of what one feature is the mean of."""
        return self.vision.grid // self.side

    @property
    def cell(self) -> int:
        return self.vision.patch_shape[-1] * self.pooled

    def written(self, kind: str, grid: Grid, times: Sequence[float]) -> Sequence[str | int]:
        """Between two blank lines, which the tokenizer joins with those around them."""
        return ["\n\n<start_of_image>", self.image_tokens(grid), "<end_of_image>\n\n"]
