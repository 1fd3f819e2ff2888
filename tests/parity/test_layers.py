"""Layers by themselves against transformers' own: norms, rotary positions, decoders of layers."""

import copy
import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from references import spread
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3RotaryEmbedding
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.glm4v import modeling_glm4v as glm4v
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

from vlm_jax.errors import UserError
from vlm_jax.models import decoder_config
from vlm_jax.models.decoder import Decoder, empty_cache
from vlm_jax.models.layers.block import Compute
from vlm_jax.models.layers.norm import RMSNorm
from vlm_jax.models.layers.rope import apply_rope, rope_angles
from vlm_jax.models.rope_config import rope_from_hf

NORMS = {
    "cast, then scaled": ({}, lambda: Qwen2RMSNorm(13)),
    "scaled in float32, 1 + w": (dict(offset=1.0, wide=True), lambda: Gemma3RMSNorm(13)),
    "scaled in float32": (dict(wide=True), lambda: Gemma4RMSNorm(13)),
    "not scaled": (dict(learned=False), lambda: Gemma4RMSNorm(13, with_scale=False)),
}


@pytest.mark.exact
@pytest.mark.parametrize("name", NORMS)
def test_norms_round_as_the_reference_does(name):
    options, make = NORMS[name]
    generator = torch.Generator().manual_seed(0)
    reference = make().to(torch.bfloat16)
    for parameter in reference.parameters():
        parameter.data.add_(torch.randn(13, generator=generator).bfloat16())
    x = (3 * torch.randn(64, 13, generator=generator)).bfloat16()
    expected = reference(x).detach().float().numpy()
    leaves = {
        name.replace("weight", "scale"): jnp.asarray(parameter.detach().float().numpy())
        for name, parameter in reference.named_parameters()
    }
    norm = RMSNorm(1e-6, jnp.bfloat16, **options)
    y = norm.apply({"params": leaves}, jnp.asarray(x.float().numpy(), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    # One sum of squares in another order moves a number that lies between two of bfloat16.
    assert (np.asarray(y, np.float32) == expected).mean() > 0.99


@pytest.mark.parametrize("options", [options for options, _ in NORMS.values()], ids=NORMS)
def test_a_new_norm_only_normalises(options):
    x = jax.random.normal(jax.random.key(0), (5, 13))
    y, _ = RMSNorm(1e-6, jnp.float32, **options).init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(np.mean(np.square(y), -1), 1, atol=1e-4)


def interleaved_part():
    """Qwen3.5's: a part of each head, by interleaved sections."""
    rope = dict(rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[3, 2, 1])
    config = transformers.Qwen3_5TextConfig(head_dim=24, rope_parameters=dict(rope))
    made = rope_from_hf(
        rope | dict(mrope_interleaved=True), 1e4, 24, 64, "test", partial=True, interleaved=True
    )
    return qwen3_5.Qwen3_5TextRotaryEmbedding(config), qwen3_5.apply_rotary_pos_emb, made


def sections_of_pairs():
    """GLM-4V's: neighbours of a part of each head."""
    rope = dict(rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 3, 1])
    config = transformers.Glm4vTextConfig(
        hidden_size=48, num_attention_heads=2, rope_parameters=dict(rope)
    )
    made = rope_from_hf(rope, 1e4, 24, 64, "test", partial=True, pairs=True)
    return glm4v.Glm4vTextRotaryEmbedding(config), glm4v.apply_rotary_pos_emb, made


ROPES = {"interleaved, a part": interleaved_part, "pairs, a part": sections_of_pairs}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions_are_the_references(name):
    embedding, rotate, rope = ROPES[name]()
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 2, 3, 7, 24)).astype(np.float32)  # [B, N, T, H] each
    positions = rng.integers(0, 40, (2, 3, 7))
    cos, sin = embedding(torch.from_numpy(q), torch.from_numpy(positions).swapaxes(0, 1))
    expected = rotate(torch.from_numpy(q), torch.from_numpy(k), cos, sin)
    angles = rope_angles(rope, positions)
    for x, wanted in zip((q, k), expected, strict=True):
        turned = apply_rope(x.swapaxes(1, 2), *angles, rope.pairs)
        np.testing.assert_allclose(turned.swapaxes(1, 2), wanted, atol=1e-5)  # angles up to 40


def test_proportional_frequencies_are_the_references():
    rope = dict(rope_type="proportional", rope_theta=1e4, partial_rotary_factor=0.3, factor=2.0)
    config = transformers.LlamaConfig(head_dim=22, rope_parameters=dict(rope))
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](config)
    made = rope_from_hf(rope, 1e4, 22, 64, "test", partial=True)
    positions = np.arange(5)[None]
    cos, _ = rope_angles(made, positions)
    np.testing.assert_allclose(cos, np.cos(positions[..., None] * expected.numpy()), atol=1e-6)
    assert (expected == 0).any() and (expected != 0).any()


# Of three layers, the second without a window.
SIZES = dict(
    hidden_size=42, intermediate_size=30, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=14, vocab_size=5, sliding_window=4,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)  # fmt: skip
