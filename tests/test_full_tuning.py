"""Full fine-tuning that fits: 16-bit weights that learn, frozen and slower layers, an average."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from references import llava, qwen2_vl
from runs import lines, make_base, run
from safetensors.numpy import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vlm_jax
from vlm_jax import UserError
from vlm_jax.train import metrics
from vlm_jax.train.checkpoint import flat_state
from vlm_jax.train.results import load_run
from vlm_jax.train.step import averaged, stochastic_round
from vlm_jax.train.trainable import report, trainable_line, training_table
from vlm_jax.trees import Group, flatten, match, unflatten

pytestmark = pytest.mark.exact


def test_rounding_by_chance_is_right_on_average():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=200), rng.normal(size=200) * 1e-5, -rng.random(100) * 1e4])
    x = jnp.asarray(x, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: stochastic_round(x, key).astype(jnp.float32)))(keys)
    low, high = np.asarray(drawn).min(0), np.asarray(drawn).max(0)
    gap = high - low
    assert (gap > 0).mean() > 0.98 and (low <= x).all() and (x <= high).all()
    ulp = 2.0 ** (np.floor(np.log2(np.abs(np.asarray(x)))) - 7)
    assert (gap <= ulp).all()
    # Of 4,000 draws the mean is within five standard errors, at most half a gap each.
    error = np.abs(np.asarray(drawn, np.float64).mean(0) - np.asarray(x, np.float64))
    assert (error < 5 * 0.5 * ulp / np.sqrt(4000)).all()
    nearest = np.asarray(x.astype(jnp.bfloat16), np.float64)
    assert (np.abs(nearest - np.asarray(x)) > 5 * 0.5 * ulp / np.sqrt(4000)).mean() > 0.8


def test_what_has_16_bits_already_stays():
    x = jnp.asarray([0.0, -0.0, 1.0, -3.140625, 1e-39, np.inf, -np.inf, np.nan], jnp.bfloat16)
    for key in jax.random.split(jax.random.key(1), 20):
        kept = stochastic_round(x.astype(jnp.float32), key)
        bits = lambda a: np.asarray(jax.lax.bitcast_convert_type(a, jnp.uint16))  # noqa: E731
        np.testing.assert_array_equal(bits(kept)[:-1], bits(x)[:-1])
        assert np.isnan(kept[-1])


def test_the_average_is_torchs():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=5).astype(np.float32) for _ in range(6)]
    layer = torch.nn.Linear(5, 1, bias=False)
    theirs = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = {"w": jnp.zeros(5)}
    for step, value in enumerate(weights):
        layer.weight.data[:] = torch.tensor(value)
        theirs.update_parameters(layer)
        ours = averaged(ours, {"w": jnp.asarray(value)}, 0.9, jnp.int32(step))
        wanted = theirs.module.weight.detach().numpy()[0]
        np.testing.assert_allclose(ours["w"], wanted, rtol=1e-5, atol=1e-6)


FACTORS = (0.0, 0.25, 1.0)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_rates_of_layers_are_torchs_groups(optim):
    """A frozen layer is bit-identical and outside of the norm; another has its own rate."""
    rng = np.random.default_rng(0)
    params = {
        "layers": {"q": {"kernel": rng.normal(size=(3, 4, 5)), "bias": rng.normal(size=(3, 5))}},
        "lm_head": {"kernel": rng.normal(size=(5, 6))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    params["layers"]["q"]["bias"] = params["layers"]["q"]["bias"].at[0].set(-0.0)
    table = [("layers/.*", str(Group("full", 0.5, FACTORS))), (".*", "full")]
    training = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "constant",
                "max_grad_norm": 1.0, "optim": optim}  # fmt: skip
    tx = vlm_jax.optimizer(params, table, training)
    state, update, start = tx.init(params), jax.jit(tx.update), flatten(params)
    there = {
        path: [torch.nn.Parameter(torch.tensor(np.asarray(t))) for t in leaf]
        if path.startswith("layers")
        else [torch.nn.Parameter(torch.tensor(np.asarray(leaf)))]
        for path, leaf in start.items()
    }
    groups = [
        {
            "params": [tensor],
            "lr": 1e-2 * (0.5 * FACTORS[i] if path.startswith("layers") else 1.0),
            "weight_decay": 0.0 if path.endswith("bias") else 0.1,
        }
        for path, found in there.items()
        for i, tensor in enumerate(found)
        if not (path.startswith("layers") and FACTORS[i] == 0)
    ]
    adamw = torch.optim.AdamW(groups)
    for _ in range(5):
        grads = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in sorted(start.items())}
        updates, state = update(unflatten(grads), state, params)
        params = optax.apply_updates(params, updates)
        for path, found in there.items():
            for i, tensor in enumerate(found):
                tensor.grad = torch.tensor(grads[path][i] if len(found) > 1 else grads[path])
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        adamw.step()
    for path, leaf in flatten(params).items():
        if path.startswith("layers"):
            bits = lambda x: np.asarray(jax.lax.bitcast_convert_type(x[0], jnp.uint32))  # noqa: E731
            np.testing.assert_array_equal(bits(leaf), bits(start[path]))
            assert np.abs(leaf[1] - start[path][1]).max() > 1e-4
        if optim == "muon" and path == "layers/q/kernel":
            continue  # tests/test_rules.py compares what Muon does
        wanted = np.stack([t.detach().numpy() for t in there[path]]).reshape(leaf.shape)
        np.testing.assert_allclose(leaf, wanted, rtol=2e-5, atol=2e-6, err_msg=path)


def test_groups_with_layers_are_read_and_checked():
    group = Group("lora", 0.5, (0.0, 0.0, 0.25, 1.0, 1.0, 1.0))
    assert str(group) == "lora(0.5; layers 0*2, 0.25, 1*3)" and Group.parse(str(group)) == group
    for text in ("full(0.5)", "full", "frozen"):
        assert str(Group.parse(text)) == text and Group.parse(text).layers is None
    for bad in ("full(1; layers )", "full(1; layers x)", "full(1; layer 1)", "frozen(1; layers 1)"):
        with pytest.raises(UserError, match="group"):
            Group.parse(bad)
    with pytest.raises(UserError, match="one number for each of its 3 layers"):
        vlm_jax.optimizer(
            {"kernel": jnp.zeros((3, 2, 2))}, [(".*", "full(1; layers 0, 1)")], {"max_steps": 3}
        )


def test_the_table_freezes_the_lowest_blocks_and_slows_the_tower(tmp_path):
    llava(tmp_path, "clip", "llama")
    model, params = vlm_jax.load(tmp_path)
    full = {"lora_enabled": False, "vision_encoder_lr_scale": 0.1}
    table = training_table(model, params, freeze_layers=1, vision_layer_decay=0.5, **full)
    groups = match(table, flatten(params), "training table")
    tower, decoder = "model/vision_tower/", "model/language_model/"
    assert groups[f"{tower}encoder/layers/mlp/fc1/kernel"] == "full(0.1; layers 0.125, 0.25, 0.5)"
    for name in ("pre_layrnorm/scale", "embeddings/patch_embedding/kernel"):
        assert groups[tower + name] == "full(0.00625)"
    assert groups[f"{decoder}layers/mlp/up_proj/kernel"] == "full(1.0; layers 0, 1)"
    assert groups[f"{decoder}norm/scale"] == groups["lm_head/kernel"] == "full"
    flat = flatten(params)
    half = sum(x.size for p, x in flat.items() if p.startswith(f"{decoder}layers/")) // 2
    every = sum(x.size for x in flat.values())
    assert trainable_line(model, params, table).startswith(
        f"trainable params: {every - half:,d} ||"
    )
    rows = report(model, params, table, 1.0)
    frozen = [r["parameters"] for r in rows if r["trains"] == "nothing (frozen)"]
    assert frozen == [half]
    assert max(r["learning_rate"] for r in rows if r["component"] == "vision") == 0.05
    with pytest.raises(UserError, match="freeze_layers is 2, but the language model has 2 layers"):
        training_table(model, params, freeze_layers=2, **full)
    plain = training_table(model, params, **full)
    assert plain == training_table(model, params, freeze_layers=0, vision_layer_decay=1.0, **full)


def test_lora_of_frozen_blocks_does_not_train(tmp_path):
    qwen2_vl(tmp_path)
    model, params = vlm_jax.load(tmp_path)
    model, params = vlm_jax.add_lora(model, params, vlm_jax.LoRA(2, 4), jax.random.key(0))
    table = training_table(model, params, freeze_layers=1)
    groups = match(table, flatten(params), "training table")
    found = {group for path, group in groups.items() if path.endswith("lora_A")}
    assert found == {"lora(1.0; layers 0, 1)"}


OPTIONS = (
    *("lora.enabled=false", "model.freeze_layers=1", "model.vision_encoder_lr_scale=0.5"),
    *("model.vision_layer_decay=0.5", "training.param_dtype=bfloat16", "training.ema_decay=0.5"),
    *("training.optim=adafactor", "training.learning_rate=1e-3", "training.neftune_noise_alpha=5"),
)


def test_a_run_of_all_of_them_resumes_to_the_bit(place, monkeypatch):
    make_base(place / "deep", layers=2)
    push = metrics.Watch.push

    def push_and_interrupt(self, step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return push(self, step, *rest)

    straight, directory, _ = run(place, "all", *OPTIONS, base="deep")
    assert straight["steps"] == 4
    monkeypatch.setattr(metrics.Watch, "push", push_and_interrupt)
    stopped, other, _ = run(place, "all stopped", *OPTIONS, base="deep")
    assert stopped["interrupted"] and stopped["steps"] == 2
    monkeypatch.setattr(metrics.Watch, "push", push)
    average = flatten(load_run(other)[1])  # of the checkpoint: there is no result yet
    run(place, "all stopped", *OPTIONS, base="deep", resume=True)
    losses = [[row["loss"] for row in lines(d / "metrics.jsonl")] for d in (directory, other)]
    assert losses[0] == losses[1]
    ours, again = (load_file(d / "model/model.safetensors") for d in (directory, other))
    base = load_file(place / "deep/model.safetensors")
    moved = set()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
        # The base has 32 bits here, and weights of which any trains have 16, frozen layers too.
        if not np.array_equal(value, base[name].astype(jnp.bfloat16).astype(value.dtype)):
            moved.add(name)
    layers = {n for n in ours if ".layers.0." in n and "visual" not in n}
    assert layers and not layers & moved
    assert {n for n in ours if ".layers.1.mlp" in n} <= moved
    assert any("visual.blocks.0." in n for n in moved)
    kernel = "model/language_model/layers/mlp/up_proj/kernel"
    assert average[kernel].dtype == jnp.float32
    kept = np.asarray(average[kernel][1])
    assert not np.array_equal(kept, kept.astype(jnp.bfloat16))  # an average has more bits


def test_states_are_of_their_dtypes():
    params = {"kernel": jnp.full((4, 4), 1.001, jnp.float32)}
    tx = vlm_jax.optimizer(params, [(".*", "full")], {"learning_rate": 1e-3})
    state = vlm_jax.init_state(params, tx, param_dtype=jnp.bfloat16, ema=True)
    kinds = {name: leaf.dtype for name, leaf in flat_state(state).items() if leaf.ndim == 2}
    assert kinds.pop("trainable.kernel") == jnp.bfloat16
    assert kinds and set(kinds.values()) == {jnp.dtype("float32")}
    np.testing.assert_array_equal(state.ema["kernel"], params["kernel"])


def test_masters_keep_every_bit():
    params = {"kernel": jnp.full((4, 4), 1 + 2.0**-20, jnp.float32)}
    state = vlm_jax.init_state(params, vlm_jax.optimizer(params, [(".*", "full")], {}))
    assert state.trainable["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(state.trainable["kernel"], params["kernel"])
