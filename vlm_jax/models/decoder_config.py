"""The sizes of a decoder, read from a Hugging Face text config; `decoder` computes with them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError, refuse
from vlm_jax.models.hf_config import ACTIVATION_NAMES, Fields, entry
from vlm_jax.models.rope_config import Rope, rope_from_hf

UNBOUNDED = 2**30  # the window of a full-attention layer among windowed ones: longer than any row


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    windows: sliding window of each layer in tokens, `UNBOUNDED` of one without, or None for all.
    qk_norm: whether queries and keys are normalised, each head by itself, before they turn.
    window_rope: how layers with a window turn; None: as the others. norm_offset, norm_wide: see
    `layers.norm.RMSNorm`. norms_behind: whether attention and MLP are normalised once more before
    they are added. scale: of attention's scores; None: 1 / sqrt(head_dim). embed_scale: of token
    embeddings, not of image features; None: 1.
    """

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
    qk_norm: bool = False
    window_rope: Rope | None = None
    norm_offset: float = 0.0
    norm_wide: bool = False
    norms_behind: bool = False
    scale: float | None = None
    embed_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the reference's classes of a text model_type fix.

    defaults: of fields that a config.json may leave out. qkv_bias: whether queries, keys and values
    have biases; None: whether the field attention_bias says so, of the output too. mlp_bias:
    whether there is a field of that name. windows: "none", "all" layers, the "late" ones from
    max_window_layers on, or all but each sixth by a "pattern". sections: of positions of three
    axes, how many frequencies turn with each where mrope_section is missing; () of one axis.
    interleaved: see `Rope`. ropes: whether layers with a window have a rope of their own, by
    rope_parameters["sliding_attention"] or, in 4.x, rope_local_base_freq, which `defaults` then
    holds too. gemma: whether norms multiply by 1 + the weight in float32 and stand behind attention
    and MLP too, embeddings are scaled by sqrt(hidden_size), and fields have Gemma's names.
    """

    defaults: dict[str, Any]
    qkv_bias: bool | None
    windows: str
    mlp_bias: bool = False
    qk_norm: bool = False
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    ropes: bool = False
    gemma: bool = False


KINDS = {
    "llama": Kind(
        dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6,
            rope_theta=1e4, max_position_embeddings=2048,
        ),
        qkv_bias=None, windows="none", mlp_bias=True,
    ),
    "mistral": Kind(
        dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, head_dim=None, rms_norm_eps=1e-6,
            rope_theta=1e4, max_position_embeddings=131072,
        ),
        qkv_bias=False, windows="all",
    ),
    "qwen2": Kind(
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, head_dim=None, rms_norm_eps=1e-6,
            rope_theta=1e4, max_position_embeddings=32768, max_window_layers=28,
        ),
        qkv_bias=True, windows="late",
    ),
    "qwen2_vl_text": Kind(
        dict(
            vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8, head_dim=None, rms_norm_eps=1e-5,
            rope_theta=1e6, max_position_embeddings=32768, max_window_layers=80,
        ),
        qkv_bias=True, windows="late", sections=(16, 24, 24),
    ),
    "qwen3": Kind(
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-6,
            rope_theta=1e4, max_position_embeddings=32768, max_window_layers=28,
        ),
        qkv_bias=None, windows="late", qk_norm=True,
    ),
}  # fmt: skip
KINDS["qwen2_5_vl_text"] = KINDS["qwen2_vl_text"]
KINDS["qwen3_vl_text"] = Kind(
    dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-6,
        rope_theta=5e5, max_position_embeddings=128000,
    ),
    qkv_bias=None, windows="none", qk_norm=True, sections=(24, 20, 20), interleaved=True,
)  # fmt: skip
KINDS["gemma3_text"] = Kind(
    dict(
        vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6,
        rope_theta=1e6, rope_local_base_freq=1e4, max_position_embeddings=131072,
        query_pre_attn_scalar=256.0, hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    qkv_bias=None, windows="pattern", qk_norm=True, ropes=True, gemma=True,
)  # fmt: skip


# Logical axes of the decoder's parameters (see sharding.py), without the stacked layer axis.
AXES = [
    (r".*/(q|k|v|gate|up)_proj/kernel", ("embed", "wide")),
    (r".*/(o|down)_proj/kernel", ("wide", "embed")),
    (r".*/(q|k|v|gate|up)_proj/bias", ("wide",)),
    (r".*/embed_tokens/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r".*/added", (None, None)),
    (r"model/\w+/(layers/.*|norm/)(scale|bias)", (None,)),
]


def _windows(fields: Fields, where: str, num_layers: int) -> tuple[int, ...] | None:
    """Return each layer's window as the reference applies it, or None where none has one."""
    if where == "none":  # as a config.json may say in the fields of models that have windows
        if fields.require("use_sliding_window", (False, None), None) is False:
            fields.known |= {"sliding_window", "max_window_layers"}
        _layer_types(fields, {"full_attention"})
        return None
    size = fields.size("sliding_window", 4096, null=True)
    if where == "all":
        return None if size is None else (int(size),) * num_layers
    kinds = _layer_types(fields, {"sliding_attention", "full_attention"})
    if where == "pattern":
        every = fields.size("sliding_window_pattern", 6)
        windowed = [bool((layer + 1) % every) for layer in range(num_layers)]
    else:
        first = fields.take("max_window_layers")
        if not fields.take("use_sliding_window", False):
            size = None
        windowed = [size is not None and layer >= first for layer in range(num_layers)]
    if kinds is None:
        kinds = ["sliding_attention" if one else "full_attention" for one in windowed]
    if "sliding_attention" not in kinds:
        return None
    if size is None:
        raise UserError(
            f"The {fields.where} has sliding_attention layers but no sliding window "
            f"(use_sliding_window, sliding_window)."
        )
    return tuple(int(size) if kind == "sliding_attention" else UNBOUNDED for kind in kinds)