SCALED = dict(rope_type="linear", factor=8.0)
# How a config.json gives layers with a window a rope of their own.
TWO_ROPES = {
    "nested": dict(
        rope_parameters=dict(
            full_attention=dict(rope_theta=2e4, **SCALED),
            sliding_attention=dict(rope_theta=300.0, rope_type="default"),
        ),
        rope_theta=7.0,
        rope_local_base_freq=7.0,
    ),
    "older": dict(rope_theta=2e4, rope_scaling=SCALED, rope_local_base_freq=300.0),
    "older, by default": dict(rope_scaling=SCALED),
    "both": dict(
        rope_parameters=dict(
            full_attention=dict(rope_theta=2e4, rope_type="linear", factor=2.0),
            sliding_attention=None,
        ),
        rope_scaling=dict(factor=8.0),
        rope_local_base_freq=300.0,
    ),
}


def with_two_ropes(monkeypatch, **more):
    """Return the config of a decoder of Qwen3's layers that turn by two ropes."""
    qwen3 = decoder_config.KINDS["qwen3"]
    defaults = qwen3.defaults | dict(rope_theta=1e6, rope_local_base_freq=1e4)
    kind = dataclasses.replace(qwen3, defaults=defaults, ropes=True)
    monkeypatch.setitem(decoder_config.KINDS, "two ropes", kind)
    raw = SIZES | dict(use_sliding_window=True) | more
    return decoder_config.decoder_from_hf(raw, "two ropes", None, "config.json")


def reference_angles(form, positions):
    """Return (cos, sin) [B, T, H] of each type of layer."""
    config = transformers.Gemma3TextConfig(**SIZES, **copy.deepcopy(TWO_ROPES[form]))
    embedding = Gemma3RotaryEmbedding(config)
    x, positions = torch.zeros(()), torch.from_numpy(positions)
    return {kind: embedding(x, positions, kind) for kind in set(SIZES["layer_types"])}


@pytest.mark.parametrize("form", TWO_ROPES)
def test_two_ropes_are_the_references(monkeypatch, form):
    cfg = with_two_ropes(monkeypatch, **TWO_ROPES[form])
    positions = np.random.default_rng(0).integers(0, 40, (2, 7))
    expected = reference_angles(form, positions)
    ropes = {"full_attention": cfg.rope, "sliding_attention": cfg.window_rope}
    for kind, rope in ropes.items():
        for ours, wanted in zip(rope_angles(rope, positions), expected[kind], strict=True):
            np.testing.assert_allclose(ours, wanted[..., :7], atol=1e-5)  # angles up to 40


def test_without_windows_there_is_one_rope(monkeypatch):
    layer_types = ["full_attention"] * 3
    cfg = with_two_ropes(monkeypatch, **TWO_ROPES["older"] | dict(layer_types=layer_types))
    assert cfg.rope.factor == 8 and cfg.window_rope is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(rope_parameters=SCALED), "hold .'factor', 'rope_type'.; expected an object for each"),
        (dict(rope_parameters=dict(full_attention=3)), "full_attention = 3; expected an object"),
        (
            dict(rope_parameters=dict(sliding_attention=dict(beta=1))),
            r"config.json \(sliding_attention\) hold unknown fields: \['beta'\]",
        ),
        (dict(rope_scaling=dict(full_attention=SCALED)), "unknown fields: .'full_attention'"),
        (dict(rope_local_base_freq=0.0), "rope_local_base_freq = 0.0; expected more than 0"),
    ],
)
def test_what_two_ropes_do_not_know_is_refused(monkeypatch, more, message):
    with pytest.raises(UserError, match=message):
        with_two_ropes(monkeypatch, **more)


def test_layers_with_a_window_turn_by_their_own_rope(monkeypatch):
    cfg = with_two_ropes(monkeypatch, **TWO_ROPES["nested"])
    config = transformers.Qwen3Config(**SIZES, use_sliding_window=True, attn_implementation="eager")
    reference = spread(transformers.Qwen3Model(config), 0)
    B, T = 2, 11
    x = np.random.default_rng(0).normal(size=(B, T, cfg.hidden_size)).astype(np.float32)
    positions = np.tile(np.arange(T), (B, 1))
    angles = reference_angles("nested", positions)
    behind = torch.arange(T)[:, None] - torch.arange(T)
    state = torch.from_numpy(x)
    with torch.no_grad():
        for kind, layer in zip(SIZES["layer_types"], reference.layers, strict=True):
            reach = cfg.windows[0] if kind == "sliding_attention" else T
            mask = torch.where((behind >= 0) & (behind < reach), 0.0, -torch.inf)
            state = layer(state, mask, position_embeddings=angles[kind])
        expected = reference.norm(state).numpy()
    assert expected.std() > 0.5

    decoder, segments = Decoder(cfg, Compute(jnp.float32)), jnp.ones((B, T), jnp.int32)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), x, positions, segments)["params"]
    weights = {name: leaf.detach().numpy() for name, leaf in reference.named_parameters()}

    def taken(path, _):
        stack, *names, leaf = path
        if stack != "layers":
            return weights[f"{stack}.weight"]
        layers = [weights[".".join([stack, str(n), *names, "weight"])] for n in range(3)]
        return np.stack([w.T if leaf == "kernel" else w for w in layers])

    params = flax.traverse_util.path_aware_map(taken, shapes)
    run = jax.jit(lambda *inputs: decoder.apply({"params": params}, *inputs))
    whole, _ = run(x, positions, segments)
    np.testing.assert_allclose(whole, expected, atol=2e-5)

    cache = empty_cache(cfg, B, T, jnp.float32)
    for part in (slice(0, T - 1), slice(T - 1, T)):
        out, cache = run(x[:, part], positions[:, part], segments[:, part], cache)
    np.testing.assert_allclose(out, expected[:, -1:], atol=2e-5)
