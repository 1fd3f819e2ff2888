"""Dropout by a counter's hash: its statistics, independence, where it lies; threefry as it was."""

import itertools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs import lines, make_config, run, write_recipe
from safetensors.numpy import load_file

from vlm_jax import UserError
from vlm_jax.cli import main
from vlm_jax.config.choices import CHOICES
from vlm_jax.models.layers.dropout import KEEP, dropped, hashed_keep, seed_of
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.sharding import make_mesh

RATE, SHAPE = 0.05, (512, 1024)
SEEDS = [(0, 0), (1, 0), (0, 1), (12345, 678910), (2**32 - 1, 2**31)]


@pytest.fixture(scope="module")
def masks():
    """What is dropped, bool [512, 1024], of each of the seeds."""
    drop = jax.jit(lambda seed: ~hashed_keep(seed, SHAPE, RATE))
    return [np.asarray(drop(jnp.array(seed, jnp.uint32))) for seed in SEEDS]


def sigmas(hits, of, rate):
    """Return by how many standard deviations a count differs from its expectation."""
    return abs(hits - of * rate) / np.sqrt(of * rate * (1 - rate))


def check_independent(one, other):
    """Assert that two masks of as many places are: all four cells of the 2 x 2 table."""
    for a, b in itertools.product((False, True), repeat=2):
        expected = (RATE if a else 1 - RATE) * (RATE if b else 1 - RATE)
        hits = np.sum((one == a) & (other == b))
        assert sigmas(hits, one.size, expected) < 4.5, (a, b)


def test_the_share_of_what_is_dropped(masks):
    for mask in masks:
        assert sigmas(mask.sum(), mask.size, RATE) < 4
        # Nor does a row or a column have more of it than another.
        for axis in (0, 1):
            counts, of = mask.sum(axis), mask.shape[axis]
            assert np.max(sigmas(counts, of, RATE)) < 6
            assert np.var(counts) == pytest.approx(of * RATE * (1 - RATE), rel=0.25)


@pytest.mark.parametrize("rate", [0.001, 0.3, 0.5, 0.999])
def test_any_rate(rate):
    drop = ~hashed_keep(jnp.array([5, 6], jnp.uint32), SHAPE, rate)
    assert sigmas(int(drop.sum()), drop.size, rate) < 4


def test_seeds_are_independent(masks):
    for one, other in itertools.combinations(masks, 2):
        check_independent(one, other)


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbours_are_independent_and_nothing_repeats(masks, axis):
    for mask in masks[:3]:
        for step in (*(1 << k for k in range(9)), 3, 5):
            there, here = np.split(mask, [step], axis)[1], np.split(mask, [-step], axis)[0]
            check_independent(here, there)


def test_rows_of_a_batch_have_masks_of_their_own(masks):
    rows = ~np.asarray(hashed_keep(jnp.array([7, 8], jnp.uint32), (4, 128, 1024), RATE))
    for one, other in itertools.combinations(rows, 2):
        check_independent(one, other)
    check_independent(rows.reshape(SHAPE), masks[0])


def test_a_mask_does_not_depend_on_how_it_is_spread():
    mesh = make_mesh(data=2, fsdp=2, context=2)
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context", None))
    keep = lambda seed: hashed_keep(seed, (4, 6, 10), 0.5)  # noqa: E731
    seed = jnp.array([1, 2], jnp.uint32)
    ours = jax.jit(keep, out_shardings=spread)(seed)
    assert not ours.is_fully_replicated
    np.testing.assert_array_equal(ours, keep(seed))


class Two(nn.Module):
    """The dropout seeds of two modules, one of which is called twice."""

    @nn.compact
    def __call__(self):
        one, other = Seed(), Seed()
        return one(), one(), other()


class Seed(nn.Module):
    @nn.compact
    def __call__(self):
        return seed_of(self)


def test_each_module_call_and_key_has_a_seed_of_its_own():
    keys = [*jax.random.split(jax.random.key(0), 3), jax.random.key(1), jax.random.PRNGKey(2)]
    seeds = [tuple(map(int, s)) for k in keys for s in Two().apply({}, rngs={"dropout": k})]
    assert len(set(seeds)) == len(seeds) == 15
    assert len({word for seed in seeds for word in seed}) == 30
    again = Two().apply({}, rngs={"dropout": keys[0]})
    assert [tuple(map(int, seed)) for seed in again] == seeds[:3]


def test_the_registry_is_what_a_config_may_name():
    assert (None, *KEEP) == CHOICES["training.dropout_rng"]


