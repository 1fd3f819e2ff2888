"""The optimizer equals torch's AdamW, clipping and transformers' schedules, group by group."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict
from transformers import TrainingArguments, get_scheduler

import vlm_jax
from vlm_jax import UserError
from vlm_jax.train.optimizer import OptimizerSettings, learning_rate
from vlm_jax.trees import Group

TABLE = [
    (r".*/lora_[AB]", "lora"),
    (r"merger/.*", "full(0.5)"),
    (r"tower/.*", "full(0.1)"),
    (r".*", "frozen"),
]


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "tower": {"block": {"kernel": leaf(4, 3), "bias": leaf(3)}, "norm": {"scale": leaf(3)}},
        "merger": {"kernel": leaf(3, 5), "bias": leaf(5)},
        "decoder": {"q_proj": {"kernel": leaf(5, 5), "lora_A": leaf(5, 2), "lora_B": leaf(2, 5)}},
    }


def leaves(tree):
    return vlm_jax.trees.flatten(tree)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_updates_equal_torch_adamw_with_clipping_and_groups(limit):
    params = make_params()
    trainable, _ = vlm_jax.split(params, TABLE)
    training = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": limit,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "max_steps": 20,
    }
    tx = vlm_jax.optimizer(trainable, TABLE, training)
    state = tx.init(trainable)

    theirs = {
        p: torch.nn.Parameter(torch.tensor(np.asarray(v))) for p, v in leaves(trainable).items()
    }
    groups = []
    for path, tensor in theirs.items():
        scale = 0.1 if path.startswith("tower") else 0.5 if path.startswith("merger") else 1.0
        decay = 0.0 if path.endswith(("bias", "scale")) else 0.1
        groups.append({"params": [tensor], "lr": 1e-2 * scale, "weight_decay": decay})
    adamw = torch.optim.AdamW(groups)
    scheduler = get_scheduler("cosine", adamw, num_warmup_steps=3, num_training_steps=20)

    update = jax.jit(tx.update)
    rng = np.random.default_rng(1)
    for _ in range(20):
        grads = {
            p: rng.normal(size=v.shape).astype(np.float32) for p, v in leaves(trainable).items()
        }
        updates, state = update(vlm_jax.trees.unflatten(grads), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        for path, tensor in theirs.items():
            tensor.grad = torch.tensor(grads[path])
        if limit > 0:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), limit)
        adamw.step()
        scheduler.step()
    for path, leaf in leaves(trainable).items():
        np.testing.assert_allclose(leaf, theirs[path].detach().numpy(), rtol=2e-5, atol=2e-6)


def test_frozen_leaves_have_no_moments():
    params = make_params()
    trainable, frozen = vlm_jax.split(params, TABLE)
    tx = vlm_jax.optimizer(trainable, TABLE, {"max_steps": 5})
    state = tx.init(trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert set(leaves(frozen)) == {"decoder/q_proj/kernel"}


def test_settings_come_from_dicts_configs_and_objects():
    from vlm_jax import config

    section = config.load(None, ["training.learning_rate=1e-3", "training.max_steps=9"]).training
    assert OptimizerSettings.of(section).learning_rate == 1e-3
    assert OptimizerSettings.of(section).warmup == 1  # 3 % of 9 steps, rounded up
    args = types.SimpleNamespace(learning_rate=0.5, warmup_ratio=None, lr_scheduler_type="linear")
    assert OptimizerSettings.of(args).learning_rate == 0.5
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        OptimizerSettings.of({"learning_rat": 1})


def test_settings_may_be_partial_and_strings(tmp_path):
    part = OptimizerSettings.of(ConfigDict({"learning_rate": "2e-4", "max_steps": "1e2"}))
    assert part == OptimizerSettings(learning_rate=2e-4, max_steps=100)
    assert isinstance(part.max_steps, int)
    args = TrainingArguments(
        str(tmp_path), learning_rate=1e-3, max_steps=50, warmup_steps=0.1, use_cpu=True
    )
    theirs = OptimizerSettings.of(args)
    assert (theirs.lr_scheduler_type, theirs.warmup, theirs.learning_rate) == ("linear", 5, 1e-3)
    with pytest.raises(UserError, match="learning_rate' has the value 'fast'.*expected float"):
        OptimizerSettings.of({"learning_rate": "fast"})


def test_without_schedule_and_steps_the_rate_is_constant():
    rate = learning_rate(OptimizerSettings.of({"learning_rate": 1e-3}))
    assert [float(rate(step)) for step in (0, 1000)] == pytest.approx([1e-3, 1e-3])
    rate = learning_rate(OptimizerSettings.of({"learning_rate": 1e-3, "warmup_steps": 2}))
    assert [float(rate(step)) for step in (0, 1, 9)] == pytest.approx([0, 5e-4, 1e-3])
    assert OptimizerSettings.of({"max_steps": 5}).lr_scheduler_type == "cosine"


def test_bad_settings_and_groups_are_refused():
    trainable, _ = vlm_jax.split(make_params(), TABLE)
    with pytest.raises(UserError, match="max_steps"):
        vlm_jax.optimizer(trainable, TABLE, {"lr_scheduler_type": "cosine"})
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        vlm_jax.optimizer(trainable, TABLE, {"lr_scheduler_type": "cosin", "max_steps": 3})
    with pytest.raises(UserError, match="Nothing is left to train"):
        vlm_jax.optimizer({}, [(".*", "frozen")], {"max_steps": 3})
    with pytest.raises(UserError, match="freezes 'merger/kernel'"):
        vlm_jax.optimizer({"merger": trainable["merger"]}, [(".*", "frozen")], {"max_steps": 3})
    for bad in ("ful", "full(0)", "full(x)", "frozen(1)", "lora(-1)", "full(0.1"):
        with pytest.raises(UserError, match="group"):
            Group.parse(bad)
        with pytest.raises(UserError, match=r"group.*row '\.\*merger\.\*'"):
            vlm_jax.split(make_params(), [(".*merger.*", bad), (".*", "frozen")])
    assert Group.parse("full(0.1)") == Group("full", 0.1)
