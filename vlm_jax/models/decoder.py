"""The decoder that Llama, Mistral and Qwen2 share: pre-norm, rotary, grouped heads, gated MLP.

Letters: B batch, T tokens, S cache slots, D model, N heads, K kv heads, H head dim, L layers.
Module names are Hugging Face's, so a path in the tree is a path in the checkpoint.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.models.decoder_config import DecoderConfig
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.bottleneck import ATTENTION, OUTPUT, Bottleneck, Residual
from vlm_jax.models.layers.linear import Embed, Linear, LoRAScale
from vlm_jax.models.layers.norm import RMSNorm
from vlm_jax.models.layers.rope import apply_rope, rope_angles
from vlm_jax.models.layers.scan import Stack


class SelfAttention(nn.Module):
    """Causal self-attention with grouped key and value heads and rotary positions.

    https://arxiv.org/abs/2305.13245 (grouped heads), https://arxiv.org/abs/2104.09864 (RoPE).
    x_BTD [B, T, D] to ([B, T, D], cache). context: cos and sin [B, T, H], segments of queries
    [B, T] and keys [B, S], and the cache slot of the first query. window: a token's reach in
    tokens, or None. cache: None, or this layer's {"k", "v" [B, S, K, H]}, returned with k and v
    of x written from that slot on.
    """

    cfg: DecoderConfig
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x_BTD, context, window, cache):
        cfg = self.cfg
        cos_BTH, sin_BTH, q_segments_BT, k_segments_BS, start = context
        B, T, _ = x_BTD.shape

        def project(name: str, heads: int) -> jax.Array:
            linear = Linear(heads * cfg.head_dim, cfg.qkv_bias, self.dtype, self.lora, name=name)
            return linear(x_BTD).reshape(B, T, heads, cfg.head_dim)

        q_BTNH = apply_rope(project("q_proj", cfg.num_heads), cos_BTH, sin_BTH)
        k_BTKH = apply_rope(project("k_proj", cfg.num_kv_heads), cos_BTH, sin_BTH)
        v_BTKH = project("v_proj", cfg.num_kv_heads)
        if cache is not None:
            k_BTKH = jax.lax.dynamic_update_slice(cache["k"], k_BTKH, (0, start, 0, 0))
            v_BTKH = jax.lax.dynamic_update_slice(cache["v"], v_BTKH, (0, start, 0, 0))
            cache = {"k": k_BTKH, "v": v_BTKH}
        out_BTNH = attention(
            q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BS,
            causal=True, window=window, q_start=start,
        )  # fmt: skip
        out_BTD = out_BTNH.reshape(B, T, cfg.num_heads * cfg.head_dim)
        o_proj = Linear(cfg.hidden_size, cfg.o_bias, self.dtype, self.lora, name="o_proj")
        return o_proj(out_BTD), cache


class GatedMLP(nn.Module):
    """SwiGLU, https://arxiv.org/abs/2002.05202: [B, T, D] to [B, T, D], of width F between.

    down_proj(activation(gate_proj(x)) * up_proj(x)).
    """

    cfg: DecoderConfig
    dtype: Any
    lora: LoRAScale | None

    @nn.compact
    def __call__(self, x_BTD):
        cfg = self.cfg

        def linear(name: str, features: int) -> Linear:
            return Linear(features, cfg.mlp_bias, self.dtype, self.lora, name=name)

        gate = ACTIVATIONS[cfg.activation](linear("gate_proj", cfg.intermediate_size)(x_BTD))
        up = linear("up_proj", cfg.intermediate_size)(x_BTD)
        return linear("down_proj", cfg.hidden_size)(gate * up)


class DecoderLayer(nn.Module):
    """Pre-norm block of Llama, https://arxiv.org/abs/2302.13971: x_BTD [B, T, D] to (x_BTD, cache).

    x + attention(norm(x)), then x + mlp(norm(x)). context: as in `SelfAttention`. layer: this
    layer's "window" and "cache", where there are such.
    """

    cfg: DecoderConfig
    dtype: Any
    lora: LoRAScale | None
    adapter: Bottleneck | None = None

    @nn.compact
    def __call__(self, x_BTD, context, layer):
        cfg, dtype = self.cfg, self.dtype
        window = layer.get("window")
        normed = RMSNorm(cfg.epsilon, dtype, name="input_layernorm")(x_BTD)
        attended, cache = SelfAttention(cfg, dtype, self.lora, name="self_attn")(
            normed, context, window, layer.get("cache")
        )
        x_BTD = Residual(self.adapter, dtype, name=ATTENTION)(x_BTD, attended)
        normed = RMSNorm(cfg.epsilon, dtype, name="post_attention_layernorm")(x_BTD)
        out = GatedMLP(cfg, dtype, self.lora, name="mlp")(normed)
        return Residual(self.adapter, dtype, name=OUTPUT)(x_BTD, out), cache


class Decoder(nn.Module):
    """Embeddings [B, T, D] to final-normed hidden states [B, T, D]; logits are the caller's."""

    cfg: DecoderConfig
    dtype: Any
    lora: LoRAScale | None
    remat: str
    adapter: Bottleneck | None = None

    def setup(self) -> None:
        cfg = self.cfg
        self.embed_tokens = Embed(cfg.vocab_size, cfg.hidden_size, self.dtype, self.lora)
        make_layer = functools.partial(DecoderLayer, cfg, self.dtype, self.lora, self.adapter)
        self.layers = Stack(make_layer, cfg.num_layers, self.remat)
        self.norm = RMSNorm(cfg.epsilon, self.dtype)

    def __call__(self, x_BTD, positions, segments_BT, cache=None):
        """Return `(hidden_BTD, cache)`.

        cache: None, or {"k", "v" [L, B, S, K, H], "segments" [B, S], "start" int32}: the slots
        from start on are written, and attended to along with those before.
        """
        cos, sin = rope_angles(self.cfg.rope, positions)
        start, keys = 0, segments_BT
        per_layer: dict[str, Any] = {}
        if self.cfg.windows is not None:
            per_layer["window"] = jnp.asarray(self.cfg.windows, jnp.int32)
        if cache is not None:
            start = cache["start"]
            keys = jax.lax.dynamic_update_slice(cache["segments"], segments_BT, (0, start))
            per_layer["cache"] = {"k": cache["k"], "v": cache["v"]}
        context = (cos, sin, segments_BT, keys, start)
        x_BTD, new = self.layers(x_BTD, context, per_layer)
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
