"""Text alone, for a model of images: no patches, the same losses, and what was not foreseen."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import yaml
from checkpoint_files import llava_files, qwen2_vl_files, write_image
from safetensors.numpy import load_file

import vlm_jax
import vlm_jax.data.pipeline as pipeline_module
from vlm_jax import config
from vlm_jax.batch import pad_patches
from vlm_jax.cli import main
from vlm_jax.data import Encoder, Pipeline
from vlm_jax.data.records.stream import open_stream
from vlm_jax.data.shapes import wider_shapes
from vlm_jax.models.pixel_table import LookUp
from vlm_jax.trees import flatten

FILES = {"qwen2_vl": qwen2_vl_files, "llava": llava_files}


def talk(number, images=()):
    """Return a record of a question of its own length about so many pictures."""
    question = "<image>" * len(images) + "What color is it? " * (1 + number % 3)
    turns = [{"role": "user", "content": question}]
    turns.append({"role": "assistant", "content": "red " * (1 + number % 2)})
    return {"id": f"r{number}", "images": list(images), "messages": turns}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def text(place):
    """A data file of 4 records without pictures, beside the runs' own."""
    return write(place / "data/text.jsonl", map(talk, range(4)))


def command(place, tmp_path, data, *overrides):
    """Return a command's arguments for a config of this data."""
    made = runs.make_config(place / "base", data, tmp_path / "out", *overrides)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict(made)))
    return ["--config", str(tmp_path / "c.yaml")]


def test_a_text_file_trains_as_it_does_in_packed_rows(place, text, tmp_path):
    """All records in one step, an epoch a step, rows of their own or one row for all."""
    common = ("training.weight_decay=0.5", "training.max_steps=2", "lora.dropout=0.0")
    args = command(
        place, tmp_path, text, *common, "training.per_device_train_batch_size=4",
    )  # fmt: skip
    assert main(["train", *args]) == 0
    own = runs.lines(tmp_path / "out/metrics.jsonl")
    _, packed, _ = runs.run(
        place, "packed_text", *common, "data.packing=true", "data.max_seq_length=256",
        "training.per_device_train_batch_size=1", data="data/text.jsonl",
    )  # fmt: skip
    assert [row["loss"] for row in own] == pytest.approx(
        [row["loss"] for row in runs.lines(packed / "metrics.jsonl")], rel=1e-6
    )
    # No gradient reaches the projector, and nothing else moves it: torch passes it over.
    trained = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    base = load_file(place / "base/model.safetensors")
    projector = [name for name in trained if "merger" in name]
    assert len(projector) == 6
    for name in projector:
        np.testing.assert_array_equal(trained[name], base[name.split("base_model.model.")[1]])


def test_an_evaluation_on_text_beside_training_on_pictures(place, text, tmp_path):
    data = place / "data/train.jsonl"
    args = command(
        place, tmp_path, data, f"data.eval_file={text}", "training.max_steps=1",
        "evaluation.max_new_tokens=2",
    )  # fmt: skip
    assert main(["train", *args]) == 0
    (row,) = runs.lines(tmp_path / "out/evaluations.jsonl")
    assert np.isfinite(row["loss"]) and row["examples"] == 4
    assert (tmp_path / "out/adapter").is_dir()


def test_a_preview_of_text(place, text, tmp_path, capsys):
    args = command(place, tmp_path, text)
    assert main(["preview", "--text", *args]) == 0
    said = capsys.readouterr().out
    assert said.count("⟦red <|im_end|>↵⟧") == said.count("⟦red red <|im_end|>↵⟧") == 2
    assert said.count("0 of 0 patches") == 4
    assert main(["preview", "--out", str(tmp_path / "page.html"), *args]) == 0
    assert "<html" in (tmp_path / "page.html").read_text()


@pytest.mark.exact
@pytest.mark.parametrize("family", FILES)
def test_no_patches_give_the_loss_of_an_empty_image_part(family, tmp_path):
    encoder = Encoder(FILES[family](tmp_path))
    model = vlm_jax.from_config(encoder.hf_config)
    examples = [encoder.example(talk(i)) for i in range(3)]
    params = model.init(jax.random.key(0))

    def mean(params, batch):
        total, tokens = vlm_jax.loss(model, params, {}, batch)
        return total / tokens

    unit = model.config.patch_unit
    bare, empty = (model.collate([[e] for e in examples], 96, count) for count in (0, unit))
    assert bare.shape == (3, 96, 0) and empty.shape == (3, 96, unit)
    run = jax.jit(jax.value_and_grad(mean))
    (loss, grads), (wanted, _) = run(params, bare), run(params, empty)
    assert loss == wanted
    flat = flatten(grads)
    seen = [path for path in flat if model.component(path) in ("vision", "projector")]
    assert len(seen) > 10 and not any(np.asarray(flat[path]).any() for path in seen)
    assert np.asarray(flat["model/language_model/embed_tokens/embedding"]).any()


