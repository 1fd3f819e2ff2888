"""Checkpoints that transformers quantized to 4 bits: read, computed with, written back."""

import json

import numpy as np
import pytest
import torch
from references import llava, llava_inputs, our_logits, quiet, tensors
from references_4bit import OUTSIDE, four_bit, layers_4bit, make_dense
from safetensors.numpy import load_file
from test_peft import MADE

import vlm_jax
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit
from vlm_jax.weights.bnb import SUFFIXES, weight_of

KINDS = {
    "nf4-dq": ("nf4-dq", None),
    "fp4": ("fp4", None),
    "nf4 but fc1": ("nf4", ["lm_head", "fc1"]),
    "nf4 in part": ("nf4", [*OUTSIDE, "q_proj"]),
}


def base(family, directory):
    if family in MADE:
        return MADE[family][0](directory)
    if family == "siglip":  # its head, which nothing here reads, has linear layers
        return llava(directory, "siglip", "qwen2")
    return llava(directory, "clip", "llama")


def inputs_for(model):
    family = model.hf_config["model_type"]
    if family in MADE:
        return MADE[family][1]("mixed")
    return llava_inputs(model.config.image_tokens())


def their_logits(reference, inputs):
    with torch.no_grad(), quiet():
        return reference.eval()(**tensors(inputs)).logits.numpy()


def read_back(cls, directory, **options):
    """Return transformers' model of a directory; every key must have its place."""
    with quiet():
        model, info = cls.from_pretrained(
            directory, output_loading_info=True, dtype=torch.float32, **options
        )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def assert_equal_codes(one, other):
    one, other = layers_4bit(one), layers_4bit(other)
    assert one.keys() == other.keys() and one
    for name, layer in one.items():
        mine, state = layer.weight, other[name].weight.quant_state
        assert torch.equal(mine.data.view(-1), other[name].weight.data.view(-1)), name
        assert torch.equal(mine.quant_state.absmax, state.absmax), name
        if state.nested:
            assert torch.equal(mine.quant_state.state2.absmax, state.state2.absmax), name
            assert mine.quant_state.offset == state.offset, name


def assert_near(logits, expected, inputs):
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(
            (family, kind)
            for family in ("qwen2_vl", "llava")
            for kind in ("nf4-dq", "fp4", "nf4 in part")
        ),
        *(("siglip", "nf4-dq"), ("siglip", "nf4 but fc1")),
        *(("qwen2_5_vl", "nf4-dq"), ("qwen3_vl", "nf4-dq"), ("gemma3", "nf4-dq")),
    ],
)
def test_in_and_out(tmp_path, family, kind):
    dense = base(family, tmp_path / "base")
    reference = four_bit(type(dense), tmp_path / "base", *KINDS[kind])
    reference.save_pretrained(tmp_path / "4bit")
    model, params = vlm_jax.load(tmp_path / "4bit")
    flat = flatten(params)
    leaves = [leaf for leaf in flat.values() if isinstance(leaf, FourBit)]
    assert leaves and any(not leaf.aligned for leaf in leaves)
    if kind == "nf4 in part":
        assert not isinstance(flat["model/language_model/layers/self_attn/q_proj/kernel"], FourBit)
        assert len(leaves) == 6

    vlm_jax.save_pretrained(model, params, tmp_path / "written")
    theirs = load_file(tmp_path / "4bit" / "model.safetensors")
    ours = load_file(tmp_path / "written" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if weight_of(name) is None or name.endswith(SUFFIXES):
            np.testing.assert_array_equal(ours[name], tensor, name)
        else:  # JSON
            one, other = (json.loads(bytes(x)) for x in (ours[name], tensor))
            assert one == other, name
    again = read_back(type(dense), tmp_path / "written")
    assert_equal_codes(again, reference)

    inputs = inputs_for(model)
    expected = their_logits(make_dense(reference), inputs)
    assert_near(our_logits(model, params, inputs), expected, inputs)
    np.testing.assert_array_equal(their_logits(make_dense(again), inputs), expected)
    assert np.abs(their_logits(dense, inputs) - expected).max() > 0.05, "quantized at all"

    vlm_jax.save_pretrained(model, params, tmp_path / "dense", quantized=False)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    plain = read_back(type(dense), tmp_path / "dense")
    assert not layers_4bit(plain)
    assert_near(their_logits(plain, inputs), expected, inputs)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen2_vl", "nf4-dq"),
        ("llava", "fp4"),
        ("qwen2_5_vl", "nf4-dq"),
        ("qwen3_vl", "fp4"),
    ],
)
def test_quantized_here_and_loaded_there(tmp_path, family, kind):
    """What is quantized while loading is what transformers makes of the same base."""
    dense = base(family, tmp_path / "base")
    model, params = vlm_jax.load(tmp_path / "base", quantize=kind)
    vlm_jax.save_pretrained(model, params, tmp_path / "written")
    skip = json.loads((tmp_path / "written/config.json").read_text())["quantization_config"][
        "llm_int8_skip_modules"
    ]
    reference = four_bit(type(dense), tmp_path / "base", kind, skip)
    again = read_back(type(dense), tmp_path / "written")
    names = layers_4bit(reference)
    assert names.keys() == layers_4bit(again).keys()
    assert len(names) == 7 * model.config.text.num_layers
    assert all("language_model" in name for name in names)
    for name, layer in names.items():
        other = layers_4bit(again)[name].weight
        assert torch.equal(layer.weight.data.view(-1), other.data.view(-1)), name
    inputs = inputs_for(model)
    logits = our_logits(model, params, inputs)
    assert_near(their_logits(make_dense(again), inputs), logits, inputs)
    assert_near(their_logits(make_dense(reference), inputs), logits, inputs)
