"""A checkpoint comes back bit for bit, and only into the run that it belongs to."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from vlm_jax import UserError
from vlm_jax.distributed import processes
from vlm_jax.train.checkpoint import Checkpoints, flat_state

pytestmark = pytest.mark.exact

TABLE = [(r"a/.*", "full"), (r".*", "full(0.5)")]


def make_state(width=3, seed=0):
    rng = np.random.default_rng(seed)
    tree = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)},
        "b": {"bias": jnp.asarray(rng.normal(size=(width,)), jnp.float32)},
    }
    tx = vlm_jax.optimizer(tree, TABLE, {"max_steps": 10})
    state = vlm_jax.init_state(tree, tx, seed)
    _, opt_state = tx.update(tree, state.opt_state, tree)
    return vlm_jax.TrainState(state.step + 3, state.trainable, opt_state, state.rng)


def test_state_and_data_position_come_back_bit_for_bit(tmp_path):
    state = make_state()
    saved = Checkpoints(tmp_path / "c", {"base": {"x": "1"}})
    saved.save(3, state, {"epoch": 1, "step": 2})
    saved.close()
    again = Checkpoints(tmp_path / "c", {"base": {"x": "1"}})
    back, data = again.restore(make_state(seed=5))
    again.close()
    assert data == {"epoch": 1, "step": 2}
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for name, leaf in flat_state(state).items():
        np.testing.assert_array_equal(leaf, flat_state(back)[name], err_msg=name)
        assert leaf.dtype == flat_state(back)[name].dtype
    np.testing.assert_array_equal(jax.random.bits(back.rng, (4,)), jax.random.bits(state.rng, (4,)))


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, {}, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(), {})
    checkpoints.close()
    assert checkpoints.steps == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_an_old_one_is_gone_at_once_and_removed_later(tmp_path):
    """Killed while it removes files, a run must not leave a part of a checkpoint as one."""
    checkpoints = Checkpoints(tmp_path, {"base": "a"}, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(), {"step": step})
        checkpoints.finish()
        there = [] if step == 1 else [str(step - 1)]
        assert sorted(path.name for path in tmp_path.glob("deleted/*")) == there
        assert checkpoints.steps == [step]
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_another_base_shape_or_empty_directory_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"base": {"model.safetensors": "aa"}})
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.restore(make_state())
    checkpoints.save(1, make_state(), {})
    with pytest.raises(UserError, match=r"a\.kernel.*float32\[4, 3\].*float32\[4, 5\]"):
        checkpoints.restore(make_state(width=5))
    checkpoints.close()
    other = Checkpoints(tmp_path, {"base": {"model.safetensors": "bb"}})
    with pytest.raises(UserError, match=r"base\.model\.safetensors' was 'aa'.*'bb' now"):
        other.restore(make_state())
    other.close()


@pytest.mark.parametrize("item", ["state", "meta"])
def test_a_damaged_checkpoint_is_named(tmp_path, item):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, make_state(), {})
    checkpoints.finish()
    for path in (tmp_path / "1" / item).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:1])
    with pytest.raises(UserError, match=r"checkpoint '.*/1' is damaged.*Delete it"):
        checkpoints.restore(make_state())
    checkpoints.close()


def test_a_save_keeps_the_state_of_its_step_whatever_comes_after(tmp_path):
    """The step after donates the arrays while they are still being written."""
    state = make_state(width=50_000)
    kept = {name: np.array(leaf) for name, leaf in flat_state(state).items()}
    grow = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, state, {})
    moved = (state.trainable, state.opt_state)
    for _ in range(20):
        moved = grow(moved)
    jax.block_until_ready(moved)
    back, _ = checkpoints.restore(make_state(width=50_000, seed=7))
    checkpoints.close()
    for name, leaf in flat_state(back).items():
        np.testing.assert_array_equal(leaf, kept[name], err_msg=name)


def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(seed=step), {"step": step})
    checkpoints.finish()
    for step in (2, 3):
        for path in (tmp_path / str(step) / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:1])
    said = []
    back, data = checkpoints.restore_newest(make_state(), said.append)
    assert data == {"step": 1} and len(said) == 2
    assert "checkpoint '" in said[0] and "/3' is damaged" in said[0] and "step 2" in said[0]
    for name, leaf in flat_state(make_state(seed=1)).items():
        np.testing.assert_array_equal(leaf, flat_state(back)[name], err_msg=name)
    checkpoints.save(3, back, {"step": 3})  # the step can be saved again
    assert checkpoints.restore_newest(make_state(), said.append)[1] == {"step": 3}
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1", "3", "damaged-2", "damaged-3"]
    checkpoints.finish()
    for path in (tmp_path / "1" / "meta").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    (tmp_path / "3").rename(tmp_path / "away")
    checkpoints.manager.reload()
    with pytest.raises(UserError, match="/1' is damaged"):  # nothing before it
        checkpoints.restore_newest(make_state(), said.append)
    checkpoints.close()


def test_damage_that_another_process_sees_counts_in_all(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {})
    for step in (1, 2):
        checkpoints.save(step, make_state(seed=step), {"step": step})
    checkpoints.finish()
    gather, reads = processes.gather, []

    def with_another(name, value):
        told = gather(name, value)
        if name == "a checkpoint was read":
            reads.append(value)
            told = [*told, "The other cannot read it." if len(reads) == 2 else None]
        return told

    monkeypatch.setattr(processes, "gather", with_another)
    said = []
    assert checkpoints.restore_newest(make_state(), said.append)[1] == {"step": 1}
    assert reads == [None] * 4 and len(said) == 1 and "The other cannot read it." in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "damaged-2"]
    checkpoints.close()


def test_a_checkpoint_that_knows_its_base_in_another_way_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, make_state(), {})
    checkpoints.finish()
    file = tmp_path / "1/meta/metadata"
    meta = json.loads(file.read_text())
    del meta["format"]
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="written by another version of vlm_jax"):
        checkpoints.restore(make_state())
    checkpoints.close()
