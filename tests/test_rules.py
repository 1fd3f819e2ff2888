"""Adafactor, Lion and Muon: transformers', bitsandbytes' and optax's, on each layer by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from runs import make_config
from transformers import get_scheduler
from transformers.optimization import Adafactor

import vlm_jax
from vlm_jax import UserError
from vlm_jax.config.checks import optimizer_name
from vlm_jax.config.choices import OPTIMIZERS
from vlm_jax.sharding import make_mesh
from vlm_jax.train.checkpoint import Checkpoints, flat_state
from vlm_jax.train.estimate import estimate
from vlm_jax.train.optimizers import promoting, takes
from vlm_jax.train.placement import abstract_state, on_mesh
from vlm_jax.trees import flatten, unflatten

TABLE = [("tower/.*", "full(0.5)"), (".*/lora_.", "lora"), (".*", "full")]
TRAINING = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "max_steps": 12,
}


def make_params(seed=0):
    """Three layers in a stack, whose rank is below their number, and leaves of one tensor."""
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    layer = {"kernel": leaf(3, 8, 4), "bias": leaf(3, 4), "lora_A": leaf(3, 8, 2)}
    return {
        "decoder": {"layers": {"q_proj": {**layer, "lora_B": leaf(3, 2, 4)}}},
        "tower": {"patch_embed": {"kernel": leaf(6, 8)}, "fc": {"kernel": leaf(4, 16)}},
        "norm": {"scale": leaf(8)},
        "lm_head": {"kernel": leaf(8, 12)},
    }


def tensors(path, leaf):
    """Return the arrays of PyTorch's tensors of a leaf."""
    one = 2 if path.rsplit("/", 1)[-1] in ("kernel", "lora_A", "lora_B") else 1
    return list(leaf) if leaf.ndim > one else [leaf]


def gradients(step):
    rng = np.random.default_rng(100 + step)
    leaves = sorted(flatten(make_params()).items())
    return {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in leaves}


def ours(optim, steps=8, mesh=None, **training):
    """Return (the trained leaves, the state) after some steps of drawn gradients."""
    params = make_params()
    if mesh is not None:
        params = jax.device_put(params, shardings(params, mesh))
    tx = vlm_jax.optimizer(params, TABLE, {**TRAINING, "optim": optim, **training})
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        grads = unflatten(gradients(step))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return flatten(params), state


def theirs(make, steps=8):
    """Return the leaves that an optimizer of PyTorch gives, layer by layer."""
    params = flatten(make_params())
    there = {
        path: [torch.nn.Parameter(torch.tensor(np.asarray(t))) for t in tensors(path, leaf)]
        for path, leaf in params.items()
    }
    groups = [
        {
            "params": found,
            "lr": 1e-2 * (0.5 if path.startswith("tower") else 1.0),
            "weight_decay": 0.0 if path.endswith(("bias", "scale")) else 0.1,
        }
        for path, found in there.items()
    ]
    optimizer = make(groups)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=12)
    every = [tensor for found in there.values() for tensor in found]
    for step in range(steps):
        for path, grad in gradients(step).items():
            for tensor, part in zip(there[path], tensors(path, grad), strict=True):
                tensor.grad = torch.tensor(part)
        torch.nn.utils.clip_grad_norm_(every, 1.0)
        optimizer.step()
        scheduler.step()
    return {
        path: np.stack([t.detach().numpy() for t in found]).reshape(params[path].shape)
        for path, found in there.items()
    }


def bitsandbytes_lion(groups):
    from bitsandbytes.optim import Lion

    return Lion(groups, betas=(0.9, 0.999))


