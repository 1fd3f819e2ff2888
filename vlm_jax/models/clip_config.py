"""The sizes of a CLIP or SigLIP tower, and images cut as it takes them; `clip` computes with them.

Letters: I images, S tower tokens an image (patches, with CLIP's class token first), C values a
patch.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.files.limits import number
from vlm_jax.models.family import TowerSizes
from vlm_jax.models.hf_config import ACTIVATION_NAMES, Fields, entry


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
class Tower(TowerSizes):
    """Sizes of the vision tower. slots: S, the tower's tokens an image."""

    BLOCKS = "encoder/layers"
    CONVOLUTION = "embeddings/patch_embedding"

    kind: TowerKind
    image_size: int
    epsilon: float

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_shape[-1]

    @property
    def slots(self) -> int:
        return self.grid**2 + int(self.kind.has_class_token)


def tower_from_hf(raw: dict[str, Any]) -> Tower:
    where = "config.json, vision_config"
    kind = entry(TOWERS, raw.get("model_type", "clip_vision_model"), where)
    fields = Fields(raw, where, "vocab_size vision_use_head", kind.defaults)
    fields.require("attention_dropout", (0.0, 0), 0.0)
    patch = fields.size("patch_size")
    tower = Tower(
        kind=kind,
        width=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        depth=fields.size("num_hidden_layers"),
        num_heads=fields.size("num_attention_heads"),
        patch_shape=(fields.size("num_channels", 3), patch, patch),
        image_size=fields.size("image_size"),
        activation=fields.require("hidden_act", ACTIVATION_NAMES),
        epsilon=fields.positive("layer_norm_eps"),
    )
    number("patch_values", math.prod(tower.patch_shape), f"{where} (channels x size^2)")
    if tower.image_size < patch or tower.width % tower.num_heads:
        raise UserError(
            f"The {where} has images of {tower.image_size} pixels in patches of "
            f"{patch}, and a width of {tower.width} for {tower.num_heads} heads: a "
            f"patch must fit the image, and the heads must divide the width."
        )
    return fields.finish(tower)


def cut_patches(vision: Tower, pixel_values: np.ndarray) -> np.ndarray:
    """Return [I, S, C] of pixels [I, channels, height, width]; a class token's slot is zeros."""
    (channels, patch, _), grid = vision.patch_shape, vision.grid
    # A convolution drops the remainder.
    images = pixel_values[:, :, : grid * patch, : grid * patch]
    images = images.reshape(len(images), channels, grid, patch, grid, patch)
    flat = images.transpose(0, 2, 4, 1, 3, 5).reshape(
        len(images), grid * grid, channels * patch * patch
    )
    return np.pad(flat, ((0, 0), (int(vision.kind.has_class_token), 0), (0, 0)))
