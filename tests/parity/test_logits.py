"""Logits, greedy tokens and the round trip of every family against transformers, float32."""

import json

import numpy as np
import pytest
import torch
from references import (
    LAYOUTS,
    gemma3,
    gemma3_inputs,
    llava,
    llava_inputs,
    our_logits,
    quiet,
    qwen2_5_vl,
    qwen2_5_vl_inputs,
    qwen2_vl,
    qwen2_vl_inputs,
    qwen3_vl,
    qwen3_vl_inputs,
    tensors,
)
from safetensors.numpy import load_file
from transformers import LlavaForConditionalGeneration

import vlm_jax

TOLERANCE = 1e-4


def check(reference, model, params, inputs, **reference_only):
    with torch.no_grad(), quiet():
        expected = reference(**tensors(inputs), **tensors(reference_only)).logits.numpy()
    real = inputs["attention_mask"] == 1
    assert expected[real].std() > 0.5, "the reference's logits are too flat to compare"
    logits = our_logits(model, params, inputs)
    np.testing.assert_allclose(logits[real], expected[real], atol=TOLERANCE, rtol=0)


def check_generation(reference, model, params, inputs, new_tokens=12):
    """Compare greedy ids up to where the reference's best two logits are within 1e-3."""
    with torch.no_grad(), quiet():
        out = reference.generate(
            **tensors(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=11,
            output_logits=True,
            return_dict_in_generate=True,
        )
    start = inputs["input_ids"].shape[1]
    expected = out.sequences[:, start:].numpy()
    best = torch.stack(out.logits, 1).topk(2).values
    clear = (best[..., 0] - best[..., 1] > 1e-3).numpy().cumprod(axis=1).astype(bool)
    ids = vlm_jax.generate(
        model, params, model.batch(**inputs), new_tokens, eos_token_id=11, pad_token_id=0
    )
    assert ids.shape == (len(expected), new_tokens) and ids.dtype == np.int32
    assert clear.mean() > 0.5
    ids = ids[:, : expected.shape[1]]
    np.testing.assert_array_equal(ids[clear], expected[clear])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen2_vl")
    return qwen2_vl(directory), *vlm_jax.load(directory)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qwen2_vl_logits(qwen, layout, left):
    check(*qwen, qwen2_vl_inputs(layout, left))


@pytest.mark.parametrize("layout", ["images of different sizes", "mixed"])
def test_qwen2_vl_generates_the_same_ids(qwen, layout):
    check_generation(*qwen, qwen2_vl_inputs(layout, left=True))


def test_padding_side_does_not_change_generation(qwen):
    _, model, params = qwen
    left, right = (
        vlm_jax.generate(model, params, model.batch(**qwen2_vl_inputs("mixed", side)), 6)
        for side in (True, False)
    )
    np.testing.assert_array_equal(left, right)


def test_a_row_ends_with_its_eos_and_is_then_padded(qwen):
    _, model, params = qwen
    batch = model.batch(**qwen2_vl_inputs("mixed", left=True))
    free = vlm_jax.generate(model, params, batch, 12, eos_token_id=())
    eos = int(free[0, 4])
    ended = vlm_jax.generate(model, params, batch, 12, eos_token_id=eos, pad_token_id=1)
    expected = np.where(np.cumsum(free == eos, axis=1) - (free == eos) > 0, 1, free)
    np.testing.assert_array_equal(ended, expected)
    assert (ended[0, 5:] == 1).all() and (free[0, 5:] != 1).any()


@pytest.mark.parametrize(
    ("text", "top"),
    [
        (dict(tie_word_embeddings=True), dict(tie_word_embeddings=True)),
        (dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), {}),
    ],
    ids=["tied head", "sliding window"],
)
def test_qwen2_vl_variants(tmp_path, text, top):
    reference = qwen2_vl(tmp_path, 1, text=text, **top)
    check(reference, *vlm_jax.load(tmp_path), qwen2_vl_inputs("mixed"))


