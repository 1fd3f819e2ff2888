"""Layers by themselves against transformers' own: norms and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.glm4v import modeling_glm4v as glm4v
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

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