class Old(nn.Module):
    """Dropout as it was before there was a choice."""

    @nn.compact
    def __call__(self, x):
        return jnp.where(jax.random.bernoulli(self.make_rng("dropout"), 0.75, x.shape), x / 0.75, 0)


class New(nn.Module):
    @nn.compact
    def __call__(self, x):
        return dropped(self, x, 0.25, "threefry")


def test_threefry_masks_are_as_they_were():
    x, rngs = jnp.arange(1.0, 97).reshape(8, 12), {"dropout": jax.random.key(3)}
    old = Old().apply({}, x, rngs=rngs)
    np.testing.assert_array_equal(New().apply({}, x, rngs=rngs), old)
    eye = {"kernel": jnp.zeros((12, 12)), "lora_A": jnp.eye(12), "lora_B": jnp.eye(12)}
    layer = Linear(12, False, jnp.float32, LoRAScale(12, 0.25, rng="threefry"))
    np.testing.assert_array_equal(layer.apply({"params": eye}, x, rngs=rngs), old)


def test_no_threefry_in_a_layer():
    leaves = {"kernel": jnp.ones((4, 4)), "lora_A": jnp.ones((4, 2)), "lora_B": jnp.ones((2, 4))}

    def text(rng):
        layer = Linear(4, False, jnp.float32, LoRAScale(2, 0.5, rng=rng))
        run = lambda key: layer.apply({"params": leaves}, jnp.ones((3, 4)), rngs={"dropout": key})  # noqa: E731
        return jax.jit(run).lower(jax.random.key(0)).as_text()

    assert "threefry" in text("threefry") and "threefry" not in text("hashed")


# Runs

LEARNED = ("lora.dropout=0.3", "training.save_total_limit=0")


def halted(place, name, rng):
    """Train 4 steps, then take the last two away; return the run and its adapter."""
    _, directory, _ = run(place, name, *LEARNED, f"training.dropout_rng={rng}")
    adapter = load_file(directory / "adapter/adapter_model.safetensors")
    shutil.rmtree(directory / "adapter")
    shutil.rmtree(directory / "checkpoints/4")
    return directory, adapter


def make_old(directory):
    """Take the key out of what a run has written, as if it were of an older version."""
    for file in (directory / "config.json", *directory.glob("checkpoints/*/meta/metadata")):
        settings = json.loads(file.read_text())
        del settings.get("identity", settings)["training"]["dropout_rng"]
        file.write_text(json.dumps(settings))


def test_a_run_from_before_resumes_with_threefry(place):
    directory, expected = halted(place, "old", "threefry")
    make_old(directory)
    with pytest.raises(UserError, match=r"has training\.dropout_rng=threefry.*=hashed\."):
        run(place, "old", *LEARNED, "training.dropout_rng=hashed", resume=True)
    *_, text = run(place, "old", *LEARNED, resume=True)
    assert "older than training.dropout_rng: it resumes with threefry" in text
    ours = load_file(directory / "adapter/adapter_model.safetensors")
    for name, leaf in expected.items():
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)
    stored = json.loads((directory / "config.json").read_text())
    assert stored["training"]["dropout_rng"] == "threefry"


def test_the_checkpoint_says_so_where_the_config_is_lost(place):
    directory, _ = halted(place, "lost", "threefry")
    make_old(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"'training\.dropout_rng' was 'threefry' .* 'hashed' now"):
        run(place, "lost", *LEARNED, resume=True)


def test_the_setting_by_the_command(place, tmp_path, capsys):
    """The masks differ; a resume that names others than the run's is refused."""
    short = (*LEARNED, "training.max_steps=2", "training.save_steps=1", "training.warmup_ratio=0")
    losses = {}
    for rng in KEEP:
        (tmp_path / rng).mkdir()
        recipe = write_recipe(tmp_path / rng, place / "base", place / "data/train.jsonl", *short)
        command = ["train", "--config", str(recipe)]
        assert main([*command, f"--training.dropout_rng={rng}"]) == 0
        losses[rng] = [row["loss"] for row in lines(tmp_path / rng / "out/metrics.jsonl")]
    assert losses["hashed"][0] == losses["threefry"][0]  # B is zero
    assert losses["hashed"][1] != losses["threefry"][1]
    assert main([*command, "--resume", "--training.dropout_rng=hashed"]) == 2
    assert "cannot be resumed with training.dropout_rng=hashed" in capsys.readouterr().err
    with pytest.raises(UserError, match="dropout_rng' is 'murmur'"):
        make_config(place / "base", place / "data", tmp_path, "training.dropout_rng=murmur")
