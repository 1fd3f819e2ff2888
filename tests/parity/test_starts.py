"""How matrices start, against peft, and what it leaves of the error of 4 bits."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from references import our_logits, quiet, wide
from test_peft import assert_equal_logits, assert_twenty_equal_steps, build

import vlm_jax
from vlm_jax.adapters.lora_init import random_start, singular_factors
from vlm_jax.adapters.targets import slots
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.trees import flatten, unflatten
from vlm_jax.weights import FourBit, dense

TARGETS = ("q_proj", "down_proj")
KINDS = {
    "pissa": dict(init="pissa", rank_pattern={r"layers.0.*q_proj": 5}, rslora=True, dora=True),
    "olora": dict(init="olora"),
}
NAMES = {"init": "init_lora_weights", "rslora": "use_rslora", "dora": "use_dora"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a function to a fresh reference, and (model, params, inputs)."""
    reference, *rest = build("qwen2_vl", tmp_path_factory.mktemp("base"), 3.0)
    return lambda: copy.deepcopy(reference), *rest


def in_peft(reference, kind):
    """Return peft's model of the same kind, B and A as they start."""
    named = {NAMES.get(key, key): value for key, value in kind.items()}
    targets = r".*language_model.*(q_proj|down_proj)"
    with quiet():
        return get_peft_model(
            reference, LoraConfig(r=3, lora_alpha=5, target_modules=targets, **named)
        )


def products(adapted):
    """Return {module: scale B A [out, in]} of a peft model."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def our_products(model, params):
    """Return the same of ours, of A and B alone."""
    flat, found = flatten(params), {}
    for path in [path for path in flat if path.endswith("/lora_A")]:
        for slot in slots(model, model.lora, path):
            own = flat[path][slot.layer] @ flat[path.replace("lora_A", "lora_B")][slot.layer]
            found[slot.module] = slot.scale * np.asarray(own).T
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_pefts_and_is_saved_for_the_base_as_it_is(tmp_path, pair, kind):
    fresh, model, params, inputs = pair
    base = model, params
    model, params = vlm_jax.add_lora(
        *base, vlm_jax.LoRA(3, 5, targets=TARGETS, **KINDS[kind]), jax.random.key(0)
    )
    for path, leaf in flatten(base[1]).items():
        assert flatten(params)[path] is leaf
    theirs, ours = products(in_peft(fresh(), KINDS[kind])), our_products(model, params)
    assert ours.keys() == theirs.keys()
    for module, expected in theirs.items():
        np.testing.assert_allclose(ours[module], expected, atol=1e-5)
        assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(
        our_logits(model, params, inputs), our_logits(*base, inputs), atol=1e-4
    )
    flat = flatten(params)
    for path in flat:
        if path.endswith(("/lora_A", "/lora_B")):
            flat[path] = flat[path] * 1.3
    params = unflatten(flat)
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    with quiet():
        adapted = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert_equal_logits(adapted, model, params, inputs)
    again, read = vlm_jax.load_peft(*base, tmp_path / "adapter")
    assert again.lora.rank == 6
    merged = flatten(vlm_jax.merge(model, params))
    for path, leaf in flatten(vlm_jax.merge(again, read)).items():
        np.testing.assert_allclose(leaf, merged[path], atol=1e-5)


def test_ten_steps_of_pissa(tmp_path, pair):
    fresh, model, params, inputs = pair
    model, params = vlm_jax.add_lora(
        model, params, vlm_jax.LoRA(3, 5, targets=TARGETS, init="pissa"), jax.random.key(0)
    )
    twin = in_peft(fresh(), dict(init="pissa"))
    ours = flatten(params)
    with torch.no_grad():  # the signs of singular vectors are anyone's: A and B start as ours
        for name, tensor in twin.named_parameters():
            for matrix in ("lora_A", "lora_B"):
                if f".{matrix}." in name:
                    parts = name.removeprefix("base_model.model.").split(f".{matrix}.")[0]
                    layer = int(parts.split("layers.")[1].split(".")[0])
                    path = parts.replace(f"layers.{layer}", "layers").replace(".", "/")
                    tensor.copy_(torch.from_numpy(np.array(ours[f"{path}/{matrix}"][layer].T)))
    labels = np.where(inputs["input_ids"] < 180, inputs["input_ids"], -100)
    labels = np.where(inputs["attention_mask"] == 1, labels, -100)
    rows = dict(projector_lr_scale=0.0)
    state = assert_twenty_equal_steps(twin, model, params, inputs, labels, recipe=rows, steps=10)
    assert all(path.endswith(("lora_A", "lora_B")) for path in flatten(state))


@pytest.mark.parametrize("magnitude", [False, True])
def test_dropout_leaves_what_matrices_took_alone(magnitude):
    """As in PEFT, where that part is gone from the weight: x (W - s A0 B0) + s drop(x) A B."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = dict(kernel=(6, 5), lora_A=(6, 2), lora_B=(2, 5), start_A=(6, 2), start_B=(2, 5))
    leaves = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    if magnitude:
        leaves["lora_magnitude"] = jnp.arange(1.0, 6)
    x, layer = jax.random.normal(keys[5], (4, 6)), Linear(5, False, jnp.float32, LoRAScale(3, 0.5))
    residual = leaves["kernel"] - 1.5 * leaves["start_A"] @ leaves["start_B"]
    plain = {n: v for n, v in leaves.items() if not n.startswith("start")} | {"kernel": residual}
    for rngs in (None, {"dropout": jax.random.key(1)}):
        ours, theirs = (layer.apply({"params": p}, x, rngs=rngs) for p in (leaves, plain))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_random_starts():
    a, b = random_start("gaussian", jax.random.key(0), 400, 8, 300)
    assert float(a.std()) == pytest.approx(1 / 8, rel=0.05) and not b.any()
    a, b = random_start("orthogonal", jax.random.key(0), 40, 8, 30)
    np.testing.assert_allclose(a @ b, np.zeros((40, 30)), atol=1e-5)
    assert float(jnp.abs(a).max()) > 0.1 and float(jnp.abs(b).max()) > 0.1
    with pytest.raises(vlm_jax.UserError, match="even"):
        random_start("orthogonal", jax.random.key(0), 40, 7, 30)


