"""Gemma 3's Linen module: SigLIP, a pooling projector, a decoder."""

import flax.linen as nn
import jax

from vlm_jax.models.clip import VisionTower
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.gemma3 import Gemma3
from vlm_jax.models.layers.block import Compute
from vlm_jax.models.layers.linear import matmul, parameter
from vlm_jax.models.layers.norm import RMSNorm
from vlm_jax.models.vlm import VisionLanguageModel


class Projector(nn.Module):
    """The tower's patches [B, P, E] to features [B, F, D]: means of squares, a norm, a product."""

    cfg: Gemma3
    compute: Compute

    @nn.compact
    def __call__(self, x_BPE: jax.Array) -> jax.Array:
        cfg, dtype = self.cfg, self.compute.dtype
        B, _, E = x_BPE.shape
        grid, side, pooled = cfg.vision.grid, cfg.side, cfg.pooled
        x = x_BPE.reshape(-1, grid, grid, E)[:, : side * pooled, : side * pooled]
        x = x.reshape(-1, side, pooled, side, pooled, E).mean((2, 4))
        norm = RMSNorm(cfg.vision.epsilon, dtype, 1.0, True, name="mm_soft_emb_norm")
        x_BFE = norm(x).reshape(B, -1, E)
        init, shape = nn.initializers.lecun_normal(), (E, cfg.text.hidden_size)
        weight = parameter(self, "mm_input_projection_weight", init, shape)
        return matmul(x_BFE, weight)


class Body(nn.Module):
    """`model` in the checkpoint: tower, projector and decoder, named as there."""

    cfg: Gemma3
    compute: Compute

    def setup(self) -> None:
        cfg = self.cfg
        self.vision_tower = VisionTower(cfg.vision, (cfg.vision.depth,), self.compute, True)
        self.multi_modal_projector = Projector(cfg, self.compute)
        self.language_model = Decoder(cfg.text, self.compute)

    def features(self, batch) -> jax.Array:
        return self.multi_modal_projector(self.vision_tower(batch.patches, batch.patch_positions))


class Module(VisionLanguageModel):
    """`apply({"params": params}, batch)` gives float32 logits [B, T, V]."""

    BODY = Body
