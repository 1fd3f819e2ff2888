"""Families whose images all have the tower's own size, CLIP's or SigLIP's.

Letters: T tokens, I images, S tower tokens an image, C values a patch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models.clip_config import Tower, cut_patches
from vlm_jax.models.family import Family

# Of the tower's parameters, and the tensors' names in all layouts.
TOWER_AXES = [
    (r"model/vision_tower/.*/([qkv]_proj|fc1|patch_embedding)/kernel", ("embed", "wide")),
    (r"model/vision_tower/.*/(out_proj|fc2)/kernel", ("wide", "embed")),
    (r"model/vision_tower/.*/position_embedding/embedding", (None, "embed")),
    (r"model/vision_tower/.*(scale|bias|class_embedding)", (None,)),
]
RENAMES = [
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.lm_head$", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
]
HEAD = (r"model\.vision_tower\.head\..*", r"model\.vision_tower\.embeddings\.position_ids")


@dataclasses.dataclass(frozen=True)
class FixedSize(Family):
    """A `Family` without grids: `patch_unit` is the tower's tokens of an image."""

    vision: Tower

    PROJECTOR = "multi_modal_projector"
    VISION = "vision_tower"
    RENAMES = RENAMES
    HAS_GRIDS = False

    @property
    def patch_unit(self) -> int:
        return self.vision.slots

    def used_features(self) -> np.ndarray:
        """Return which of an image's `unit_features` stand at its placeholders, in order."""
        return np.arange(self.unit_features)

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
        used = self.used_features()
        if len(places) != images * len(used):
            raise UserError(
                f"An example holds {len(places)} image tokens, but its {images} images stand for "
                f"{images * len(used)} ({len(used)} each). Tokens and images must agree exactly: "
                f"check that nothing was truncated and that every placeholder was expanded."
            )
        image_index = np.full(len(tokens), -1, np.int32)
        first = np.arange(images)[:, None] * self.unit_features
        image_index[places] = (first + used[None, :]).reshape(-1)
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

    def attended_patches(self, patches: int) -> int:
        return self.vision.slots  # of its own image