def _ropes(fields: Fields, kind: Kind, head_dim: int) -> tuple[Rope, Rope | None]:
    """Return how layers turn, and how those with a window do, or None where they turn alike."""
    newer = fields.take("rope_parameters", None, dict) or {}
    older = fields.take("rope_scaling", None, dict) or {}
    theta, longest = fields.take("rope_theta"), fields.size("max_position_embeddings")

    def read(given: Mapping[str, Any], theta: float, where: str) -> Rope:
        if kind.sections:
            given = {"mrope_section": kind.sections, **given}
        rope = rope_from_hf(given, theta, head_dim, longest, where, interleaved=kind.interleaved)
        if kind.sections and not rope.mrope_section:
            raise UserError(f"The {where} lacks mrope_section in its rope parameters.")
        return rope

    if not kind.ropes:
        return read(older or newer, theta, fields.where), None  # in transformers' order
    nested = Fields(newer, f"{fields.where}, rope_parameters")
    full, sliding = "full_attention", "sliding_attention"
    of = {name: nested.take(name, None, dict) or {} for name in (full, sliding)}
    if nested.fields:
        raise UserError(
            f"The rope_parameters of the {fields.where} hold {sorted(nested.fields)}; expected an "
            f"object for each of {full} and {sliding}, and nothing else."
        )
    # In transformers rope_scaling is of full layers alone, and goes before each field of theirs.
    return (
        read({**of[full], **older}, theta, f"{fields.where} ({full})"),
        read(of[sliding], fields.positive("rope_local_base_freq"), f"{fields.where} ({sliding})"),
    )


def _layer_types(fields: Fields, known: set[str]) -> list[str] | None:
    """Return the field layer_types; raise `UserError` for others than the known ones."""
    kinds = fields.take("layer_types", None, list)
    unknown = [kind for kind in kinds or () if kind not in known]
    if unknown:
        raise UserError(f"The {fields.where} has layer_types {unknown[0]!r}: not supported.")
    return kinds


