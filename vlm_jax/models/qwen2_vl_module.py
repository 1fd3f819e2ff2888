"""Qwen2-VL's Linen module: a ViT with 2-D rotary positions, a merger of its patches, a decoder.

https://arxiv.org/abs/2409.12191, section 2.1.
"""

from typing import Any

import flax.linen as nn

from vlm_jax.models.decoder import Decoder
from vlm_jax.models.layers.block import Compute
from vlm_jax.models.qwen2_vl import Qwen2VL
from vlm_jax.models.qwen_vit import Visual
from vlm_jax.models.vlm import VisionLanguageModel


class Body(nn.Module):
    """`model` in the checkpoint: the tower and the decoder, named as there."""

    cfg: Qwen2VL
    compute: Compute

    def setup(self) -> None:
        text = self.cfg.text
        self.visual = Visual(self.cfg.vision, text.hidden_size, self.compute)
        self.language_model = Decoder(text, self.compute)

    def features(self, batch) -> Any:
        return self.visual(batch)


class Module(VisionLanguageModel):
    """`apply({"params": params}, batch)` gives float32 logits [B, T, V]."""

    BODY = Body
