"""LoRA's kin against peft: ranks, scales and layers that differ, biases, embeddings."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from references import quiet, qwen2_vl_inputs, tensors
from safetensors.numpy import load_file
from test_peft import assert_equal_logits, assert_twenty_equal_steps, build, to_legacy

import vlm_jax
from vlm_jax.adapters.targets import slots
from vlm_jax.trees import flatten, join, unflatten

NUMBERED = r"layers\.0\.self_attn\.q_proj"
# What our LoRA says -> what peft's LoraConfig says for the same.
KINDS = {
    "ranks by module": dict(rank_pattern={"q_proj": 5, "down_proj": 1}),
    "ranks by layer": dict(rank_pattern={NUMBERED: 5, r"layers.1.mlp.*": 2}),
    "alphas": dict(alpha_pattern={NUMBERED: 2, "v_proj": 9}),
    "both, rsLoRA": dict(rank_pattern={NUMBERED: 5}, alpha_pattern={"q_proj": 2}, rslora=True),
    "some layers": dict(layers_to_transform=(1,)),
    "some layers and the head": dict(
        layers_to_transform=(1,),
        targets=("q_proj", "lm_head", "model.language_model.layers.0.mlp.up_proj"),
    ),
    "excluded": dict(exclude_modules=("layers.0.mlp.up_proj", "k_proj")),
    "the tower excluded": dict(exclude_modules=r".*(visual|merger).*"),
    "excluded by regex": dict(exclude_modules=r".*layers\.1\..*(q|k)_proj"),
    "some layers' DoRA": dict(layers_to_transform=(0,), dora=True),
    "DoRA's ranks": dict(rank_pattern={NUMBERED: 4}, dora=True),
}
NAMES = {"rslora": "use_rslora", "dora": "use_dora", "targets": "target_modules"}


def peft_config(kind, **more):
    """Return peft's config of the same meaning."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in kind.items()}
    return LoraConfig(r=3, lora_alpha=5, **{NAMES.get(k, k): v for k, v in plain.items()}, **more)


LANGUAGE = dict(
    q_proj=1, k_proj=1, v_proj=1, o_proj=1, gate_proj=1, up_proj=1, down_proj=1
)  # LLaVA's tower has layers of these names: peft is given the language model's alone


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def pair(request, tmp_path_factory):
    """Return a function to a fresh reference, (model, params, inputs) and the base's logits."""
    directory = tmp_path_factory.mktemp(request.param)
    reference, model, params, inputs = build(request.param, directory)
    batch = model.batch(**inputs)
    apply = jax.jit(lambda params: model.apply({"params": params}, batch))  # compiled once
    return lambda: copy.deepcopy(reference), model, params, inputs, lambda p: np.asarray(apply(p))


