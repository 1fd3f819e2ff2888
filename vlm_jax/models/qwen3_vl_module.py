"""Qwen3-VL's Linen module: the line's ViT with a table of positions, mergers, a decoder."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.models.decoder import Decoder
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.block import Compute
from vlm_jax.models.layers.norm import LayerNorm
from vlm_jax.models.qwen3_vl import Qwen3VL
from vlm_jax.models.qwen_vit import EPSILON, Visual, merged
from vlm_jax.models.qwen_vit_config import Tower
from vlm_jax.models.vlm import VisionLanguageModel


class Merger(nn.Module):
    """merge x merge neighbouring patches [B, P, E] to one token [B, F, D].

    behind: normalise what is merged, not each patch.
    """

    vision: Tower
    features: int
    compute: Compute
    behind: bool = False

    @nn.compact
    def __call__(self, x_BPE: jax.Array) -> jax.Array:
        norm, merge = LayerNorm(EPSILON, self.compute.dtype, name="norm"), self.vision.merge
        x_BFE = norm(merged(x_BPE, merge)) if self.behind else merged(norm(x_BPE), merge)
        x_BFE = self.compute.linear("linear_fc1", x_BFE.shape[-1])(x_BFE)
        return self.compute.linear("linear_fc2", self.features)(ACTIVATIONS["gelu"](x_BFE))


class Mergers(nn.Module):
    """Outputs of some blocks [A, B, P, E], each by a merger of its own, to [A, B, F, D]."""

    vision: Tower
    features: int
    compute: Compute

    @nn.compact
    def __call__(self, states_ABPE: jax.Array) -> jax.Array:
        sizes = (self.vision, self.features, self.compute)
        made = [Merger(*sizes, True, name=str(a))(x) for a, x in enumerate(states_ABPE)]
        return jnp.stack(made)


class Body(nn.Module):
    """`model` in the checkpoint: the tower and the decoder, named as there."""

    cfg: Qwen3VL
    compute: Compute

    def setup(self) -> None:
        text = self.cfg.text
        self.visual = Visual(self.cfg.vision, text.hidden_size, self.compute, Merger, Mergers)
        self.language_model = Decoder(text, self.compute)

    def features(self, batch) -> Any:
        return self.visual(batch)


class Module(VisionLanguageModel):
    """`apply({"params": params}, batch)` gives float32 logits [B, T, V]."""

    BODY = Body
