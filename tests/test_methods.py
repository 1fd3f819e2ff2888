"""What every method promises, on packed rows of text and images of several sizes."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from draws import shaken
from references import quiet, wide
from test_meshes import packed_batch
from tiers import fast

import vlm_jax
from vlm_jax import UserError
from vlm_jax import config as configs
from vlm_jax.config.choices import METHODS
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.models.layers.partition import rows_over
from vlm_jax.sharding import make_mesh, shard_batch, shard_params
from vlm_jax.train.adapt import adapt_base
from vlm_jax.trees import flatten

# Compiling takes longer than running here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("methods")
    with quiet():
        wide("qwen2_vl", directory, factor=3.0)
    model, params = vlm_jax.load(directory)
    batch = jax.tree.map(lambda leaf: leaf[:4], packed_batch(model))
    return SimpleNamespace(
        directory=directory,
        model=model,
        params=params,
        batch=batch,
        plain=logits(model, params, batch),
    )


def logits(model, params, batch):
    run = jit(lambda params, batch: model.apply({"params": params}, batch))
    return np.asarray(run(params, batch))[batch.segments > 0]


def built(base, method, quantize=None, **more):
    """Return (model, params, training table) as a run of the method builds them."""
    given = {"method": method, "lora.r": 4, "lora.dropout": 0.0, "adapter.reduction_factor": 4}
    config = configs.load(None, {**given, **more})
    quantize = quantize or config.model.quantize
    loaded = vlm_jax.load(base.directory, quantize=quantize)
    return adapt_base(config, *loaded)


def moved(params, table, seed=5):
    """Return the tree with all that trains away from its start."""
    trainable, frozen = vlm_jax.split(params, table)
    return vlm_jax.join(shaken(trainable, scale=0.05, seed=seed), frozen)


def value_and_grad(model, params, table, batch):
    """Return the mean loss and {path: gradient} of what trains."""
    trainable, frozen = vlm_jax.split(params, table)

    def mean(trainable, frozen, batch):
        total, tokens = vlm_jax.loss(model, trainable, frozen, batch)
        return total / tokens

    value, grads = jit(jax.value_and_grad(mean))(trainable, frozen, batch)
    return float(value), {path: np.asarray(leaf) for path, leaf in flatten(grads).items()}


def held(base, method):
    """Return the base's parameters as the method stores them."""
    quantize = METHODS[method].get("model.quantize")
    return vlm_jax.load(base.directory, quantize=quantize)[1] if quantize else base.params


class Moved(NamedTuple):
    """A method's model away from its start, with its loss and gradients."""

    model: Any
    params: Any
    table: Any
    loss: float
    grads: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=METHODS)
def of_method(request, base):
    model, params, table = built(base, request.param)
    params = moved(params, table)
    loss, grads = value_and_grad(model, params, table, base.batch)
    return request.param, Moved(model, params, table, loss, grads)


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_base(base, method):
    plain = logits(base.model, held(base, method), base.batch)
    model, params, _ = built(base, method)
    start = logits(model, params, base.batch)
    if method == "loftq":  # nearer to the weights before they were in 4 bits
        assert np.linalg.norm(start - base.plain) < 0.9 * np.linalg.norm(plain - base.plain)
    else:
        np.testing.assert_allclose(start, plain, atol=1e-5)


def test_gradients_reach_all_that_trains_and_nothing_else(base, of_method):
    method, (model, params, _, _, grads) = of_method
    own = {path for path in grads if is_lora(path) or is_adapter(path)}
    base_leaves = {path for path in grads if path in flatten(base.params)}
    assert own | base_leaves == grads.keys()
    components = {model.component(path) for path in base_leaves}
    if method == "full":
        assert not own and components == {"projector", "language_model", "embeddings", "head"}
    else:
        assert own and components == {"projector"}
    dead = [path for path, grad in grads.items() if not np.abs(grad).max() > 0]
    assert not dead
    plain = logits(base.model, held(base, method), base.batch)
    assert np.abs(logits(model, params, base.batch) - plain).max() > 0.01


def test_recomputed_layers_give_the_same_gradients(base, of_method):
    _, (model, params, table, loss, grads) = of_method
    again = dataclasses.replace(model, remat="block")
    value, recomputed = value_and_grad(again, params, table, base.batch)
    assert value == pytest.approx(loss, rel=1e-6)
    for path, grad in grads.items():
        np.testing.assert_allclose(recomputed[path], grad, atol=1e-5 * np.abs(grad).max())