REFERENCES = {
    "adafactor": lambda groups: Adafactor(groups, scale_parameter=False, relative_step=False),
    "lion_32bit": bitsandbytes_lion,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_updates_equal_the_references_layer_by_layer(name):
    found, wanted = ours(name)[0], theirs(REFERENCES[name])
    start = flatten(make_params())
    for path, leaf in found.items():
        assert np.abs(leaf - start[path]).max() > 1e-3
        np.testing.assert_allclose(leaf, wanted[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_muon_is_optax_for_each_hidden_matrix_and_adamw_for_the_rest():
    found, _ = ours("muon")
    adamw, _ = ours("adamw")
    hidden = {"decoder/layers/q_proj/kernel", "tower/fc/kernel"}
    for path, leaf in found.items():
        assert np.array_equal(leaf, adamw[path]) == (path not in hidden), path
    limit = [1.0 / (np.sqrt(sum((g**2).sum() for g in gradients(s).values())) + 1e-6)
             for s in range(8)]  # fmt: skip
    for path in hidden:
        scale = 0.5 if path.startswith("tower") else 1.0

        def rate(step, scale=scale):
            return 1e-2 * scale * jnp.where(step < 2, step / 2, (12 - step) / 10)

        one = promoting(optax.contrib.muon(rate, weight_decay=0.1, consistent_rms=0.2))
        layers = tensors(path, flatten(make_params())[path])
        for layer, value in enumerate(layers):
            state = one.init(value)
            for step in range(8):
                grad = tensors(path, gradients(step)[path])[layer] * limit[step]
                updates, state = one.update(jnp.asarray(grad), state, value)
                value = value + updates
            got = tensors(path, found[path])[layer]
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=path)


def shardings(params, mesh):
    def place(leaf):
        names = [None] * leaf.ndim
        names[-1] = "fsdp" if leaf.shape[-1] % 4 == 0 else None
        return jax.NamedSharding(mesh, jax.P(*names))

    return jax.tree.map(place, params)


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_states_lie_beside_their_leaves_and_come_back_from_a_checkpoint(name, tmp_path):
    mesh = make_mesh(1, 4, 1, jax.devices()[:4])
    params = jax.device_put(make_params(), shardings(make_params(), mesh))
    tx = vlm_jax.optimizer(params, TABLE, {**TRAINING, "optim": name})
    state = on_mesh(vlm_jax.init_state(params, tx), mesh)
    planned = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    planned = flat_state(abstract_state(planned, tx, mesh).opt_state)
    spread = 0
    for path, leaf in flat_state(state.opt_state).items():
        assert (planned[path].shape, planned[path].dtype) == (leaf.shape, leaf.dtype), path
        assert leaf.sharding.is_equivalent_to(planned[path].sharding, leaf.ndim), path
        spread += not leaf.sharding.is_fully_replicated
    assert spread > (0 if name == "adafactor" else 4)
    alone, _ = ours(name)
    meshed, last = ours(name, mesh=mesh)
    for path, leaf in alone.items():
        np.testing.assert_allclose(leaf, meshed[path], rtol=1e-4, atol=1e-5, err_msg=path)
    moved = vlm_jax.TrainState(state.step + 8, unflatten(meshed), last, state.rng)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(8, moved, {})
        back, _ = checkpoints.restore(state)
    for path, leaf in flat_state(moved).items():
        np.testing.assert_array_equal(leaf, flat_state(back)[path], err_msg=path)


def test_states_are_as_small_as_they_should_be():
    size = lambda name: sum(x.size for x in jax.tree.leaves(ours(name, 1)[1]))  # noqa: E731
    elements = sum(x.size for x in jax.tree.leaves(make_params()))
    assert elements < size("lion") < elements + 50
    assert size("adafactor") < 0.7 * elements


def test_the_estimate_knows_them(place):
    def moments(name):
        made = make_config(place / "base", place, place, "lora.enabled=false",
                           f"training.optim={name}")  # fmt: skip
        found = estimate(made, (32, 16))
        return found.moments / (found.trained // 3)  # masters, gradients, copies; all float32

    assert moments("adamw") == pytest.approx(2, rel=0.01)
    assert moments("lion") == pytest.approx(1, rel=0.01)
    assert moments("adafactor") < 0.3
    assert 1.05 < moments("muon") < 1.95


def test_muon_alone_leaves_leaves_to_adamw():
    embedding = "model/language_model/embed_tokens/embedding"
    for name in OPTIMIZERS:
        assert takes(optimizer_name(name), embedding) == (optimizer_name(name) != "muon")


def test_names_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="paged_lion_8bit', which is not supported"):
        ours("paged_lion_8bit", 1)
