"""A family for tests: 4 features of 9 patches, and a learned row behind each line of them.

An image is 3 x 3 patches of 4 x 4 pixels; each feature sees 2 x 2 of them, so that its placeholders
are [a b newline c d newline]. The decoder's attribute is `text_model`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.models.decoder import Decoder
from vlm_jax.models.decoder_config import decoder_from_hf
from vlm_jax.models.family import Family, Grid, TowerSizes
from vlm_jax.models.layers.block import Compute
from vlm_jax.models.layers.linear import Linear, parameter
from vlm_jax.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Toy(Family):
    MODULE = "toy_family:Module"
    TEXT = "text_model"
    PROJECTOR = "connector"
    VISION = "tower"
    COMPONENTS = (
        (r"model/tower/.*", "vision"),
        (r"model/(connector/.*|image_newline)", "projector"),
        (r"model/text_model/embed_tokens/.*", "embeddings"),
        (r"model/text_model/.*", "language_model"),
        (r"lm_head/.*", "head"),
    )
    AXES = ((r"model/(tower|connector)/kernel", ("embed", "wide")), (r".*_newline", (None,)))
    HAS_GRIDS = False
    LEARNED_FEATURES = 1

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "Toy":
        text = decoder_from_hf(raw["text_config"], "llama", False, "config.json, text_config")
        return cls(text, TowerSizes(8, 8, 1, 0, (3, 4, 4), "gelu"), raw["image_token_id"], None)

    def image_tokens(self, grid: Grid = None) -> int:
        return 6

    patch_unit = 9
    unit_features = 4
    cell = 4

    def layout(self, tokens: np.ndarray, media: Mapping[str, Any]) -> dict[str, np.ndarray]:
        images = media.get("pixel_values", np.zeros((0, 3, 12, 12), np.float32))
        index = np.full(len(tokens), -1, np.int32)
        placed = np.array([0, 1, -2, 2, 3, -2])
        shown = [np.where(placed < 0, placed, placed + 4 * i) for i in range(len(images))]
        index[tokens == self.image_token_id] = np.concatenate([np.zeros(0, int), *shown])
        cut = images.reshape(-1, 3, 3, 4, 3, 4).transpose(0, 2, 4, 1, 3, 5)
        return {
            "positions": np.arange(len(tokens), dtype=np.int32),
            "image_index": index,
            "patches": cut.reshape(-1, 48),
            "patch_segments": np.repeat(np.arange(1, len(images) + 1, dtype=np.int32), 9),
            "patch_positions": np.tile(np.arange(9, dtype=np.int32), len(images)),
        }

    def pixels(self, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return patches.reshape(3, 3, 3, 4, 4).transpose(0, 3, 1, 4, 2).reshape(1, 12, 12, 3)

    @property
    def stacks(self) -> dict[str, int]:
        return {"model/text_model/layers": self.text.num_layers}

    @property
    def disk_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"model/tower/kernel": (8, 3, 4, 4)}


class Body(nn.Module):
    cfg: Toy
    compute: Compute

    def setup(self) -> None:
        width, compute = self.cfg.text.hidden_size, self.compute
        self.tower = Linear(self.cfg.vision.width, False, compute.dtype)
        self.connector = Linear(width, False, compute.dtype, compute.lora)
        self.text_model = Decoder(self.cfg.text, compute)
        self.image_newline = parameter(self, "image_newline", nn.initializers.normal(), (width,))

    def features(self, batch) -> jax.Array:
        x_BPE = self.tower(batch.patches)
        B, P, E = x_BPE.shape
        grid = x_BPE.reshape(B, P // 9, 3, 3, E)
        seen = grid[:, :, :2, :2] + grid[:, :, 1:, :2] + grid[:, :, :2, 1:] + grid[:, :, 1:, 1:]
        x_BFD = self.connector(seen.reshape(B, P // 9 * 4, E))
        newline = jnp.broadcast_to(self.image_newline.astype(x_BFD.dtype), (B, 1, x_BFD.shape[-1]))
        return jnp.concatenate([x_BFD, newline], axis=1)


class Module(VisionLanguageModel):
    BODY = Body
