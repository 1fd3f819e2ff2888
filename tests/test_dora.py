"""DoRA where peft is no reference: 4-bit bases, whole runs, dropout, meshes, adapters cut short."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from runs import make_base, make_data, run
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax import UserError
from vlm_jax.models.layers.linear import dora_matmul, matmul
from vlm_jax.sharding import make_mesh, param_shardings
from vlm_jax.train.results import export
from vlm_jax.trees import flatten, unflatten

LORA = vlm_jax.LoRA(2, 4, targets="llama", dora=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("dora")
    make_base(place / "base")
    make_data(place / "data")
    return place


def tokens(model):
    ids = np.arange(1, 13)[None] % 64
    return model.batch(input_ids=ids, attention_mask=np.ones_like(ids))


def logits(model, params, train=False, key=0):
    rngs = {"dropout": jax.random.key(key)} if train else None
    return np.asarray(
        model.apply({"params": params}, tokens(model), train=train, rngs=rngs), np.float32
    )


def moved(params):
    flat = flatten(params)
    for path, leaf in flat.items():
        if path.endswith("lora_B"):
            flat[path] = leaf + 0.2
        if path.endswith("lora_magnitude"):
            flat[path] = leaf * 1.2
    return unflatten(flat)


@pytest.mark.parametrize("quantize", [None, "nf4-dq"])
def test_it_starts_as_the_base_and_merges(place, quantize):
    model, params = vlm_jax.load(place / "base", quantize=quantize)
    before = logits(model, params)
    model, params = vlm_jax.add_lora(model, params, LORA, jax.random.key(0))
    np.testing.assert_allclose(logits(model, params), before, atol=1e-5)
    params = moved(params)
    after = logits(model, params)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(logits(model, vlm_jax.merge(model, params)), after, atol=1e-4)


def test_dropout_acts_on_all_that_the_adapter_changes():
    key = jax.random.split(jax.random.key(0), 5)
    x, kernel = (jax.random.normal(k, (8, 8)) for k in key[:2])
    a, b = jax.random.normal(key[2], (8, 2)), jax.random.normal(key[3], (2, 8))
    dropped = jnp.where(jax.random.bernoulli(key[4], 0.5, x.shape), 2 * x, 0)
    magnitude = jnp.linspace(1, 2, 8)
    summed = kernel + 0.5 * a @ b
    other = summed * (magnitude / jnp.linalg.norm(summed, axis=0))[None]
    got = dora_matmul(x, kernel, a, b, 0.5, dropped, None, magnitude)
    np.testing.assert_allclose(got, matmul(x, kernel) + dropped @ (other - kernel), atol=1e-4)


def test_norms_lie_where_the_columns_do(place):
    model, params = vlm_jax.load(place / "base")
    model, params = vlm_jax.add_lora(model, params, LORA, jax.random.key(0))
    mesh = make_mesh(devices=jax.devices()[:1])
    shardings = flatten(param_shardings(model, params, mesh))
    (norms,) = (path for path in shardings if path.endswith("q_proj/lora_magnitude"))
    assert shardings[norms].spec == PartitionSpec(None, "tensor")


def test_a_run_and_its_exports(place):
    _, directory, text = run(place, "run", "lora.use_dora=true", "lora.dropout=0.1")
    assert "lora_magnitude" not in text and "LoRA" in text
    config = json.loads((directory / "adapter/adapter_config.json").read_text())
    held = load_file(directory / "adapter/adapter_model.safetensors")
    assert config["use_dora"] and any(name.endswith("magnitude_vector") for name in held)
    for merge in (False, True):
        assert export(directory, place / f"out{merge}", merge).difference < 1e-4
    outcome, _, _ = run(place, "run", "lora.use_dora=true", "lora.dropout=0.1", resume=True)
    assert outcome["steps"] == 4
    with pytest.raises(UserError, match="dora"):
        run(place, "run", "lora.dropout=0.1", resume=True)


def test_adapters_cut_short_are_refused(place, tmp_path):
    model, params = vlm_jax.load(place / "base")
    adapted = vlm_jax.add_lora(model, params, LORA, jax.random.key(0))
    vlm_jax.save_peft(*adapted, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    norms = [name for name in held if name.endswith("magnitude_vector")]
    save_file({name: held[name] for name in held if name != norms[0]}, file)
    with pytest.raises(UserError, match="lacks its lora_magnitude_vector"):
        vlm_jax.load_peft(model, params, tmp_path)
    save_file({**held, norms[0]: held[norms[0]][:-1]}, file)
    with pytest.raises(UserError, match="shape"):
        vlm_jax.load_peft(model, params, tmp_path)
