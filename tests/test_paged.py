"""Paged moments lie in host memory for good, and train to the very numbers of unpaged ones."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from several import programs
from transformers import TrainingArguments

import vlm_jax
from vlm_jax import UserError, config
from vlm_jax.config import choices
from vlm_jax.sharding import make_mesh
from vlm_jax.train import moments
from vlm_jax.train.checkpoint import Checkpoints, flat_state
from vlm_jax.train.optimizer import OptimizerSettings
from vlm_jax.train.placement import on_mesh
from vlm_jax.trees import flatten, unflatten

pytestmark = pytest.mark.exact

SHAPES = {
    "a/kernel": (256, 400),
    "a/bias": (400,),
    "b/lora_A": (4, 400, 64),
    "b/lora_B": (4, 64, 400),
    "c/embedding": (1000, 104),
    "d/scale": (40, 2600),  # a stack of vectors: of each, eight-bit optimizers keep float32 moments
}
PAGED = {"a/kernel", "b/lora_A", "b/lora_B", "c/embedding", "d/scale"}
TABLE = [(r"b/.*", "lora"), (r".*", "full(0.5)")]
SPECS = {
    "a/kernel": PartitionSpec("fsdp", "tensor"),
    "b/lora_A": PartitionSpec(None, "fsdp", None),
    "b/lora_B": PartitionSpec(None, None, "tensor"),
    "c/embedding": PartitionSpec("tensor", "fsdp"),
    "d/scale": PartitionSpec(None, "fsdp"),
}


def drawn(mesh=None):
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in SHAPES.items():
        flat[path] = jnp.asarray(0.05 * rng.normal(size=shape), jnp.float32)
        if mesh is not None:
            spec = SPECS.get(path, PartitionSpec())
            flat[path] = jax.device_put(flat[path], NamedSharding(mesh, spec))
    return unflatten(flat)


def loss(params, key):
    x_BD = jax.random.normal(key, (32, 256))
    h_BD = jnp.tanh(x_BD @ params["a"]["kernel"] + params["a"]["bias"][None])

    def layer(h_BD, low):
        return h_BD + jnp.tanh(h_BD @ low["lora_A"]) @ low["lora_B"], None

    h_BD, _ = jax.lax.scan(layer, h_BD, params["b"])
    rows = params["c"]["embedding"][jax.random.randint(key, (32,), 0, 1000)]
    scales = jnp.mean((params["d"]["scale"] - 0.1) ** 2)
    return jnp.mean((h_BD[:, :104] - rows) ** 2) + jnp.mean(h_BD**2) + scales


def begin(optim, mesh=None):
    """Return (state before the first step, optimizer)."""
    trainable = drawn(mesh)
    training = {"optim": optim, "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 300}
    tx = vlm_jax.optimizer(trainable, TABLE, {**training, "warmup_steps": 5})
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return on_mesh(vlm_jax.init_state(trainable, tx), mesh), tx


def start(optim, mesh=None):
    """Return (state, compiled step): the state is donated and comes back where it lay."""
    state, tx = begin(optim, mesh)

    def step(state):
        key = jax.random.fold_in(state.rng, state.step)
        value, grads = jax.value_and_grad(loss)(state.trainable, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return vlm_jax.TrainState(state.step + 1, trainable, opt_state, state.rng), value

    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    return state, jax.jit(step, donate_argnums=0, out_shardings=(placed, None)).lower(
        state
    ).compile()


def run(state, step, steps):
    values = []
    for _ in range(steps):
        state, value = step(state)
        values.append(float(value))
    return state, values


def kept(state):
    """Return {path of a parameter: its moments' arrays}."""
    found = {}
    for path, leaf in flat_state(state).items():
        for name in SHAPES:
            if path.startswith("opt_state") and f".{name.replace('/', '.')}" in path:
                found.setdefault(name, []).append(leaf)
    return found


def check_places(state, memory="pinned_host"):
    found = kept(state)
    assert set(found) == set(SHAPES)
    for path, arrays in found.items():
        kinds = {array.sharding.memory_kind for array in arrays}
        assert kinds == {memory if path in PAGED else "device"}, path


@pytest.mark.nightly
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_300_steps_paged_equal_unpaged_bit_for_bit(optim):
    plain, plain_values = run(*start(optim), 300)
    paged, paged_values = run(*start(f"paged_{optim}"), 300)
    assert plain_values == paged_values and plain_values[-1] < 0.1 * plain_values[0]
    for path, leaf in flatten(plain.trainable).items():
        np.testing.assert_array_equal(leaf, flatten(paged.trainable)[path], err_msg=path)
    check_places(paged)
    check_places(plain, "device")


@pytest.mark.parametrize("optim", ["paged_adamw", "paged_adamw_8bit"])
def test_pages_stay_in_host_memory_through_steps_and_checkpoints(tmp_path, optim):
    state, step = start(optim)
    check_places(state)
    state, _ = run(state, step, 3)
    check_places(state)
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(3, state, {})
    state, straight = run(state, step, 3)
    again, step = start(optim)
    again, _ = checkpoints.restore(again)
    checkpoints.close()
    check_places(again)
    again, resumed = run(again, step, 3)
    assert resumed == straight
    check_places(again)
    check_same(again, state)


def check_same(state, other):
    assert flat_state(state).keys() == flat_state(other).keys()
    for name, leaf in flat_state(state).items():
        np.testing.assert_array_equal(leaf, flat_state(other)[name], err_msg=name)


@pytest.mark.parametrize("before", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_a_run_goes_on_with_the_other_paging_bit_for_bit(tmp_path, before):
    after = before.removeprefix("paged_") if "paged" in before else f"paged_{before}"
    state, _ = run(*start(before), 2)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(2, state, {})
        again, step = start(after)
        again, _ = checkpoints.restore(again)
        sharded, _ = begin(after, make_mesh(data=1, fsdp=4, tensor=2))
        wanted = jax.tree.map(lambda leaf: leaf.sharding, sharded)
        sharded, _ = checkpoints.restore(sharded)
    check_places(again, "pinned_host" if "paged" in after else "device")
    check_same(again, sharded)
    for leaf, sharding in zip(jax.tree.leaves(sharded), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == sharding
    again, values = run(again, step, 2)
    # Paged or not, the numbers are the same.
    straight, all_values = run(begin(after)[0], step, 4)
    assert values == all_values[2:]
    check_same(again, straight)


GOES_ON = """
import sys
from vlm_jax.distributed.failures import together

with together(lambda error: 2):
    from test_paged import begin
    from vlm_jax.sharding import make_mesh
    from vlm_jax.train.checkpoint import Checkpoints

    with Checkpoints(sys.argv[1], {}) as checkpoints:
        state, _ = checkpoints.restore(begin("adamw", make_mesh(data=1, fsdp=4, tensor=2))[0])
        checkpoints.save(1, state, {})
        state, _ = checkpoints.restore(begin("paged_adamw", make_mesh(1, 2, 4))[0], 1)
        checkpoints.save(2, state, {})
"""


@pytest.mark.nightly
def test_several_processes_turn_moments_as_one_does(tmp_path):
    state, _ = run(*start("paged_adamw"), 2)
    with Checkpoints(tmp_path / "checkpoints", {}) as checkpoints:
        checkpoints.save(0, state, {})
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    arguments = ("-c", GOES_ON, str(tmp_path / "checkpoints"))
    with programs(tmp_path, arguments, "turned", 2, PYTHONPATH=path) as group:
        assert [one.ended() for one in group] == [0, 0], [one.text for one in group]
    with Checkpoints(tmp_path / "checkpoints", {}) as checkpoints:
        for step, optim in ((1, "adamw"), (2, "paged_adamw")):
            sizes = [leaf.shape for leaf in jax.tree.leaves(begin(optim)[0].opt_state)]
            saved = checkpoints.meta(step)["shapes"].items()
            saved = [s.partition("[")[2] for name, s in saved if name.startswith("opt_state")]
            assert saved == [str(list(size))[1:] for size in sizes]
            check_same(checkpoints.restore(begin("paged_adamw")[0], step)[0], state)


@pytest.mark.parametrize("optim", ["paged_adamw", "paged_adamw_8bit"])
def test_pages_are_sharded_as_their_leaves(optim):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    state, step = start(optim, mesh)
    parts = {
        path: {array.shape: array.sharding.shard_shape(array.shape) for array in arrays}
        for path, arrays in kept(state).items()
    }
    if optim == "paged_adamw":
        assert parts["a/kernel"] == {(2, 128, 400): (2, 32, 200)}
        assert parts["b/lora_A"] == {(4, 1, 400, 64): (4, 1, 100, 64)}
        assert parts["b/lora_B"] == {(4, 1, 64, 400): (4, 1, 64, 200)}
        assert parts["c/embedding"] == {(2, 500, 104): (2, 250, 26)}
    else:  # blocks of 256 leave fewer places to cut
        assert parts["b/lora_B"][4, 1, 100, 256] == (4, 1, 50, 256)
        assert parts["a/kernel"][2, 1, 256, 200] == (2, 1, 256, 100)
    state, sharded = run(state, step, 5)
    check_places(state)
    for path, arrays in kept(state).items():
        for array in arrays:
            assert array.sharding.shard_shape(array.shape) == parts[path][array.shape], path
    _, single = run(*start(optim), 5)
    np.testing.assert_allclose(sharded, single, rtol=1e-4)


def test_a_state_can_be_planned_and_made_inside_jit():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    trainable = drawn(mesh)
    tx = vlm_jax.optimizer(trainable, TABLE, {"optim": "paged_adamw_8bit"})
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    planned = tx.init(jax.tree.map(struct, trainable))
    made = tx.init(trainable)
    for plan, array in zip(jax.tree.leaves(planned), jax.tree.leaves(made), strict=True):
        assert (plan.shape, plan.dtype) == (array.shape, array.dtype)
        assert array.ndim == 0 or plan.sharding == array.sharding
    jitted = jax.tree.map(lambda x: x.sharding.memory_kind, jax.jit(tx.init)(trainable))
    assert jitted == jax.tree.map(lambda x: x.sharding.memory_kind, made)


@pytest.mark.parametrize(
    "shape, cut",
    [
        ((28, 3584, 64), (28, 0)),
        ((151936, 1536), (16, 0)),
        ((5120, 5120), (16, 0)),
        ((50257, 768), (16, 1)),  # 50257 = 29 * 1733
        ((100003,), (1, 0)),  # prime
    ],
)
def test_pages_are_equal_and_neither_tiny_nor_huge(shape, cut):
    pages = moments.pages_of(moments.Store(shape), shape, paged=True)
    assert (pages.count, pages.axis) == cut
    split = jax.eval_shape(pages.split_axis, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert jax.eval_shape(pages.merge_axis, split).shape == shape


def test_a_device_without_host_memory_is_refused(monkeypatch):
    trainable = drawn()
    tx = vlm_jax.optimizer(trainable, TABLE, {"optim": "paged_adamw"})
    monkeypatch.setattr(moments, "memory_kinds", lambda device: ["device"])
    with pytest.raises(UserError, match="no 'pinned_host' memory.*training.optim='adamw'"):
        tx.init(trainable)


def test_names_of_optimizers(tmp_path):
    trainable = drawn()
    for name, same in choices.OPTIMIZERS.items():
        assert config.load(None, [f"training.optim={name}"]).training.optim == name
        state = vlm_jax.optimizer(trainable, TABLE, {"optim": name}).init(trainable)
        other = vlm_jax.optimizer(trainable, TABLE, {"optim": same}).init(trainable)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, other)
    args = TrainingArguments(str(tmp_path), optim="paged_adamw_32bit", use_cpu=True, max_steps=3)
    assert OptimizerSettings.of(args).optim == "paged_adamw_32bit"
    assert OptimizerSettings.of(TrainingArguments(str(tmp_path), use_cpu=True)).optim in (
        choices.OPTIMIZERS
    )
    with pytest.raises(UserError, match="did you mean 'paged_adamw'"):
        vlm_jax.optimizer(trainable, TABLE, {"optim": "pagd_adamw"})


def test_placing_a_state_on_a_mesh_leaves_pages_in_host_memory():
    trainable = drawn()
    tx = vlm_jax.optimizer(trainable, TABLE, {"optim": "paged_adamw"})
    state = on_mesh(vlm_jax.init_state(trainable, tx), make_mesh())
    check_places(state)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state))
