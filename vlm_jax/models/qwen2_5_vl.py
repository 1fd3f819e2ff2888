"""Qwen2.5-VL (https://arxiv.org/abs/2502.13923): Qwen2-VL with windows in its tower, and time.

Letters: T tokens, V videos.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models.family import Grounding
from vlm_jax.models.hf_config import ACTIVATION_NAMES, Fields
from vlm_jax.models.qwen2_vl import Qwen2VL, published
from vlm_jax.models.qwen_vit_config import Tower, check_output, common_sizes
from vlm_jax.positions import mrope


@dataclasses.dataclass(frozen=True)
class TimedTower(Tower):
    """tokens_per_second: how many positions a second of video takes."""

    tokens_per_second: float = 1.0


def _published(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tower_mlp: int = 3420,
    tied: bool = False,
) -> dict[str, Any]:
    """Return the flat config.json that the Qwen2.5-VL checkpoints carry."""
    older = published(hidden, intermediate, layers, heads, kv_heads, vocabulary, tied)
    return {
        **older,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "max_position_embeddings": 128000,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": tower_mlp,
            "num_heads": 16, "in_chans": 3, "out_hidden_size": hidden, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Qwen25VL(Qwen2VL):
    """What the computation depends on; `from_hf` reads a config.json, flat (4.x) or nested."""

    vision: TimedTower

    TEXT_TYPE = "qwen2_5_vl_text"
    GROUNDING = Grounding("{}", "[{}]", None, "{}, {}", ", ")
    OF_VIDEOS = ("second_per_grid_ts",)
    KNOWN = {
        "Qwen/Qwen2.5-VL-3B-Instruct": _published(2048, 11008, 36, 16, 2, 151936, tied=True),
        "Qwen/Qwen2.5-VL-7B-Instruct": _published(3584, 18944, 28, 28, 4, 152064),
        "Qwen/Qwen2.5-VL-32B-Instruct": _published(5120, 27648, 64, 40, 8, 152064, 3456),
        "Qwen/Qwen2.5-VL-72B-Instruct": _published(8192, 29568, 80, 64, 8, 152064, 3456),
    }

    @staticmethod
    def tower(vision: Fields, width: int) -> TimedTower:
        check_output("out_hidden_size", vision.take("out_hidden_size", 3584), width)
        own, heads = vision.size("hidden_size"), vision.size("num_heads", 16)
        sizes = common_sizes(vision, own, heads, "hidden_size / num_heads")
        window = vision.size("window_size", 112)
        merged = window // sizes["merge"] // sizes["patch_shape"][-1]
        full = vision.take("fullatt_block_indexes", [7, 15, 23, 31], list)
        if not all(isinstance(n, int) for n in full):
            raise UserError(
                f"The {vision.where} has fullatt_block_indexes = {full!r:.80}; expected whole "
                f"numbers."
            )
        if not merged:
            raise UserError(
                f"The {vision.where} has window_size = {window} pixels, less than one merged "
                f"patch of {sizes['merge']} x {sizes['patch_shape'][-1]}."
            )
        return TimedTower(
            width=own,
            intermediate_size=vision.size("intermediate_size", 3420),
            activation=vision.require("hidden_act", ACTIVATION_NAMES, "silu"),
            norm="rms",
            mlp=("gate_proj", "up_proj", "down_proj"),
            window=merged,
            full=tuple(full),
            tokens_per_second=vision.positive("tokens_per_second", 4),
            **sizes,
        )

    def token_positions(
        self, tokens: np.ndarray, images: Any, videos: Any, media: Mapping[str, Any]
    ) -> np.ndarray:
        """Return the positions; second_per_grid_ts float [V] of `media`: 1 where it is missing."""
        seconds = media.get("second_per_grid_ts")
        seconds = np.ones(len(videos)) if seconds is None else np.asarray(seconds)
        intervals = np.float32(self.vision.tokens_per_second) * seconds.astype(np.float32)
        ids = self.image_token_id, self.video_token_id
        return mrope(tokens, images, videos, self.vision.merge, *ids, intervals)

    def attended_patches(self, patches: int) -> int:
        """By the mean of the blocks: most attend in windows alone."""
        tower = self.vision
        window, full = tower.window**2 * self.patch_unit, sum(tower.full_blocks)
        return (full * patches + (tower.depth - full) * min(window, patches)) // tower.depth