@pytest.fixture(scope="module")
def qwen25(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen2_5_vl")
    return qwen2_5_vl(directory), *vlm_jax.load(directory)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qwen2_5_vl_logits(qwen25, layout, left):
    check(*qwen25, qwen2_5_vl_inputs(layout, left))


def test_qwen2_5_vl_generates_the_same_ids(qwen25):
    check_generation(*qwen25, qwen2_5_vl_inputs("mixed", left=True))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3_vl")
    return qwen3_vl(directory), *vlm_jax.load(directory)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qwen3_vl_logits(qwen3, layout, left):
    check(*qwen3, qwen3_vl_inputs(layout, left))


def test_qwen3_vl_generates_the_same_ids(qwen3):
    check_generation(*qwen3, qwen3_vl_inputs("mixed", left=True))


@pytest.mark.parametrize(
    ("make", "inputs", "more"),
    [
        (
            qwen2_5_vl, qwen2_5_vl_inputs,
            dict(
                text=dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
                vision=dict(
                    fullatt_block_indexes=[], patch_size=5, window_size=24, hidden_act="gelu"
                ),
                tie_word_embeddings=True,
            ),
        ),
        (
            qwen3_vl, qwen3_vl_inputs,
            dict(
                text=dict(
                    attention_bias=True,
                    num_key_value_heads=4,
                    rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4),
                ),
                vision=dict(deepstack_visual_indexes=[]),
                tie_word_embeddings=True,
            ),
        ),
    ],
    ids=["qwen2_5_vl", "qwen3_vl"],
)  # fmt: skip
def test_what_else_configs_of_newer_families_say(tmp_path, make, inputs, more):
    reference = make(tmp_path, 1, **more)
    given = inputs("mixed")
    side = more["vision"].get("patch_size", 4)
    rng = np.random.default_rng(9)
    for name in ("pixel_values", "pixel_values_videos"):
        given[name] = rng.normal(size=(len(given[name]), 6 * side**2)).astype(np.float32)
    check(reference, *vlm_jax.load(tmp_path), given)


LLAVAS = {
    "clip llama default": ("clip", "llama", dict(vision_feature_layer=-2)),
    "siglip qwen2 full": (
        "siglip", "qwen2",
        dict(vision_feature_layer=-1, vision_feature_select_strategy="full"),
    ),
    "clip mistral list": (
        "clip", "mistral",
        dict(
            vision_feature_layer=[-2, 1, 0],
            vision_feature_select_strategy="full",
            multimodal_projector_bias=False,
        ),
    ),
    "siglip llama list": (
        "siglip", "llama",
        dict(vision_feature_layer=[-1, -3], projector_hidden_act="gelu_new"),
    ),
    "clip qwen3 default": ("clip", "qwen3", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LLAVAS)
def test_llava_logits_and_generation(tmp_path, name):
    tower, text, top = LLAVAS[name]
    reference = llava(tmp_path, tower, text, **top)
    model, params = vlm_jax.load(tmp_path)
    per_image = model.config.image_tokens()
    for left in (False, True):
        inputs = llava_inputs(per_image, left)
        check(reference, model, params, inputs)
    check_generation(reference, model, params, inputs)


ROPES = {
    "linear": dict(rope_type="linear", factor=3.0),
    "dynamic, beyond": dict(rope_type="dynamic", factor=3.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling(tmp_path, name):
    extra = dict(
        rope_parameters=dict(rope_theta=1e4, **ROPES[name]),
        max_position_embeddings=12 if "beyond" in name else 32,
    )
    reference = llava(tmp_path, "clip", "llama", extra=extra)
    model, params = vlm_jax.load(tmp_path)
    check(reference, model, params, llava_inputs(4))


def test_rope_scaling_goes_before_rope_parameters(tmp_path):
    llava(tmp_path, "clip", "llama")
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["text_config"]["rope_scaling"] = dict(rope_type="linear", factor=3.0, rope_theta=300.0)
    path.write_text(json.dumps(raw))
    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert reference.config.text_config.rope_parameters["rope_theta"] == 300
    check(reference, *vlm_jax.load(tmp_path), llava_inputs(4))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma3")
    return gemma3(directory), *vlm_jax.load(directory)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("layout", ["mixed", "text"])
def test_gemma3_logits(gemma, layout, left):
    check(*gemma, gemma3_inputs(layout, left))


def test_gemma3_generates_the_same_ids(gemma):
    check_generation(*gemma, gemma3_inputs(left=True))


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava clip", "llava siglip"]
)
def test_save_is_the_identity_and_loads_in_transformers(tmp_path, family):
    base, out = tmp_path / "base", tmp_path / "out"
    made = {
        "qwen2_vl": qwen2_vl,
        "qwen2_5_vl": qwen2_5_vl,
        "qwen3_vl": qwen3_vl,
        "gemma3": gemma3,
    }
    if family in made:
        reference = made[family](base)
    else:
        reference = llava(base, family.split()[1], "qwen2")
    model, params = vlm_jax.load(base)
    vlm_jax.save_pretrained(model, params, out)
    before, after = (load_file(d / "model.safetensors") for d in (base, out))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    _, info = type(reference).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