def test_patches_that_travel_without_padding_may_be_none(tmp_path):
    encoder = Encoder(qwen2_vl_files(tmp_path))
    example = encoder.example(talk(0), bytes_only=True)
    batch = pad_patches(encoder.collate([[example], []], 96, 0, bytes_only=True, padded=False))
    assert batch.patches.shape == (2, 0, 96)
    look_up = LookUp(encoder.value_table, encoder.config)
    values = look_up(jax.tree.map(jnp.asarray, batch)).patches
    assert values.shape == (2, 0, 96) and values.dtype == jnp.float32


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_what_no_gradient_reaches_does_not_decay(name):
    leaf = jnp.full((4, 4), 2.0)
    trainable = {"a": {"kernel": leaf}, "b": {"kernel": leaf}}
    settings = {"weight_decay": 0.5, "learning_rate": 0.1, "optim": name}
    tx = vlm_jax.optimizer(trainable, [(".*", "full")], settings, still=["b/kernel"])
    grads = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = jax.jit(tx.update)(grads, tx.init(trainable), trainable)
    after = optax.apply_updates(trainable, updates)
    np.testing.assert_allclose(after["a"]["kernel"], 0.95 * leaf, rtol=1e-6)
    np.testing.assert_array_equal(after["b"]["kernel"], leaf)


# What a sample does not foresee


def test_wider_shapes_double_up_to_what_a_row_may_have():
    assert wider_shapes((512, 0), 2048, 4) == [
        (512, size) for size in (16, 32, 64, 128, 256, 512, 1024, 2048)
    ]
    assert wider_shapes((512, 1500), 2048, 4) == [(512, 2048)]
    assert wider_shapes((512, 2048), 2048, 4) == []
    assert wider_shapes((600, 0), 1154, 577) == [(600, 577), (600, 1154)]


def late(folder, pictures):
    """Write 12 records of text, of which the last but one has pictures; return their file."""
    rows = [talk(number) for number in range(12)]
    rows[10] = talk(10, [write_image(folder / "a.png", 40, 56).name] * pictures)
    return write(folder / "late.jsonl", rows)


@pytest.mark.parametrize("kind", ["file", "stream", "packed"])
@pytest.mark.parametrize("family", FILES)
def test_pictures_that_the_sample_did_not_hold_are_not_left_out(
    family, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline_module, "SAMPLE", 4)
    monkeypatch.setattr(pipeline_module, "WINDOW", 4)
    if kind != "stream":  # whose sample is its beginning anyway
        monkeypatch.setattr(Pipeline, "_sample", lambda self, seed: np.arange(4))
    data = late(tmp_path, 3 if family == "qwen2_vl" else 20)
    base = FILES[family](tmp_path / "base")

    def make():
        source = open_stream(data) if kind == "stream" else data
        return Pipeline(base, source, rows=2, max_length=256, packing=kind == "packed")

    pipeline = make()
    assert (max(patches for _, patches in pipeline.shapes) > 0) == (kind == "stream")
    steps = []
    for step in pipeline.batches():
        steps.append(step)
        if step[2]["epoch"]:
            break
    assert sorted(n for _, ids, _ in steps for n in ids) == sorted(f"r{i}" for i in range(12))
    assert pipeline.report["dropped"] == {} and pipeline.report["shrunk"] == 0
    shapes = {batch.shape[1:] for batch, _, _ in steps}
    assert shapes <= {*pipeline.shapes, *pipeline.wider} and shapes & set(pipeline.wider)
    (wide,) = (batch for batch, ids, _ in steps if "r10" in ids)
    record = json.loads(data.read_text().splitlines()[10])
    example = Encoder(base, image_folder=tmp_path).example(record)
    assert (wide.patch_segments > 0).sum() == len(example["patches"])
    again = itertools.islice(make().batches(steps[0][2]), len(steps) - 1)
    for (batch, ids, after), (other, same, then) in zip(steps[1:], again, strict=True):
        assert ids == same and after == then
        assert all(map(np.array_equal, jax.tree.leaves(batch), jax.tree.leaves(other)))
    if kind == "file":
        assert sum(len(names) for _, names in make().eval_batches()) == 12


def test_a_run_meets_what_its_sample_did_not_hold(place, monkeypatch):
    monkeypatch.setattr(pipeline_module, "SAMPLE", 4)
    monkeypatch.setattr(Pipeline, "_sample", lambda self, seed: np.arange(4))
    data = late(place / "data", 3)
    outcome, directory, text = runs.run(
        place, "late", "data.shuffle=false", "data.max_seq_length=256", "training.max_steps=2",
        "training.per_device_train_batch_size=6", f"data.eval_file={data}",
        "evaluation.accuracy=false", data="data/late.jsonl",
    )  # fmt: skip
    assert "compiling 256 x 0" in text and "Warning" not in text
    assert outcome["steps"] == 2 and outcome["data"]["dropped"] == {}
    losses = [row["loss"] for row in runs.lines(directory / "metrics.jsonl")]
    losses += [row["loss"] for row in runs.lines(directory / "evaluations.jsonl")]
    assert len(losses) == 3 and np.isfinite(losses).all()
