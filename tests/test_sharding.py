"""One batch split in every way into micro-batches and devices gives the same gradient."""

import jax
import numpy as np
import optax
import pytest
from draws import shaken
from jax.sharding import NamedSharding
from references import IMAGE, llava, media, pad, qwen2_vl
from tiers import fast

import vlm_jax
from vlm_jax.hub import leaves
from vlm_jax.sharding import make_mesh, param_shardings, shard_batch, shard_params
from vlm_jax.trees import flatten

ROWS = 8
SPLITS = [
    (1, (8, 1, 1)), (1, (1, 8, 1)), (1, (2, 2, 2)), (1, (1, 1, 8)),
    (2, None), (2, (2, 2, 2)), (4, (1, 2, 1)), (8, None),
]  # fmt: skip


def setting(family, directory):
    """Return (model, trainable, frozen, batch of 8 rows of mixed lengths and images)."""
    rng = np.random.default_rng(0)
    if family == "qwen2_vl":
        qwen2_vl(directory, factor=3.0)
        model, params = vlm_jax.load(directory)
        grids = [(1, 4, 6), (1, 2, 2), (1, 2, 4), (1, 4, 4)] * 2
        images = [media(IMAGE, *grid) for grid in grids]
        patches = sum(t * h * w for t, h, w in grids)
        given = {
            "pixel_values": rng.normal(size=(patches, 96)).astype(np.float32),
            "image_grid_thw": np.array(grids),
        }
    else:
        llava(directory, "clip", "llama", factor=3.0)
        model, params = vlm_jax.load(directory)
        images = [[model.config.image_token_id] * model.config.image_tokens()] * ROWS
        given = {"pixel_values": rng.normal(size=(ROWS, 3, 30, 30)).astype(np.float32)}
    rows = [
        rng.integers(3, 90, rng.integers(1, 9)).tolist()
        + image
        + rng.integers(3, 90, rng.integers(1, 9)).tolist()
        for image in images
    ]
    ids, mask = pad(rows, left=False)
    lora = vlm_jax.LoRA(rank=4, alpha=8, targets="llama", modules_to_save=("projector",))
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    params = shaken(params, lambda path: path.endswith("lora_B"))
    table = vlm_jax.training_table(model, params)
    trainable, frozen = vlm_jax.split(params, table)
    return model, trainable, frozen, model.batch(ids, mask, **given)


def gradient(model, trainable, frozen, batch, micro_batches, sizes):
    """Return the step's gradient as one vector: `trace` without decay keeps it."""
    tx = optax.trace(decay=0.0)
    if sizes is not None:
        mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        trainable, frozen = (shard_params(model, tree, mesh) for tree in (trainable, frozen))
        batch = shard_batch(batch, mesh)
    state = vlm_jax.init_state(trainable, tx)
    step = jax.jit(vlm_jax.make_step(model, tx, micro_batches))
    state, metrics = step(state, frozen, batch)
    leaves = jax.tree.leaves(jax.device_get(state.opt_state.trace))
    return np.concatenate([leaf.ravel() for leaf in leaves]), float(metrics["loss"])


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def unsplit(request, tmp_path_factory):
    """A family's setting, and the gradient and loss of its batch in one piece on one device."""
    parts = setting(request.param, tmp_path_factory.mktemp("unsplit"))
    return parts, *gradient(*parts, 1, None)


@pytest.mark.parametrize(("micro_batches", "sizes"), fast(SPLITS[-3:], SPLITS))
def test_every_split_gives_the_same_gradient(unsplit, micro_batches, sizes):
    parts, whole, loss = unsplit
    assert np.abs(whole).max() > 1e-3
    vector, value = gradient(*parts, micro_batches, sizes)
    assert np.linalg.norm(vector - whole) / np.linalg.norm(whole) < 1e-6
    assert value == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_every_leaf_has_a_row_and_lora_follows_its_base(tmp_path, family):
    model, trainable, frozen, _ = setting(family, tmp_path)
    mesh = make_mesh(1, 4, 2)
    params = vlm_jax.join(trainable, frozen)
    specs = {path: s.spec for path, s in flatten(param_shardings(model, params, mesh)).items()}
    base = "model/language_model/layers/mlp/up_proj"
    assert tuple(specs[f"{base}/kernel"]) == (None, "fsdp", "tensor")
    assert tuple(specs[f"{base}/lora_A"]) == (None, "fsdp", None)
    assert tuple(specs[f"{base}/lora_B"]) == (None, None, "tensor")


def test_loading_onto_a_mesh_gives_the_same_parameters(tmp_path):
    qwen2_vl(tmp_path)
    _, plain = vlm_jax.load(tmp_path)
    _, placed = vlm_jax.load(tmp_path, mesh=make_mesh(2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, plain, jax.device_get(placed))
    leaf = flatten(placed)["model/language_model/layers/mlp/up_proj/kernel"]
    assert len({str(shard.index) for shard in leaf.addressable_shards}) == 4


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_a_process_holds_what_its_own_devices_get(tmp_path, monkeypatch, family):
    """As if only two of eight devices were this process's; they are neighbours on the fsdp axis."""
    setting(family, tmp_path)
    _, whole = vlm_jax.load(tmp_path)
    mesh, held = make_mesh(1, 4, 2), {}
    mine = [mesh.devices[0, i, 0, 0] for i in (1, 2)]
    real = NamedSharding.addressable_devices_indices_map
    monkeypatch.setattr(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {one: real(self, shape)[one] for one in mine},
    )

    def put_block(array, block, shape, sharding):
        held[id(array)] = array, block
        return array

    monkeypatch.setattr(leaves, "_put_block", put_block)
    _, placed = vlm_jax.load(tmp_path, mesh=mesh)
    smaller = 0
    for path, array in flatten(placed).items():
        array, block = held[id(array)]
        np.testing.assert_array_equal(array, np.asarray(flatten(whole)[path])[block], path)
        smaller += array.size < flatten(whole)[path].size
    kernel = held[id(flatten(placed)["model/language_model/layers/mlp/up_proj/kernel"])][0]
    full = flatten(whole)["model/language_model/layers/mlp/up_proj/kernel"].shape
    assert kernel.shape == (full[0], full[1] // 2, full[2] // 2) and smaller > 10


def test_a_mesh_that_does_not_cover_the_devices_is_refused():
    with pytest.raises(vlm_jax.UserError, match="8 devices"):
        make_mesh(3, 1, 1)
    for sizes in ((-1, 0, 1), (0, 1, 1), (-1, -2, 1), (-1, -1, 1)):
        with pytest.raises(vlm_jax.UserError, match="does not cover 8 devices"):
            make_mesh(*sizes)
