"""LoRA's kin against peft: ranks, scales and layers that differ, biases, embeddings."""

import copy
import json

import jax
import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from references import quiet
from safetensors.numpy import load_file
from test_peft import (
    assert_equal_logits,
    build,
    our_logits,
)

import vlm_jax
from vlm_jax.targets import slots
from vlm_jax.trees import flatten, unflatten

NUMBERED = r"layers\.0\.self_attn\.q_proj"
# What our LoRA says -> what peft's LoraConfig says for the same.
KINDS = {
    "ranks by module": dict(rank_pattern={"q_proj": 5, "down_proj": 1}),
    "ranks by layer": dict(rank_pattern={NUMBERED: 5, r"layers.1.mlp.*": 2}),
    "alphas": dict(alpha_pattern={NUMBERED: 2, "v_proj": 9}),
    "both, rsLoRA": dict(rank_pattern={NUMBERED: 5}, alpha_pattern={"q_proj": 2}, rslora=True),
    "some layers": dict(layers_to_transform=(1,)),
    "excluded": dict(exclude_modules=("layers.0.mlp.up_proj", "k_proj")),
    "excluded by regex": dict(exclude_modules=r".*layers\.1\..*(q|k)_proj"),
    "some layers' DoRA": dict(layers_to_transform=(0,), dora=True),
    "DoRA's ranks": dict(rank_pattern={NUMBERED: 4}, dora=True),
}
NAMES = {"rslora": "use_rslora", "dora": "use_dora"}


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
    lora = vlm_jax.LoRA(3, 5, targets="llama", **KINDS[kind])
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    ours = {
        name: tensor.shape
        for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
    }
    with quiet():
        adapted = get_peft_model(fresh(), peft_config(KINDS[kind], target_modules=list(LANGUAGE)))
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
    assert_equal_logits(adapted, base[0], vlm_jax.merge(model, params), inputs)


def trained(params):
    """Return the tree after some steps: B moved where it may move, and DoRA's norms."""
    flat, rng = flatten(params), np.random.default_rng(0)
    for path in [path for path in flat if path.endswith("/lora_B")]:
        lives = np.asarray(flat[path.replace("lora_B", "lora_A")]).any(-2)
        flat[path] = flat[path] + 0.3 * rng.normal(size=flat[path].shape) * lives[..., None]
        flat[path] = flat[path].astype(np.float32)
        norms = path.replace("lora_B", "lora_magnitude")
        if norms in flat:
            flat[norms] = flat[norms] * np.where(lives.any(-1), 1.1, 1)[..., None]
    return unflatten(flat)
