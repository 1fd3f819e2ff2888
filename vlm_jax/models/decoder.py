"""The decoder that Llama, Mistral, Qwen and Gemma share: rotary, grouped heads, gated MLP.

Letters: B batch, T tokens, S cache slots, D model, N heads, K kv heads, H head dim, L layers.
Module names are Hugging Face's, so a path in the tree is a path in the checkpoint.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.decoder_config import UNBOUNDED, DecoderConfig
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.block import Block, Compute, GatedMLP
from vlm_jax.models.layers.linear import Embed
from vlm_jax.models.layers.norm import RMSNorm
from vlm_jax.models.layers.remat import QKV
from vlm_jax.models.layers.rope import apply_rope, rope_angles
from vlm_jax.models.layers.scan import Stack


class SelfAttention(nn.Module):
    """Causal self-attention with grouped key and value heads and rotary positions.

    https://arxiv.org/abs/2305.13245 (grouped heads), https://arxiv.org/abs/2104.09864 (RoPE).
    x_BTD [B, T, D] to ([B, T, D], cache). context: cos and sin [B, T, H], segments of queries
    [B, T] and keys [B, S], the cache slot of the first query, and the blocks of both that see both
    ways, or None. layer: this layer's "window", a token's reach in tokens, "rope", which of two cos
    and sin [2, B, T, H] it turns by, and "cache" {"k", "v" [B, S, K, H]}, returned with k and v of
    x written from that slot on, where there are such.
    """

    cfg: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD, context, layer):
        cfg, linear, cache = self.cfg, self.compute.linear, layer.get("cache")
        cos_BTH, sin_BTH, q_segments_BT, k_segments_BS, start, blocks = context
        B, T, _ = x_BTD.shape
        if "rope" in layer:
            cos_BTH, sin_BTH = cos_BTH[layer["rope"]], sin_BTH[layer["rope"]]

        def project(name: str, heads: int) -> jax.Array:
            x = linear(f"{name}_proj", heads * cfg.head_dim, cfg.qkv_bias)(x_BTD)
            return x.reshape(B, T, heads, cfg.head_dim)

        def turned(name: str, heads: int) -> jax.Array:
            x = project(name, heads)
            if cfg.qk_norm:  # kept before the norm, whose gradient needs it
                x = _norm(cfg, self.compute)(name=f"{name}_norm")(checkpoint_name(x, QKV))
            return apply_rope(x, cos_BTH, sin_BTH, cfg.rope.pairs)

        q_BTNH, k_BTKH = turned("q", cfg.num_heads), turned("k", cfg.num_kv_heads)
        v_BTKH = project("v", cfg.num_kv_heads)
        if cfg.qk_norm:
            v_BTKH = checkpoint_name(v_BTKH, QKV)
        else:
            q_BTNH, k_BTKH, v_BTKH = checkpoint_name((q_BTNH, k_BTKH, v_BTKH), QKV)
        if cache is not None:
            k_BTKH = jax.lax.dynamic_update_slice(cache["k"], k_BTKH, (0, start, 0, 0))
            v_BTKH = jax.lax.dynamic_update_slice(cache["v"], v_BTKH, (0, start, 0, 0))
            cache = {"k": k_BTKH, "v": v_BTKH}
        out_BTNH = attention(
            q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BS,
            causal=True, window=layer.get("window"), q_start=start, scale=cfg.scale, blocks=blocks,
            implementation=self.compute.attention,
        )  # fmt: skip
        out_BTD = out_BTNH.reshape(B, T, cfg.num_heads * cfg.head_dim)
        return linear("o_proj", cfg.hidden_size, cfg.o_bias)(out_BTD), cache


def _norm(cfg: DecoderConfig, compute: Compute) -> Callable[..., RMSNorm]:
    return functools.partial(RMSNorm, cfg.epsilon, compute.dtype, cfg.norm_offset, cfg.norm_wide)


class Decoder(nn.Module):
    """Embeddings [B, T, D] to final-normed hidden states [B, T, D]; logits are the caller's."""

    cfg: DecoderConfig
    compute: Compute

    def setup(self) -> None:
        cfg, compute = self.cfg, self.compute
        self.embed_tokens = Embed(cfg.vocab_size, cfg.hidden_size, compute.dtype, compute.lora)
        norm = _norm(cfg, compute)
        behind = ("post_attention_layernorm", "post_feedforward_layernorm")
        make_layer = functools.partial(
            Block,
            norm=norm,
            attention=functools.partial(SelfAttention, cfg, compute),
            mlp=functools.partial(
                GatedMLP, cfg.intermediate_size, cfg.activation, compute, cfg.mlp_bias
            ),
            names=(
                "input_layernorm",
                "pre_feedforward_layernorm" if cfg.norms_behind else "post_attention_layernorm",
                "self_attn",
            ),
            compute=compute,
            behind=behind if cfg.norms_behind else None,
        )
        self.layers = Stack(make_layer, cfg.num_layers, compute.remat)
        self.norm = norm()

    def embed(self, tokens_BT):
        """Return the embeddings [B, T, D] of tokens."""
        x_BTD, scale = self.embed_tokens(tokens_BT), self.cfg.embed_scale
        return x_BTD if scale is None else x_BTD * jnp.asarray(scale, x_BTD.dtype)

    def __call__(self, x_BTD, positions, segments_BT, cache=None, added_ABTD=None, blocks_BT=None):
        """Return `(hidden_BTD, cache)`.

        cache: None, or {"k", "v" [L, B, S, K, H], "segments" [B, S], "start" int32}: the slots
        from start on are written, and attended to along with those before. added_ABTD: added to
        what the first A layers give, or None. blocks_BT: int32, of tokens that see all of their
        own block, which one call holds whole; 0 for none; None: there are no such.
        """
        cos, sin = rope_angles(self.cfg.rope, positions)
        start, keys, blocks = 0, segments_BT, None
        if blocks_BT is not None:
            blocks = (blocks_BT, blocks_BT)
        per_layer: dict[str, Any] = {}
        if self.cfg.windows is not None:
            per_layer["window"] = jnp.asarray(self.cfg.windows, jnp.int32)
        if self.cfg.window_rope is not None:
            windowed = rope_angles(self.cfg.window_rope, positions)
            cos, sin = map(jnp.stack, zip((cos, sin), windowed, strict=True))
            per_layer["rope"] = (per_layer["window"] < UNBOUNDED).astype(jnp.int32)
        if cache is not None:
            start = cache["start"]
            keys = jax.lax.dynamic_update_slice(cache["segments"], segments_BT, (0, start))
            per_layer["cache"] = {"k": cache["k"], "v": cache["v"]}
            if blocks_BT is not None:
                none = jnp.zeros_like(keys)
                blocks = (blocks_BT, jax.lax.dynamic_update_slice(none, blocks_BT, (0, start)))
        context = (cos, sin, segments_BT, keys, start, blocks)
        x_BTD, new = self.layers(x_BTD, context, per_layer, added=added_ABTD)
        if cache is not None:
            cache = {**new, "segments": keys, "start": start + x_BTD.shape[1]}
        return self.norm(x_BTD), cache


def empty_cache(cfg: DecoderConfig, rows: int, slots: int, dtype: Any) -> dict[str, jax.Array]:
    """Return a cache of `slots` slots a row, none of them filled."""
    shape = (cfg.num_layers, rows, slots, cfg.num_kv_heads, cfg.head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "segments": jnp.zeros((rows, slots), jnp.int32),
        "start": jnp.zeros((), jnp.int32),
    }
