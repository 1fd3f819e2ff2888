"""LLaVA-1.5's Linen module: a CLIP or SigLIP tower, a projector, a decoder."""

from typing import Any

import flax.linen as nn
import jax

from vlm_jax.models.clip import VisionTower
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.bottleneck import Bottleneck
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.models.llava import Llava
from vlm_jax.models.vlm import VisionLanguageModel


class Projector(nn.Module):
    cfg: Llava
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg

        def linear(name: str, x: jax.Array) -> jax.Array:
            width = cfg.text.hidden_size
            return Linear(width, cfg.projector_bias, self.dtype, self.lora, name=name)(x)

        return linear("linear_2", ACTIVATIONS[cfg.projector_activation](linear("linear_1", x)))


class Body(nn.Module):
    """`model` in the checkpoint: tower, projector and decoder, named as there."""

    cfg: Llava
    dtype: Any
    lora: LoRAScale | None
    remat: str
    adapter: Bottleneck | None

    def setup(self) -> None:
        cfg, form = self.cfg, self.adapter
        self.vision_tower = VisionTower(
            cfg.vision, self.dtype, self.lora, self.remat, cfg.layers, form
        )
        self.multi_modal_projector = Projector(cfg, self.dtype, self.lora)
        self.language_model = Decoder(cfg.text, self.dtype, self.lora, self.remat, form)

    def features(self, batch) -> jax.Array:
        states = self.vision_tower(batch.patches, batch.patch_positions)
        return self.multi_modal_projector(states)


class Module(VisionLanguageModel):
    """`apply({"params": params}, batch)` gives float32 logits [B, T, V]."""

    cfg: Llava

    def make_body(self) -> nn.Module:
        return Body(self.cfg, self.dtype, self.lora, self.remat, self.adapter)
