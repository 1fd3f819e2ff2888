"""Qwen3-VL (https://arxiv.org/abs/2511.21631): features added in layers, times of frames as text.

Letters: T tokens.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models.decoder_config import nested
from vlm_jax.models.family import Grid, Grounding, components
from vlm_jax.models.hf_config import ACTIVATION_NAMES, Fields
from vlm_jax.models.qwen2_vl import Qwen2VL
from vlm_jax.models.qwen_vit_config import Tower, check_output, common_sizes, vision_fields
from vlm_jax.positions import grid_list, mrope

# Two sizes of tower: blocks, width, width of the MLP, blocks whose features are added.
SMALL, LARGE = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])


def _published(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    tower: tuple[int, int, int, list[int]],
    tied: bool = False,
) -> dict[str, Any]:
    """Return the config.json that the Qwen3-VL checkpoints carry."""
    depth, width, mlp, added = tower
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655,
        "model_type": "qwen3_vl", "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
        "vision_end_token_id": 151653, "vision_start_token_id": 151652,
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
            "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": intermediate,
            "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
            "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_theta": 5000000, "tie_word_embeddings": tied,
            "use_cache": True, "vocab_size": 151936,
            "rope_scaling": {
                "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
            },
        },
        "vision_config": {
            "deepstack_visual_indexes": added, "depth": depth, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": width, "in_channels": 3, "initializer_range": 0.02,
            "intermediate_size": mlp, "model_type": "qwen3_vl", "num_heads": 16,
            "num_position_embeddings": 2304, "out_hidden_size": hidden, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip


MERGERS = "deepstack_merger_list"  # of features that are added in layers


@dataclasses.dataclass(frozen=True)
class Qwen3VL(Qwen2VL):
    """What the computation depends on; `from_hf` reads a config.json, whose parts are nested."""

    MODULE = "vlm_jax.models.qwen3_vl_module:Module"
    COMPONENTS = components("visual", f"visual/(merger|{MERGERS})")
    AXES = [
        (r"model/visual/.*/(qkv|linear_fc1)/kernel", ("embed", "wide")),
        (r"model/visual/.*/(proj|linear_fc2)/kernel", ("wide", "embed")),
        (r"model/visual/pos_embed/embedding", (None, None)),
        (r"model/visual/.*(scale|bias)", (None,)),
    ]
    RENAMES = []
    GROUNDING = Grounding("{}", "[{}]", 1000, "{}, {}", ", ")
    LAST = ("down_proj", "linear_fc2")
    VIDEO_PROCESSOR = "Qwen3VLVideoProcessor"
    KNOWN = {
        "Qwen/Qwen3-VL-2B-Instruct": _published(2048, 6144, 28, 16, SMALL, tied=True),
        "Qwen/Qwen3-VL-4B-Instruct": _published(2560, 9728, 36, 32, SMALL, tied=True),
        "Qwen/Qwen3-VL-8B-Instruct": _published(4096, 12288, 36, 32, LARGE),
        "Qwen/Qwen3-VL-32B-Instruct": _published(5120, 25600, 64, 64, LARGE),
    }
    KNOWN_IMAGES = {"min_pixels": 65536, "max_pixels": 16777216}

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        top = Fields(raw, "config.json")
        vision = vision_fields(top)
        image, video = top.size("image_token_id", 151655), top.size("video_token_id", 151656)
        top.take("vision_start_token_id", 151652), top.take("vision_end_token_id", 151653)
        text, tied = top.take("text_config", kind=dict), top.take("tie_word_embeddings", False)
        # The top level alone says whether the head is tied.
        text = {key: value for key, value in text.items() if key != "tie_word_embeddings"}
        decoder = nested(top, text, "qwen3_vl_text", tied)
        tower = vision.finish(cls.tower(vision, decoder.hidden_size))
        if len(tower.added) > decoder.num_layers:
            raise UserError(
                f"The {vision.where} names {len(tower.added)} blocks whose features are added in "
                f"the decoder, which has {decoder.num_layers} layers."
            )
        return cls(decoder, tower, image, video)

    @staticmethod
    def tower(vision: Fields, width: int) -> Tower:
        check_output("out_hidden_size", vision.take("out_hidden_size", 3584), width)
        own, heads = vision.size("hidden_size", 1152), vision.size("num_heads", 16)
        sizes = common_sizes(vision, own, heads, "hidden_size / num_heads", depth=27, patch=16)
        places, depth = vision.size("num_position_embeddings", 2304), sizes["depth"]
        side = math.isqrt(places)
        added = tuple(vision.take("deepstack_visual_indexes", [8, 16, 24], list))
        if side * side != places:
            raise UserError(
                f"The {vision.where} has num_position_embeddings = {places}, which is no square."
            )
        if list(added) != sorted({n for n in added if isinstance(n, int) and 0 <= n < depth}):
            raise UserError(
                f"The {vision.where} has deepstack_visual_indexes = {list(added)}; expected "
                f"numbers of its {depth} blocks, rising."
            )
        return Tower(
            width=own,
            intermediate_size=vision.size("intermediate_size", 4304),
            activation=vision.require("hidden_act", ACTIVATION_NAMES, "gelu_pytorch_tanh"),
            mlp=("linear_fc1", "linear_fc2"),
            patch_bias=True,
            table=side,
            added=added,
            **sizes,
        )

    def written(self, kind: str, grid: Grid, times: Sequence[float]) -> Sequence[str | int]:
        """Before each patch's frames of a video, the mean of the first's and the last's times."""
        if kind != "video" or grid is None:
            return super().written(kind, grid, times)
        frames, depth = grid[0], self.vision.patch_shape[1]
        padded = [*times, *[times[-1]] * (frames * depth - len(times))]
        parts: list[str | int] = []
        for first, last in zip(padded[::depth], padded[depth - 1 :: depth], strict=True):
            parts += [f"<{(first + last) / 2:.1f} seconds><|vision_start|>"]
            parts += [self.image_tokens((1, *grid[1:])), "<|vision_end|>"]
        return parts

    @property
    def added_features(self) -> int:
        return len(self.vision.added)

    @property
    def projectors(self) -> tuple[str, ...]:
        # One by one: PEFT can hold no list of modules in full.
        return self.PROJECTOR, *(f"{MERGERS}.{n}" for n in range(len(self.vision.added)))

    def token_positions(
        self, tokens: np.ndarray, images: Any, videos: Any, media: Mapping[str, Any]
    ) -> np.ndarray:
        """Return the positions; each frame of a video counts as an image, behind its time."""
        frames = [(1, h, w) for t, h, w in grid_list(videos) for _ in range(t)]
        ids = self.image_token_id, self.video_token_id
        return mrope(tokens, images, frames, self.vision.merge, *ids)