def test_a_few_iterations_come_close_to_the_best_factors():
    left, right = (jax.random.normal(jax.random.key(i), (60, 60)) for i in (0, 1))
    matrix = left @ jnp.diag(0.7 ** jnp.arange(60, dtype=jnp.float32)) @ right
    best = jnp.matmul(*singular_factors(matrix, 4, None, jax.random.key(2)))
    close = jnp.matmul(*singular_factors(matrix, 4, 16, jax.random.key(2)))
    assert float(jnp.linalg.norm(close - best) / jnp.linalg.norm(best)) < 1e-3
    expected = torch.linalg.norm(
        torch.from_numpy(np.array(matrix)) - torch.from_numpy(np.array(best))
    )
    values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    assert float(expected) == pytest.approx(float(np.sqrt((values[4:] ** 2).sum())), rel=1e-4)


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq"])
def test_what_4_bits_lose_is_less_in_every_layer(tmp_path, quantized, init):
    model, base, exact = quantized
    lora = vlm_jax.LoRA(8, 12, targets="llama", init=init, rank_pattern={"v_proj": 4})
    model, params = vlm_jax.add_lora(model, base, lora, jax.random.key(0))
    flat, before = flatten(params), flatten(base)
    kernels = [path for path, leaf in before.items() if isinstance(leaf, FourBit)]
    assert len(kernels) == 7
    whole = flatten(vlm_jax.merge(model, params))
    for path in kernels:
        same = np.array_equal(flat[path].codes, before[path].codes)
        assert same == (init == "loftq") and flat[path].block == before[path].block
        lost = np.asarray(dense(before[path], jnp.float32) - exact[path])
        kept = np.asarray(whole[path] - exact[path])
        for layer in range(2):
            assert np.linalg.norm(kept[layer]) < 0.97 * np.linalg.norm(lost[layer]), path
    other = dataclasses.replace(lora, dora=True)  # whose norms are those of the sum
    norms = flatten(vlm_jax.add_lora(quantized[0], base, other, jax.random.key(0))[1])
    for path in kernels:
        found = norms[path.replace("/kernel", "/lora_magnitude")]
        np.testing.assert_allclose(found, np.linalg.norm(whole[path], axis=-2), rtol=1e-4)
    if init != "loftq":
        with pytest.raises(vlm_jax.UserError, match="quantized again"):
            vlm_jax.save_peft(model, params, tmp_path / "adapter")
        return
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    _, read = vlm_jax.load_peft(quantized[0], base, tmp_path / "adapter")
    for path, leaf in flatten(read).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, flat[path])


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Return (model, params) of an NF4 base, and its exact kernels."""
    directory = tmp_path_factory.mktemp("wide")
    wide("llava", directory)
    model, params = vlm_jax.load(directory, quantize="nf4-dq")
    return model, params, flatten(vlm_jax.load(directory)[1])


BAD = {
    "eva": "activations on data",
    "nonsense": "must be one of",
    "pissa_niter_x": "must be one of",
    "loftq": "is dense",
}


@pytest.mark.parametrize("init", BAD)
def test_refused(pair, init):
    _, model, params, _ = pair
    with pytest.raises(vlm_jax.UserError, match=BAD[init]):
        vlm_jax.add_lora(model, params, vlm_jax.LoRA(init=init), jax.random.key(0))
