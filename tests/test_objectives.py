"""What every objective promises, and one on pairs (dpo.py) that is added by a line."""

import dataclasses
import functools
import operator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from dpo import dpo
from draws import shaken
from references import qwen2_vl, qwen2_vl_inputs
from runs import make_config

import vlm_jax
from vlm_jax import UserError
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.models.layers.partition import rows_over
from vlm_jax.sharding import make_mesh, shard_batch, shard_params
from vlm_jax.train.loop import train
from vlm_jax.train.losses import OBJECTIVES, joined
from vlm_jax.train.setup import step_options
from vlm_jax.train.step import split_rows
from vlm_jax.trees import flatten, unflatten

ALL = {**OBJECTIVES, "dpo": dpo}  # the line that adds one
BETA = 0.3
# Compiling takes longer than running here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model whose LoRA is not zero, and 4 rows of pictures, films and text with answers."""
    directory = tmp_path_factory.mktemp("objectives")
    qwen2_vl(directory)
    base, weights = vlm_jax.load(directory)
    lora = vlm_jax.LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")
    model, params = vlm_jax.add_lora(base, weights, lora, jax.random.key(0))
    params = shaken(params, is_lora)
    table = [(r".*/lora_[AB]", "lora"), (".*", "frozen")]
    batch = model.batch(**qwen2_vl_inputs("mixed"))
    answered = batch.weights * (np.cumsum(batch.weights, axis=1) > 2)  # what comes before is asked
    batch = dataclasses.replace(batch, weights=answered)
    trainable, frozen = vlm_jax.split(params, table)
    return SimpleNamespace(
        base=base,
        weights=weights,
        model=model,
        params=params,
        table=table,
        trainable=trainable,
        frozen=frozen,
        batch=batch,
    )


@functools.cache
def differentiated(model, objective):
    """Return the compiled (trainable, frozen, batch) -> ((sum, (count, others)), gradients)."""

    def value(trainable, frozen, batch):
        total, *rest = objective(model, joined(model, trainable, frozen), batch)
        return total, rest

    return jit(jax.value_and_grad(value, has_aux=True))


def sums(tiny, objective, batch, frozen=None):
    """Return (sum, count, others) and {path: gradient} of what trains."""
    run = differentiated(tiny.model, objective)
    (total, rest), grads = run(tiny.trainable, frozen or tiny.frozen, batch)
    return (total, *rest), flatten(grads)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ALL)
def test_an_objective(tiny, name):
    objective, batch = ALL[name], tiny.batch
    (total, count, others), grads = sums(tiny, objective, batch)
    scalars = [total, count, *others.values()]
    assert all(one.shape == () and one.dtype == np.float32 for one in scalars)
    assert np.isfinite(scalars).all() and total > 0 and count > 0
    assert not others.keys() & {"loss", "tokens", "grad_norm"}
    assert grads.keys() == flatten(tiny.trainable).keys()
    assert all(np.isfinite(grad).all() and np.abs(grad).max() > 0 for grad in grads.values())

    # Micro-batches add up to the whole.
    halves = split_rows(jax.tree.map(np.asarray, batch), 2)
    one, other = (
        sums(tiny, objective, jax.tree.map(operator.itemgetter(n), halves)) for n in (0, 1)
    )
    added = jax.tree.map(jnp.add, one, other)
    jax.tree.map(close, added, ((total, count, others), grads))

    # Rows of padding count nothing, and several devices compute what one does.
    empty = dataclasses.replace(batch, weights=np.zeros_like(batch.weights))
    (nothing, of_none, others), grads_of_none = sums(tiny, objective, empty)
    assert nothing == of_none == 0 and not any(map(float, others.values()))
    assert not any(np.any(grad) for grad in grads_of_none.values())
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    rows = shard_batch(batch, mesh)
    moved = SimpleNamespace(
        model=tiny.model, trainable=shard_params(tiny.model, tiny.trainable, mesh)
    )
    frozen = shard_params(tiny.model, tiny.frozen, mesh)
    with rows_over(rows.tokens.sharding, moved.trainable, frozen):
        (shared, *_), same = sums(moved, objective, rows, frozen)
    close(shared, total)
    jax.tree.map(close, same, grads)


@pytest.mark.parametrize("name", ALL)
def test_a_step_of_an_objective(tiny, name):
    tx = vlm_jax.optimizer(tiny.trainable, tiny.table, {"learning_rate": 1e-3, "max_steps": 3})
    run = vlm_jax.make_step(tiny.model, tx, 2, objective=ALL[name], label_smoothing=0.1)
    step, state, seen = jit(run), vlm_jax.init_state(tiny.trainable, tx), []
    for _ in range(3):
        state, metrics = step(state, tiny.frozen, tiny.batch)
        seen.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    assert seen[0]["loss"] > seen[1]["loss"] > seen[2]["loss"]
    others = sums(tiny, ALL[name], tiny.batch)[0][2]
    assert {"loss", "tokens", "grad_norm", *others} <= seen[0].keys()
    assert all(one.shape == () and one.dtype == np.float32 for one in seen[0].values())


def log_probabilities(model, params, batch):
    """Return float64 [B] from all logits: log p of each row's answer."""
    logits = np.asarray(jit(model.apply)({"params": params}, batch), np.float64)
    of_all = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(of_all, np.asarray(batch.targets)[..., None], -1)[..., 0]
    return torch.from_numpy(np.where(batch.weights > 0, picked, 0).sum(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_trls_formula(tiny, smoothing):
    objective = functools.partial(dpo, beta=BETA, label_smoothing=smoothing)
    (total, count, others), grads = sums(tiny, objective, tiny.batch)
    chosen, rejected = log_probabilities(tiny.model, tiny.params, tiny.batch).chunk(2)
    # Of the base itself, as it was loaded.
    ref_chosen, ref_rejected = log_probabilities(tiny.base, tiny.weights, tiny.batch).chunk(2)
    margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
    logsigmoid = torch.nn.functional.logsigmoid
    losses = -logsigmoid(margin) * (1 - smoothing) - logsigmoid(-margin) * smoothing
    assert float(margin.abs().min()) > 0.01
    assert float(total) == pytest.approx(float(losses.sum()), rel=1e-5) and count == 2
    assert others["reward_accuracy"] == int((margin > 0).sum())
    assert all(is_lora(path) for path in grads)

    # A LoRA that is still zero tells nothing apart: log 2 a pair.
    fresh = {p: 0 * v if p.endswith("lora_B") else v for p, v in flatten(tiny.params).items()}
    start = dpo(tiny.model, unflatten(fresh), tiny.batch, beta=BETA)
    assert float(start[0]) == pytest.approx(2 * np.log(2), rel=1e-6)


def test_a_config_names_one(place, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "dpo", dpo)
    data = place / "data/train.jsonl"
    config = make_config(place / "base", data, tmp_path / "out", "training.objective=dpo")
    assert step_options(config)["objective"] is dpo
    config = make_config(place / "base", data, tmp_path / "out", "training.objective=dppo")
    with pytest.raises(UserError, match="'dppo', which is not supported.*'dpo'.*cross_entropy"):
        train(config)
