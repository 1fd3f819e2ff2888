"""The decoder that Llama, Mistral and Qwen2 share: pre-norm, rotary, grouped heads, gated MLP.

Letters: B batch, T tokens, S cache slots, D model, N heads, K kv heads, H head dim, L layers.
Module names are Hugging Face's, so a path in the tree is a path in the checkpoint.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.hf_config import REQUIRED, Fields
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.attention import attention
from vlm_jax.models.layers.bottleneck import ATTENTION, OUTPUT, Bottleneck, Residual
from vlm_jax.models.layers.linear import Embed, Linear, LoRAScale
from vlm_jax.models.layers.norm import RMSNorm
from vlm_jax.models.layers.rope import Rope, apply_rope, rope_angles, rope_from_hf
from vlm_jax.models.layers.scan import Stack


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. windows: sliding window of each layer in tokens, or None for all."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope: Rope
    windows: tuple[int, ...] | None
    tied: bool


# What a config.json of each decoder may leave out, as the reference's classes define it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=None, rms_norm_eps=1e-6, rope_theta=1e4,
        max_position_embeddings=2048,
    ),
    "mistral": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1e4,
        max_position_embeddings=131072,
    ),
    "qwen2": dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=1e4,
        max_position_embeddings=32768,
    ),
    "qwen2_vl_text": dict(
        vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6,
        max_position_embeddings=32768,
    ),
}  # fmt: skip


# Logical axes of the decoder's parameters (see sharding.py), without the stacked layer axis.
AXES = [
    (r".*/(q|k|v|gate|up)_proj/kernel", ("embed", "wide")),
    (r".*/(o|down)_proj/kernel", ("wide", "embed")),
    (r".*/(q|k|v|gate|up)_proj/bias", ("wide",)),
    (r".*/embed_tokens/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r".*/added", (None, None)),
    (r".*/language_model/.*(scale|bias)", (None,)),
]


def _window(fields: Fields) -> int | None:
    """Return the sliding window; an absent field has its default, but a null means none."""
    absent = fields.peek("sliding_window", REQUIRED) is REQUIRED
    size = fields.size("sliding_window", None)
    return 4096 if absent else size


def _windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int, ...] | None:
    """Return each layer's window as the reference applies it, or None where none has one."""
    if model_type == "llama":
        return None
    if model_type == "mistral":
        size = _window(fields)
        return None if size is None else (int(size),) * num_layers
    size = _window(fields)
    first = fields.take("max_window_layers", {"qwen2": 28}.get(model_type, 80))
    kinds = fields.take("layer_types", None, list)
    if not fields.take("use_sliding_window", False) or size is None:
        size = None
    if kinds is None:
        kinds = [
            "sliding_attention" if size is not None and layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UserError(f"The {fields.where} has the layer types {sorted(unknown)}: not supported.")
    if "sliding_attention" not in kinds:
        return None
    if size is None:
        raise UserError(
            f"The {fields.where} has sliding_attention layers but no sliding window "
            f"(use_sliding_window, sliding_window)."
        )
    everything = 2**30  # longer than any row: a full-attention layer among windowed ones
    return tuple(int(size) if kind == "sliding_attention" else everything for kind in kinds)


def decoder_from_hf(
    raw: dict[str, Any], model_type: str, tied: bool | None, where: str, irrelevant: str = ""
) -> DecoderConfig:
    """Return the sizes in a Hugging Face text config; raise `UserError` naming what is unknown.

    tied: the value at the top level of a nested config.json; either level may tie the head.
    """
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise UserError(
            f"The {where} has a decoder of type '{model_type}', which is not supported; "
            f"supported: {', '.join(DEFAULTS)}."
        )
    fields, defaults = Fields(raw, where, irrelevant), DEFAULTS[model_type]

    def size(name: str) -> Any:
        return fields.size(name, defaults[name])

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    # An absent field has its default, but a null means as many as there are query heads.
    absent = fields.peek("num_key_value_heads", REQUIRED) is REQUIRED
    kv_heads = fields.size("num_key_value_heads", None)
    kv_heads = (defaults["num_key_value_heads"] if absent else kv_heads) or heads
    head_dim = fields.size("head_dim", None) or hidden // heads
    if head_dim % 2:
        raise UserError(
            f"The {where} has heads of {head_dim} numbers; rotary positions turn pairs, so it must "
            f"be even: head_dim, or hidden_size / num_attention_heads."
        )
    if heads % kv_heads:
        raise UserError(
            f"The {where} has {heads} query heads on {kv_heads} key and value heads: the latter "
            f"must divide the former."
        )
    layers, longest = size("num_hidden_layers"), size("max_position_embeddings")
    theta = fields.take("rope_theta", defaults["rope_theta"])
    scaling = fields.take("rope_scaling", None, dict)
    rope = rope_from_hf(
        fields.take("rope_parameters", None, dict) or scaling, theta, head_dim, longest, where
    )
    if model_type == "qwen2_vl_text" and not rope.mrope_section:
        raise UserError(f"The {where} lacks mrope_section in its rope parameters.")
    fields.require("attention_dropout", (0.0, 0), 0.0)
    is_qwen = model_type.startswith("qwen2")
    llama_bias = model_type == "llama" and fields.take("attention_bias", False)
    config = DecoderConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        epsilon=fields.positive("rms_norm_eps", defaults["rms_norm_eps"]),
        activation=fields.require("hidden_act", tuple(ACTIVATIONS), "silu"),
        qkv_bias=is_qwen or bool(llama_bias),
        o_bias=bool(llama_bias),
        mlp_bias=bool(model_type == "llama" and fields.take("mlp_bias", False)),
        rope=rope,
        windows=_windows(fields, model_type, layers),
        tied=bool(fields.take("tie_word_embeddings", False) or tied),
    )
    fields.finish()
    return config


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
