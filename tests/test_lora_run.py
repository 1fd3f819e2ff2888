"""Runs whose config says more of LoRA than rank and targets."""

import json

import numpy as np
import pytest
from runs import make_base, make_data, run
from safetensors.numpy import load_file

import vlm_jax
from vlm_jax import UserError
from vlm_jax.train.results import export, load_run
from vlm_jax.trees import flatten


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("lora_run")
    make_base(place / "base")
    make_data(place / "data")
    return place


KIND = (
    "lora.target_modules=q_proj,down_proj,embed_tokens",
    "lora.rank_pattern={q_proj: 4}",
    "lora.alpha_pattern={layers.0.*: 3}",
    "lora.layers_to_transform=0",
    "lora.bias=all",
)


def test_a_run_and_its_exports(place):
    # The embedding lies in no layer, so layers_to_transform leaves it out.
    with pytest.raises(UserError, match=r"layers_to_transform names the layer 9"):
        run(place, "refused", *KIND[:-2], "lora.layers_to_transform=9")
    _, directory, text = run(place, "run", *KIND, "lora.init_lora_weights=gaussian")
    config = json.loads((directory / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["bias"] == "all"
    assert config["rank_pattern"] == {"q_proj": 4} and config["alpha_pattern"]
    held = load_file(directory / "adapter/adapter_model.safetensors")
    shapes = {n.split(".layers.")[1]: x.shape for n, x in held.items() if ".lora_A" in n}
    assert {name: shape[0] for name, shape in shapes.items()} == {
        "0.self_attn.q_proj.lora_A.weight": 4,
        "0.mlp.down_proj.lora_A.weight": 2,
    }
    base = load_file(place / "base/model.safetensors")
    biases = {n.removeprefix("base_model.model."): x for n, x in held.items() if "k_proj.bias" in n}
    assert biases
    before = [x for n, x in base.items() if "k_proj.bias" in n]
    for bias in biases.values():
        assert not any(np.array_equal(bias, x) for x in before)
    # All that trains is in the line of the report: matrices, biases, the projector.
    model, params, _ = load_run(directory)
    trained, _ = vlm_jax.count_parameters(model, params)
    frozen_tower = sum(
        leaf.size
        for path, leaf in flatten(params).items()
        if path.endswith("/bias") and model.component(path) == "vision"
    )
    assert f"trainable params: {trained - frozen_tower:,d} ||" in text
    for merge in (False, True):
        assert export(directory, place / f"out{merge}", merge).difference < 1e-4
    outcome, _, _ = run(place, "run", *KIND, "lora.init_lora_weights=gaussian", resume=True)
    assert outcome["steps"] == 4
    with pytest.raises(UserError, match="rank_pattern"):
        run(place, "on", f"model.adapter={directory / 'adapter'}", "lora.alpha=32")


def test_starts(place):
    _, directory, _ = run(place, "pissa", "lora.init_lora_weights=pissa_niter_4")
    config = json.loads((directory / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 64 and config["init_lora_weights"] is True
    assert export(directory, place / "plain", False).difference < 1e-4
    with pytest.raises(UserError, match="loftq"):
        run(place, "qpissa", "lora.init_lora_weights=pissa", "model.quantize=nf4")
    with pytest.raises(UserError, match="gradients on data"):
        run(place, "ga", "lora.init_lora_weights=lora_ga")
    _, directory, _ = run(place, "loftq", "lora.init_lora_weights=loftq", "model.quantize=nf4")
    assert export(directory, place / "filled", False).difference < 1e-4
