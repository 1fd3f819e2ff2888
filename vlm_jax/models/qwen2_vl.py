"""Qwen2-VL (https://arxiv.org/abs/2409.12191): images of any size in patches, and M-RoPE.

Letters: T tokens, P patches, C values a patch, I images.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models.decoder_config import flat_or_nested
from vlm_jax.models.family import NAMES_OF_MEDIA, Family, Grounding, components
from vlm_jax.models.hf_config import ACTIVATION_NAMES, Fields
from vlm_jax.models.qwen_vit_config import Tower, check_output, common_sizes, vision_fields
from vlm_jax.positions import (
    grid_list,
    interpolation,
    mrope,
    vision_positions,
    vision_segments,
    vision_windows,
)

# Fields beside the decoder's, in flat files among them.
NOT_OF_TEXT = """image_token_id video_token_id vision_start_token_id vision_end_token_id
    vision_token_id spatial_merge_size"""


def published(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool = False,
) -> dict[str, Any]:
    """Return the flat config.json that the Qwen2-VL checkpoints carry."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
        "video_token_id": 151656, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": intermediate,
        "max_position_embeddings": 32768, "max_window_layers": layers, "model_type": "qwen2_vl",
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
        "use_cache": True, "use_sliding_window": False, "vocab_size": vocabulary,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "temporal_patch_size": 2, "hidden_size": hidden,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Qwen2VL(Family):
    """What the computation depends on; `from_hf` reads a config.json, flat (4.x) or nested."""

    vision: Tower

    TEXT_TYPE: ClassVar[str] = (
        "qwen2_vl_text"  # what a flat config.json describes, as the reference names it
    )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        top = Fields(raw, "config.json", "vision_token_id spatial_merge_size")
        vision = vision_fields(top)
        image, video = top.size("image_token_id", 151655), top.size("video_token_id", 151656)
        top.take("vision_start_token_id", 151652), top.take("vision_end_token_id", 151653)
        decoder = flat_or_nested(top, cls.TEXT_TYPE, NOT_OF_TEXT)
        tower = vision.finish(cls.tower(vision, decoder.hidden_size))
        return cls(decoder, tower, image, video)

    @staticmethod
    def tower(vision: Fields, width: int) -> Tower:
        """Return the sizes in a vision_config; width: the decoder's."""
        check_output("hidden_size", vision.take("hidden_size", 3584), width)
        own, heads = vision.size("embed_dim", 1280), vision.size("num_heads", 16)
        return Tower(
            width=own,
            intermediate_size=int(own * vision.positive("mlp_ratio", 4.0)),
            activation=vision.require("hidden_act", ACTIVATION_NAMES, "quick_gelu"),
            **common_sizes(vision, own, heads, "embed_dim / num_heads"),
        )

    MODULE = "vlm_jax.models.qwen2_vl_module:Module"
    PROJECTOR = "merger"
    VISION = "visual"
    COMPONENTS = components("visual", "visual/merger")
    AXES = [
        (r"model/visual/.*/(qkv|fc1|0|gate_proj|up_proj)/kernel", ("embed", "wide")),
        (r"model/visual/.*/(proj|fc2|2|down_proj)/kernel", ("wide", "embed")),
        (r"model/visual/.*(scale|bias)", (None,)),
    ]
    RENAMES = [
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    ]
    UNUSED = [r".*rotary_emb\.inv_freq", r".*rotary_pos_emb\.inv_freq"]
    HAS_GRIDS = True
    GROUNDING: ClassVar[Grounding | None] = Grounding(
        "<|object_ref_start|>{}<|object_ref_end|>", "<|box_start|>{}<|box_end|>", 1000
    )
    KNOWN = {
        "Qwen/Qwen2-VL-2B-Instruct": published(1536, 8960, 28, 12, 2, 151936, tied=True),
        "Qwen/Qwen2-VL-7B-Instruct": published(3584, 18944, 28, 28, 4, 152064),
        "Qwen/Qwen2-VL-72B-Instruct": published(8192, 29568, 80, 64, 8, 152064),
    }
    KNOWN_IMAGES = {"min_pixels": 3136, "max_pixels": 12845056}

    @property
    def patch_unit(self) -> int:
        return self.vision.merge**2

    def _media(
        self, tokens: np.ndarray, kind: str, media: Mapping[str, Any], token_id: int | None
    ) -> tuple[np.ndarray, list[tuple[int, int, int]], np.ndarray]:
        """Return (patches [P, C], grids, token slots) of a kind; raise where they differ."""
        pixels, sizes = NAMES_OF_MEDIA[kind]
        grids, whole = grid_list(media.get(sizes)), self.vision.patch_values
        values = np.asarray(media.get(pixels, np.zeros((0, whole), np.float32)))
        one_frame = values.dtype == np.uint8 and (whole // self.vision.patch_shape[1],)
        if values.shape[1:] not in ((whole,), one_frame):
            raise UserError(
                f"The pixel values of {kind}s must be [patches, {whole}]; they are "
                f"{list(values.shape)}. Take them from the checkpoint's own processor."
            )
        slots = np.flatnonzero(tokens == token_id)
        wanted, patches = sum(map(self.image_tokens, grids)), sum(map(self.image_patches, grids))
        if len(slots) != wanted or len(values) != patches:
            raise UserError(
                f"An example holds {len(slots)} {kind} tokens and {len(values)} patches, but its "
                f"{len(grids)} {kind} grids {grids} stand for {wanted} tokens and "
                f"{patches} patches. Tokens and images must agree exactly: check "
                f"that nothing was truncated and that pixel settings are the same on both sides."
            )
        return values, grids, slots

    def layout(self, tokens: np.ndarray, media: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return `Family.layout`, images first, then videos.

        pixel_values [P, C], image_grid_thw [I, 3], pixel_values_videos, video_grid_thw. Patches
        may be bytes, and of one frame that stands for all.
        """
        ids = {"image": self.image_token_id, "video": self.video_token_id}
        (images, image_grids, image_slots), (videos, video_grids, video_slots) = (
            self._media(tokens, kind, media, token_id) for kind, token_id in ids.items()
        )
        image_index = np.full(len(tokens), -1, np.int32)
        slots = np.concatenate([image_slots, video_slots])
        image_index[slots] = np.arange(len(slots))
        grids, tower = [*image_grids, *video_grids], self.vision
        made = {
            "positions": self.token_positions(tokens, image_grids, video_grids, media),
            "image_index": image_index,
            # Tens of megabytes: copied only where there are both.
            "patches": np.concatenate([images, videos])
            if len(images) and len(videos)
            else (videos if len(videos) else images),
            "patch_segments": vision_segments(grids),
            "patch_positions": vision_positions(grids, tower.merge),
        }
        if tower.window:
            made["patch_windows"] = vision_windows(grids, tower.merge, tower.window)
        if tower.table:
            taps, weights = interpolation(grids, tower.merge, tower.table)
            made |= {"patch_taps": taps, "patch_tap_weights": weights}
        return made

    def token_positions(
        self, tokens: np.ndarray, images: Any, videos: Any, media: Mapping[str, Any]
    ) -> np.ndarray:
        """Return the positions int32 [3, T]; images, videos: their grids."""
        ids = self.image_token_id, self.video_token_id
        return mrope(tokens, images, videos, self.vision.merge, *ids)

    def pixels(self, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return `Family.pixels`; a still image fills all frames with the same pixels."""
        channels, frames, size, _ = self.vision.patch_shape
        height, width = (int(n) + 1 for n in positions.max(0))
        grid = np.zeros((height, width, channels, frames, size, size), patches.dtype)
        grid[positions[:, 0], positions[:, 1]] = patches.reshape(-1, channels, frames, size, size)
        shape = (frames, height * size, width * size, channels)
        return grid.transpose(3, 0, 4, 1, 5, 2).reshape(shape)

    def holds_pixels(self, positions: Any) -> Any:
        return positions[..., 0] >= 0

    @property
    def cell(self) -> int:
        return self.vision.patch_shape[-1] * self.vision.merge

    @property
    def image_settings(self) -> dict[str, Any]:
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "merge_size": self.vision.merge,
            "patch_size": self.vision.patch_shape[-1],
        }
