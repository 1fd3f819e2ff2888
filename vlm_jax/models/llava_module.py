"""LLaVA-1.5's Linen module: a CLIP or SigLIP tower, a projector, a decoder."""

import flax.linen as nn
import jax

from vlm_jax.models.clip import VisionTower
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.layers.block import MLP, Compute
from vlm_jax.models.llava import Llava
from vlm_jax.models.vlm import VisionLanguageModel


class Body(nn.Module):
    """`model` in the checkpoint: tower, projector and decoder, named as there."""

    cfg: Llava
    compute: Compute

    def setup(self) -> None:
        cfg, width = self.cfg, self.cfg.text.hidden_size
        self.vision_tower = VisionTower(cfg.vision, cfg.layers, self.compute)
        self.multi_modal_projector = MLP(
            ("linear_1", "linear_2"),
            (width, width),
            cfg.projector_activation,
            self.compute,
            cfg.projector_bias,
        )
        self.language_model = Decoder(cfg.text, self.compute)

    def features(self, batch) -> jax.Array:
        return self.multi_modal_projector(self.vision_tower(batch.patches, batch.patch_positions))


class Module(VisionLanguageModel):
    """`apply({"params": params}, batch)` gives float32 logits [B, T, V]."""

    BODY = Body
