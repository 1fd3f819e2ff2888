"""The common part of all families: features among token embeddings, decoder, head.

Letters: B rows, T tokens, F image features a row, D model, V vocabulary.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.batch import Batch
from vlm_jax.models.family import Family
from vlm_jax.models.layers.block import Compute
from vlm_jax.models.layers.linear import Linear
from vlm_jax.models.layers.partition import gather_places

# Here, as the data side makes batches without JAX.
jax.tree_util.register_dataclass(Batch, [field.name for field in dataclasses.fields(Batch)], [])


def place_features(x_BTD: jax.Array, features_BFD: jax.Array, image_index_BT: jax.Array):
    """Return token embeddings with feature `image_index` in place wherever it is not -1."""
    if features_BFD.shape[1] == 0:
        return x_BTD
    index_BT1 = jnp.maximum(image_index_BT, 0)[:, :, None]
    features_BFD = gather_places(features_BFD)
    picked_BTD = jnp.take_along_axis(features_BFD, index_BT1, axis=1).astype(x_BTD.dtype)
    return jnp.where((image_index_BT >= 0)[:, :, None], picked_BTD, x_BTD)


def runs(image_index_BT: jax.Array) -> jax.Array:
    """Return int32 [B, T]: the number, from 1, of the run of features a token is in; 0: of none."""
    feature_BT = image_index_BT != -1
    before_BT = jnp.pad(feature_BT, ((0, 0), (1, 0)))[:, :-1]
    number_BT = jnp.cumsum(feature_BT & ~before_BT, axis=1, dtype=jnp.int32)
    return jnp.where(feature_BT, number_BT, 0)


def noise_size(segments_BT: jax.Array, width: int, alpha: float) -> jax.Array:
    """Return [B, T]: how large a token's NEFTune noise may be, alpha / sqrt(tokens * width).

    tokens: of the example that it belongs to (https://arxiv.org/abs/2310.05914, section 2). Rows
    of transformers count padding too; here it must not matter.
    """
    none = jnp.zeros(segments_BT.shape[1] + 1)
    count = jax.vmap(lambda segments: none.at[segments].add(1.0)[segments])
    return alpha * jax.lax.rsqrt(count(segments_BT) * width)


class VisionLanguageModel(nn.Module):
    """Tower, projector, decoder and head: a `Batch` to float32 logits [B, T, V].

    BODY: a family's part of it, made of (cfg, compute): its submodules are named as in the
    checkpoint's `model`, the decoder among them, and `features(batch)` gives [B, F, D]; with
    `Family.added_features` it gives (those, [A, B, F, D] that are added to what the first A
    layers give at the features' tokens, https://arxiv.org/abs/2406.04334).
    """

    BODY: ClassVar[type[nn.Module]]

    cfg: Family
    compute: Compute

    def setup(self) -> None:
        text, compute = self.cfg.text, self.compute
        self.model: Any = self.BODY(self.cfg, compute)
        if not text.tied:
            self.lm_head = Linear(text.vocab_size, False, compute.dtype, compute.lora)

    @property
    def decoder(self) -> Any:
        return getattr(self.model, self.cfg.TEXT)

    def see(self, batch: Batch) -> jax.Array:
        """Return the projected image features [B, F, D]."""
        features = self.model.features(batch)
        return features[0] if self.cfg.added_features else features

    def embed(self, batch: Batch, noise: float = 0.0) -> jax.Array:
        """Return [B, T, D]: token embeddings with the image features in their places.

        noise: NEFTune's alpha; above 0 the embeddings of text get uniform noise of rng "noise".
        """
        return self._embed(batch, noise)[0]

    def _embed(self, batch: Batch, noise: float) -> tuple[jax.Array, jax.Array | None]:
        """Return what `embed` does, and the features that are added in the first A layers.

        [A, B, T, D], 0 at other tokens; None where there are none.
        """
        x_BTD = self.decoder.embed(batch.tokens)
        if noise > 0:
            size_BT = noise_size(batch.segments, x_BTD.shape[-1], noise)
            drawn_BTD = jax.random.uniform(self.make_rng("noise"), x_BTD.shape, minval=-1.0)
            x_BTD += (size_BT[:, :, None] * drawn_BTD).astype(x_BTD.dtype)
        if batch.patches.shape[1] == 0 and not self.is_initializing():
            return x_BTD, None
        features, index_BT, added_ABTD = self.model.features(batch), batch.image_index, None
        if self.cfg.added_features:
            features, added_ABFD = features
            nothing = jnp.zeros_like(x_BTD)
            added_ABTD = jnp.stack([place_features(nothing, x, index_BT) for x in added_ABFD])
        if self.cfg.LEARNED_FEATURES:  # index -2 is the last of a row's features
            index_BT += jnp.where(index_BT < -1, features.shape[1] + 1, 0)
        return place_features(x_BTD, features, index_BT), added_ABTD

    def hidden(self, batch: Batch, cache: Any = None, noise: float = 0.0) -> tuple[jax.Array, Any]:
        """Return final hidden states [B, T, D] and the cache, filled where one is given.

        noise: see `embed`.
        """
        x_BTD, added_ABTD = self._embed(batch, noise)
        blocks_BT = None
        if self.cfg.FEATURES_SEE_BOTH_WAYS and batch.patches.shape[1]:
            blocks_BT = runs(batch.image_index)
        return self.decoder(x_BTD, batch.positions, batch.segments, cache, added_ABTD, blocks_BT)

    def decode(self, tokens_BT, positions, segments_BT, cache) -> tuple[jax.Array, Any]:
        """Return hidden states [B, T, D] of text that follows what the cache holds."""
        return self.decoder(self.decoder.embed(tokens_BT), positions, segments_BT, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return float32 [..., V]: the loss and sampling need the full precision."""
        head = self.decoder.embed_tokens.attend if self.cfg.text.tied else self.lm_head
        return head(hidden).astype(jnp.float32)

    def __call__(self, batch: Batch) -> jax.Array:
        return self.logits(self.hidden(batch)[0])
