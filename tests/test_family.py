"""A family is one file and one line: `toy_family`, which no other family is like, trains."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_files import image_and_text, llava_files, text, write_image
from toy_family import Toy

import vlm_jax
from vlm_jax.data import Encoder
from vlm_jax.models import MODELS
from vlm_jax.trees import flatten


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "toy", Toy)  # the one line
    crop = {"height": 12, "width": 12}
    base = llava_files(tmp_path, size={"shortest_edge": 12}, crop_size=crop)
    raw = {**json.loads((base / "config.json").read_text()), "model_type": "toy"}
    raw["image_token_id"] = raw.pop("image_token_index", None) or raw["image_token_id"]
    (base / "config.json").write_text(json.dumps(raw))
    return Encoder(base)


def record(folder, seed, images):
    files = [str(write_image(folder / f"{seed}-{k}.png", 20, 16, seed + k)) for k in range(images)]
    asked = image_and_text("What color is the ball?", images)
    return {
        "id": str(seed),
        "messages": [asked, text("assistant", "red")],
        "images": files,
        "videos": [],
        "image_folder": str(folder),
    }


def test_a_family_of_learned_rows_and_unlike_counts_trains(encoder, tmp_path):
    encoder = encoder.replace(image_folder=tmp_path, allow_absolute_paths=True)
    examples = [
        encoder.example(record(tmp_path, seed, n)) for seed, n in ((0, 2), (10, 0), (20, 1))
    ]
    counts = [int((e["tokens"] == encoder.config.image_token_id).sum()) for e in examples]
    assert counts == [12, 0, 6] and [len(e["patches"]) for e in examples] == [18, 0, 9]

    model = vlm_jax.from_config(encoder.hf_config)
    params = model.init(jax.random.key(0))
    length = sum(len(e["tokens"]) for e in examples)
    alone = model.collate([[e] for e in examples], length, 27)
    packed = model.collate([examples], length, 36)
    index = packed.image_index[0]
    expected = [0, 1, -2, 2, 3, -2, 4, 5, -2, 6, 7, -2, 8, 9, -2, 10, 11, -2]
    assert index[index != -1].tolist() == expected

    # In its place each token has its image's feature, or the learned row: packed as alone.
    embedded = model.apply({"params": params}, packed, method="embed")[0]
    learned = params["model"]["image_newline"]
    np.testing.assert_array_equal(embedded[index == -2], jnp.tile(learned, (6, 1)))
    features = model.apply({"params": params}, packed, method="see")[0]
    np.testing.assert_array_equal(embedded[index >= 0], features[:12])
    each = model.apply({"params": params}, alone)
    own = [row[: len(e["tokens"])] for row, e in zip(each, examples, strict=True)]
    logits = model.apply({"params": params}, packed)[0]
    np.testing.assert_allclose(logits, np.concatenate(own), atol=1e-5)

    table = [(r"model/(connector/.*|image_newline)", "full"), (r".*", "frozen")]
    trainable, frozen = vlm_jax.split(params, table)
    tx = optax.sgd(0.1)
    state = vlm_jax.init_state(trainable, tx)
    state, metrics = jax.jit(vlm_jax.make_step(model, tx))(state, frozen, packed)
    moved = flatten(state.trainable)
    assert moved.keys() == {"model/connector/kernel", "model/image_newline"}
    before = flatten(params)
    assert all((np.asarray(moved[path]) != np.asarray(before[path])).any() for path in moved)
    assert np.isfinite(metrics["loss"])
