"""Patches that travel as bytes become, on the device, the very values that the processor gives."""

import json

import jax
import numpy as np
import pytest
from checkpoint_files import llava_files, qwen2_vl_files, write_image

from vlm_jax.data import Encoder, Pipeline
from vlm_jax.models.pixel_table import LookUp
from vlm_jax.sharding import make_mesh
from vlm_jax.train.placement import Feed

pytestmark = pytest.mark.exact

FAMILIES = {"qwen2_vl": qwen2_vl_files, "llava": llava_files}


def make_rows(folder, films=()):
    """Write 6 records: no, one or two images of several sizes; and a video in those of `films`."""
    rows = []
    for i in range(6):
        images = [
            write_image(folder / f"{i}-{k}.png", 12 + 9 * i, 40 - 5 * k, seed=i + k).name
            for k in range(i % 3)
        ]
        row = {"id": f"r{i}", "image": images}
        question = "<image>" * len(images) + "What color is the ball?"
        if i in films:
            frames = [write_image(folder / f"{i}-f{k}.png", 16, 24, seed=k).name for k in range(4)]
            row["video"] = [frames]
            question = "<video>" + question
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
        rows.append({**row, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.mark.parametrize(
    "name, films, packing",
    [
        ("qwen2_vl", (), True),
        ("qwen2_vl", range(6), True),
        ("qwen2_vl", (2,), False),
        ("llava", (), True),
    ],
)
def test_bytes_looked_up_on_the_mesh_are_the_values_made_on_the_host(
    tmp_path, name, films, packing
):
    base = FAMILIES[name](tmp_path / "base")
    data = make_rows(tmp_path, films)
    pipeline = Pipeline(base, data, rows=4, max_length=256, packing=packing, seed=1)
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    feed = Feed(pipeline.encoder, mesh)
    assert feed.bytes_only
    seen, stills = 0, set()
    frames = 2 if name == "qwen2_vl" else 1
    pairs = zip(pipeline.batches(), pipeline.batches(None, bytes_only=True), strict=True)
    for (values, ids, _), (cut, same_ids, after) in pairs:
        assert ids == same_ids and cut.patches.dtype == np.uint8
        still = not any(int(name[1:]) in films for name in ids)  # one frame stands for all
        assert cut.patches.nbytes * 4 * (frames if still else 1) == values.patches.nbytes
        stills.add(still)
        got = feed(cut)
        for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(values), strict=True):
            assert leaf.dtype == wanted.dtype and len(leaf.sharding.device_set) == 4
            np.testing.assert_array_equal(np.asarray(leaf), wanted)
        seen += int((values.patches != 0).any(-1).sum())
        if after["epoch"]:
            break
    assert seen > 10  # patches that are no padding
    assert stills == ({True, False} if len(films) == 1 else {not films})


def test_images_and_videos_of_different_values_are_looked_up_where_they_are_made(tmp_path):
    base = qwen2_vl_files(tmp_path / "base")
    settings = json.loads((base / "preprocessor_config.json").read_text())
    other = {**settings, "image_mean": [0.1, 0.2, 0.3]}
    other["video_processor_type"] = "Qwen2VLVideoProcessor"
    other.pop("image_processor_type")
    (base / "video_preprocessor_config.json").write_text(json.dumps(other))
    encoder = Encoder(base)
    assert encoder.value_table is None
    feed = Feed(encoder, make_mesh(devices=jax.devices()[:1]))
    pipeline = Pipeline(encoder, make_rows(tmp_path, films=range(6)), rows=2)
    batch, _, _ = next(pipeline.batches(None, feed.bytes_only))
    assert batch.patches.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(feed(batch).patches), batch.patches)


def test_a_video_in_one_hosts_rows_gives_all_hosts_every_frame(tmp_path):
    base = qwen2_vl_files(tmp_path / "base")
    data = make_rows(tmp_path, films=(2,))
    options = {"rows": 2, "max_length": 256, "process_count": 2}
    hosts = [Pipeline(base, data, process_index=host, **options) for host in range(2)]
    both = zip(*(host.batches(bytes_only=True) for host in hosts), strict=True)
    widths = set()
    for (first, ids, after), (second, others, _) in both:
        assert first.patches.shape == second.patches.shape
        if ids + others:
            widths.add((first.patches.shape[2], "r2" in ids + others))
        if after["epoch"]:
            break
    assert widths == {(48, False), (96, True)}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_carries_one_frame_of_stills_too(tmp_path, workers):
    base = qwen2_vl_files(tmp_path / "base")
    data = make_rows(tmp_path, films=(2,))
    pipeline = Pipeline(base, data, rows=2, max_length=256, workers=workers)
    encoder = pipeline.encoder
    values_of = LookUp(encoder.value_table, encoder.config)
    look_up = jax.jit(lambda batch: values_of(batch).patches)
    widths = set()
    pairs = zip(pipeline.eval_batches(), pipeline.eval_batches(bytes_only=True), strict=True)
    for (values, ids), (cut, _) in pairs:
        widths.add((cut.patches.shape[2], "r2" in ids))
        np.testing.assert_array_equal(look_up(cut), values.patches)
    assert widths == {(48, False), (96, True)}


def test_values_never_pass_for_bytes(tmp_path):
    encoder = Encoder(qwen2_vl_files(tmp_path / "base"))
    picture = str(write_image(tmp_path / "one.png", 30, 30).name)
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}]
    record = {"id": "r", "image": picture, "conversations": turns}
    encoder = Encoder(encoder.directory, image_folder=tmp_path)
    example = encoder.example(record)
    with pytest.raises(ValueError, match="float32, not"):
        encoder.collate([[example]], 256, 64, bytes_only=True)