def decoder_from_hf(
    raw: dict[str, Any], model_type: str, tied: bool | None, where: str, irrelevant: str = ""
) -> DecoderConfig:
    """Return the sizes in a Hugging Face text config; raise `UserError` naming what is unknown.

    tied: the value at the top level of a nested config.json; either level may tie the head.
    """
    kind = entry(KINDS, model_type, where)
    fields = Fields(raw, where, irrelevant, kind.defaults)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    # A null means as many as there are query heads.
    kv_heads = fields.size("num_key_value_heads", null=True) or heads
    head_dim = fields.size("head_dim", null=True) or hidden // heads
    refuse(
        (
            head_dim % 2,
            f"The {where} has heads of {head_dim} numbers; rotary positions turn pairs, so it must "
            f"be even: head_dim, or hidden_size / num_attention_heads.",
        ),
        (
            heads % kv_heads,
            f"The {where} has {heads} query heads on {kv_heads} key and value heads: the latter "
            f"must divide the former.",
        ),
    )
    rope, window_rope = _ropes(fields, kind, head_dim)
    fields.require("attention_dropout", (0.0, 0), 0.0)
    layers = fields.size("num_hidden_layers")
    windows = _windows(fields, kind.windows, layers)
    bias = bool(kind.qkv_bias is None and fields.take("attention_bias", False))
    more: dict[str, Any] = {}
    if kind.gemma:
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            fields.require(name, (None,), None)
        fields.require("use_bidirectional_attention", (False, None), None)
        more = dict(
            norm_offset=1.0,
            norm_wide=True,
            norms_behind=True,
            scale=fields.positive("query_pre_attn_scalar") ** -0.5,
            embed_scale=hidden**0.5,
        )
    activation = "hidden_activation" if kind.gemma else "hidden_act"
    return fields.finish(
        DecoderConfig(
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            epsilon=fields.positive("rms_norm_eps"),
            activation=fields.require(activation, ACTIVATION_NAMES, "silu"),
            qkv_bias=bool(kind.qkv_bias or bias),
            o_bias=bias,
            mlp_bias=bool(kind.mlp_bias and fields.take("mlp_bias", False)),
            rope=rope,
            windows=windows,
            tied=bool(fields.take("tie_word_embeddings", False) or tied),
            qk_norm=kind.qk_norm,
            window_rope=window_rope if windows else None,
            **more,
        )
    )


def flat_or_nested(top: Fields, model_type: str, irrelevant: str) -> DecoderConfig:
    """Return the decoder of a config.json with its fields at the top (4.x), nested, or in both.

    top: what no one else takes of it, consumed.
    """
    tied, text = top.take("tie_word_embeddings", False), top.take("text_config", None, dict)
    if text is None:
        return decoder_from_hf(top.fields, model_type, tied, "config.json", irrelevant)
    return nested(top, text, model_type, tied, irrelevant)


def nested(
    top: Fields, text: Mapping[str, Any], model_type: str, tied: bool | None, irrelevant: str = ""
) -> DecoderConfig:
    """Return the decoder of a text_config.

    top: what no one else takes of config.json, consumed. Raises `UserError` where its copies of
    nested fields would make another decoder: transformers reads the nested ones since 4.52 and the
    top level before. Where both describe one decoder, as a sliding window does that nothing uses,
    there is nothing to choose.
    """

    def read(fields: Mapping[str, Any]) -> DecoderConfig:
        where = "config.json, text_config"
        return decoder_from_hf(dict(fields), model_type, tied, where, irrelevant)

    copies = top.drop_copies(text)  # 4.52 and later wrote the decoder's fields twice
    top.finish()
    decoder = read(text)
    try:
        same = not copies or read({**text, **copies}) == decoder
    except UserError:
        same = False
    if not same:
        differ = ", ".join(
            f"'{name}' (as {value!r} and nested as {text[name]!r})"
            for name, value in copies.items()
        )
        raise UserError(
            f"The config.json gives {differ} twice, at the top and in text_config, and the two "
            f"describe different decoders. transformers reads text_config since 4.52 and the top "
            f"level before: delete the wrong ones."
        )
    return decoder