def test_several_devices_compute_what_one_does(base, of_method):
    _, (model, params, table, loss, grads) = of_method
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    rows = shard_batch(base.batch, mesh)
    placed = shard_params(model, params, mesh)
    with rows_over(rows.tokens.sharding, placed):
        spread, shared = value_and_grad(model, placed, table, rows)
    assert spread == pytest.approx(loss, rel=1e-5)
    for path, grad in grads.items():
        np.testing.assert_allclose(shared[path], grad, atol=1e-4 * np.abs(grad).max())


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_its_files_and_merged_weights_are_the_model(base, tmp_path, method):
    model, params, table = built(base, method)
    params, batch = moved(params, table), base.batch

    # Steps compile once, move what trains, and leave all else as it was.
    trainable, frozen = vlm_jax.split(params, table)
    settings = {"learning_rate": 1e-3, "max_steps": 3}
    tx = vlm_jax.optimizer(trainable, table, settings)
    step = jit(vlm_jax.make_step(model, tx))
    state = vlm_jax.init_state(trainable, tx)
    before = jax.tree.map(np.array, frozen)
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1 and losses[0] > losses[1] > losses[2]
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    trained = vlm_jax.join(state.trainable, frozen)

    # Files give the same model again.
    out, after = tmp_path / "out", logits(model, trained, batch)
    if model.adapter is not None:
        vlm_jax.save_adapter(model, trained, out)
        read = vlm_jax.load_adapter(base.model, held(base, method), out)
    elif model.lora is not None:
        vlm_jax.save_peft(model, trained, out)
        read = vlm_jax.load_peft(base.model, held(base, method), out)
    else:
        vlm_jax.save_pretrained(model, trained, out)
        read = vlm_jax.load(out)
    np.testing.assert_allclose(logits(*read, batch), after, atol=1e-5)

    # Merged weights give the same model, where weights can.
    if model.adapter is not None:
        with pytest.raises(UserError, match="no weight can stand for"):
            vlm_jax.merge(model, trained)
    else:
        merged = vlm_jax.merge(model, trained)
        assert flatten(merged).keys() == flatten(base.params).keys()
        np.testing.assert_allclose(logits(base.model, merged, batch), after, atol=1e-4)


@pytest.mark.parametrize("method", fast(("lora", "pfeiffer"), METHODS))
def test_layers_without_a_scan_are_the_same(base, method):
    model, params, table = built(base, method)
    params = moved(params, table)
    with jax.disable_jit():
        unrolled = np.asarray(model.apply({"params": params}, base.batch))
    scanned = logits(model, params, base.batch)
    np.testing.assert_allclose(unrolled[base.batch.segments > 0], scanned, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_do_not_move(base, method):
    model, params, table = built(base, method, **{"model.freeze_layers": 1})
    trainable, frozen = vlm_jax.split(moved(params, table), table)
    tx = vlm_jax.optimizer(trainable, table, {"learning_rate": 1e-2, "max_steps": 1})
    step = jit(vlm_jax.make_step(model, tx))
    state, _ = step(vlm_jax.init_state(trainable, tx), frozen, base.batch)
    before, after = flatten(trainable), flatten(state.trainable)
    stacked = [path for path in before if "/language_model/layers/" in path]
    assert stacked
    for path in stacked:
        np.testing.assert_array_equal(after[path][0], before[path][0])
        assert np.abs(after[path][1] - before[path][1]).max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_it_works_on_a_4_bit_base(base, method):
    refused = {"full": "stored in 4 bits", "pissa": "quantizes a 4-bit base again"}
    if method in refused:
        with pytest.raises(UserError, match=refused[method]):
            built(base, method, "nf4-dq")
        return
    model, params, table = built(base, method, "nf4-dq")
    plain = logits(*vlm_jax.load(base.directory, quantize="nf4-dq"), base.batch)
    if method != "loftq":
        np.testing.assert_allclose(logits(model, params, base.batch), plain, atol=1e-5)
    value, grads = value_and_grad(model, moved(params, table), table, base.batch)
    assert np.isfinite(value) and all(np.abs(grad).max() > 0 for grad in grads.values())