@pytest.mark.parametrize("pair", ["qwen2_vl"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_modules_ranks_and_scales_as_peft(tmp_path, pair, kind):
    """What peft makes of a config, we make of its like: module by module."""
    fresh, model, params, *_ = pair
    lora = vlm_jax.LoRA(3, 5, **{"targets": "llama", **KINDS[kind]})
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    ours = {
        name: tensor.shape
        for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
    }
    with quiet():
        adapted = get_peft_model(fresh(), peft_config({"targets": list(LANGUAGE), **KINDS[kind]}))
    theirs = {
        name.replace(".default", "").replace("_vector.weight", "_vector"): tuple(tensor.shape)
        for name, tensor in adapted.named_parameters()
        if ".lora_" in name
    }
    assert ours == theirs
    scales = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in adapted.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    own = {
        slot.module: slot.scale
        for path in flatten(params)
        if path.endswith("/lora_A")
        for slot in slots(model, model.lora, path)
        if slot.rank
    }
    assert own == pytest.approx(scales)


ALL = {
    "all at once": dict(
        rank_pattern={NUMBERED: 5, r"layers.1.mlp.*": 2},
        alpha_pattern={NUMBERED: 2, "v_proj": 9},
        exclude_modules=("layers.0.mlp.up_proj", "k_proj"),
        rslora=True,
    ),
    "DoRA": dict(layers_to_transform=(0,), rank_pattern={"q_proj": 4}, dora=True),
}


@pytest.mark.parametrize("kind", ALL)
def test_our_adapter_in_peft_and_back(tmp_path, pair, kind):
    fresh, model, params, inputs, apply = pair
    base = model, params
    lora = vlm_jax.LoRA(3, 5, targets="llama", **ALL[kind])
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    params = trained(params)
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    with quiet():
        adapted = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert_equal_logits(adapted, model, params, inputs)
    again, read = vlm_jax.load_peft(*base, tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, dict(read), dict(params))
    vlm_jax.save_peft(again, read, tmp_path / "twice")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        once, twice = ((tmp_path / d / name).read_bytes() for d in ("adapter", "twice"))
        assert json.loads(once) == json.loads(twice) if "json" in name else once == twice
    merged = apply(vlm_jax.merge(model, params))
    assert np.abs(merged - apply(base[1])).max() > 0.1
    real = inputs["attention_mask"] == 1
    with torch.no_grad(), quiet():
        expected = adapted.eval()(**tensors(inputs)).logits.numpy()
    np.testing.assert_allclose(merged[real], expected[real], atol=1e-4)


def trained(params, size=0.3):
    """Return the tree after some steps: B moved where it may move, and DoRA's norms."""
    flat, rng = flatten(params), np.random.default_rng(0)
    for path in [path for path in flat if path.endswith("/lora_B")]:
        lives = np.asarray(flat[path.replace("lora_B", "lora_A")]).any(-2)
        flat[path] = flat[path] + size * rng.normal(size=flat[path].shape) * lives[..., None]
        flat[path] = flat[path].astype(np.float32)
        norms = path.replace("lora_B", "lora_magnitude")
        if norms in flat:
            flat[norms] = flat[norms] * np.where(lives.any(-1), 1.1, 1)[..., None]
    return unflatten(flat)


TRAINED = {
    "ranks, scales, embedding, head": dict(
        targets=(*LANGUAGE, "embed_tokens", "lm_head"),
        rank_pattern={NUMBERED: 5, r"layers.1.mlp.*": 1},
        alpha_pattern={NUMBERED: 2, "embed_tokens": 9},
        bias="lora_only",
    ),
    "one layer's DoRA, all biases": dict(
        targets="llama", layers_to_transform=(1,), dora=True, bias="all"
    ),
}


@pytest.mark.parametrize("pair", ["qwen2_vl"], indirect=True)
@pytest.mark.parametrize("kind", TRAINED)
def test_ten_steps(tmp_path, pair, kind):
    """Zeros that fill up ranks stay zero, with decay too, and all else trains as in torch."""
    fresh, model, params, *_ = pair
    inputs = qwen2_vl_inputs("one image")
    lora = vlm_jax.LoRA(3, 5, modules_to_save=("projector",), **TRAINED[kind])
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    params = trained(params, 0.03)
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    with quiet():
        twin = PeftModel.from_pretrained(fresh(), tmp_path / "adapter", is_trainable=True)
    for name, parameter in twin.named_parameters():  # our recipe freezes the tower, biases too
        if name.endswith(".bias") and ".visual." in name and "modules_to_save" not in name:
            parameter.requires_grad = False
    with_bias = [n for n, p in twin.named_parameters() if n.endswith("bias") and p.requires_grad]
    assert len([n for n in with_bias if "q_proj" in n]) == 2
    labels = np.where(inputs["input_ids"] < 180, inputs["input_ids"], -100)
    labels = np.where(inputs["attention_mask"] == 1, labels, -100)
    state = assert_twenty_equal_steps(twin, model, params, inputs, labels, recipe={}, steps=10)
    flat = flatten(state)
    assert not any("lora_scale" in path for path in flat)
    lacking = 0
    for path in [path for path in flat if path.endswith("/lora_A")]:
        for slot in slots(model, model.lora, path):
            own = () if slot.layer is None else (slot.layer,)
            a, b = flat[path][own], flat[path.replace("lora_A", "lora_B")][own]
            assert not a[:, slot.rank :].any() and not b[slot.rank :].any()
            assert a[:, : slot.rank].any(0).all() and b[: slot.rank].any(1).all()
            lacking += a.shape[1] - slot.rank
    assert lacking
    done = join(state, vlm_jax.split(params, vlm_jax.training_table(model, params))[1])
    vlm_jax.save_peft(model, done, tmp_path / "trained")
    with quiet():
        adapted = PeftModel.from_pretrained(fresh(), tmp_path / "trained")
    assert_equal_logits(adapted, model, done, inputs)


@pytest.mark.parametrize("pair", ["llava"], indirect=True)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_pefts_adapter_here(tmp_path, pair, bias):
    """Of peft: patterns, one layer, biases, an embedding and a head, in an old layout of names."""
    fresh, model, params, inputs, _ = pair
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["q_proj", "embed_tokens", "lm_head", "fc1"],
        exclude_modules=r".*vision.*layers\.0.*",
        rank_pattern={r"model.language_model.layers.0.self_attn.q_proj": 2, "fc1": 3},
        alpha_pattern={r"^model\.language_model\.layers\.1.*": 3, "lm_head": 2},
        bias=bias,
    )
    with quiet():
        adapted = get_peft_model(fresh(), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path)
    again, read = vlm_jax.load_peft(model, params, tmp_path)
    assert_equal_logits(adapted, again, read, inputs)
    if bias == "lora_only":  # the pattern is written in the names that the file has
        to_legacy(tmp_path / "adapter_model.safetensors", "llava")
        file = tmp_path / "adapter_config.json"
        text = file.read_text().replace("model.language_model.", "language_model.model.")
        file.write_text(text.replace(r"model\\.language_model", r"language_model\\.model"))
        old, same = vlm_jax.load_peft(model, params, tmp_path)
        jax.tree.map(np.testing.assert_array_equal, dict(same), dict(read))
        with pytest.raises(vlm_jax.UserError, match="bias='lora_only' would train"):
            vlm_jax.training_table(old, same, vision_encoder_lr_scale=1)
