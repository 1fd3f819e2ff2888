"""Patches that travel as bytes become, on the device, the very values that the processor gives."""

import json

import jax
import numpy as np
import pytest
from checkpoint_files import llava_files, qwen2_vl_files, write_image

from vlm_jax.data import Encoder, Pipeline
from vlm_jax.sharding import make_mesh
from vlm_jax.train.feed import Feed

FAMILIES = {"qwen2_vl": qwen2_vl_files, "llava": llava_files}


def make_rows(folder, films=False):
    """Write 6 records: no, one or two images of several sizes; and a video each where asked."""
    rows = []
    for i in range(6):
        images = [
            write_image(folder / f"{i}-{k}.png", 12 + 9 * i, 40 - 5 * k, seed=i + k).name
            for k in range(i % 3)
        ]
        row = {"id": f"r{i}", "image": images}
        question = "<image>" * len(images) + "What color is the ball?"
        if films:
            frames = [write_image(folder / f"{i}-f{k}.png", 16, 24, seed=k).name for k in range(4)]
            row["video"] = [frames]
            question = "<video>" + question
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
        rows.append({**row, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.mark.parametrize("name, films", [("qwen2_vl", False), ("qwen2_vl", True), ("llava", False)])
def test_bytes_looked_up_on_the_mesh_are_the_values_made_on_the_host(tmp_path, name, films):
    base = FAMILIES[name](tmp_path / "base")
    data = make_rows(tmp_path, films)
    pipeline = Pipeline(base, data, rows=4, max_length=256, packing=True, seed=1)
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    feed = Feed(pipeline.encoder, mesh)
    assert feed.bytes_only
    seen = 0
    pairs = zip(pipeline.batches(), pipeline.batches(None, bytes_only=True), strict=True)
    for (values, ids, _), (cut, same_ids, after) in pairs:
        assert ids == same_ids and cut.patches.dtype == np.uint8
        assert cut.patches.nbytes * 4 == values.patches.nbytes
        got = feed(cut)
        for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(values), strict=True):
            assert leaf.dtype == wanted.dtype and len(leaf.sharding.device_set) == 4
            np.testing.assert_array_equal(np.asarray(leaf), wanted)
        seen += int((values.patches != 0).any(-1).sum())
        if after["epoch"]:
            break
    assert seen > 10  # patches that are no padding


def test_images_and_videos_of_different_values_are_looked_up_where_they_are_made(tmp_path):
    base = qwen2_vl_files(tmp_path / "base")
    settings = json.loads((base / "preprocessor_config.json").read_text())
    other = {**settings, "image_mean": [0.1, 0.2, 0.3]}
    other["video_processor_type"] = "Qwen2VLVideoProcessor"
    other.pop("image_processor_type")
    (base / "video_preprocessor_config.json").write_text(json.dumps(other))
    encoder = Encoder(base)
    assert encoder.look_up is None
    feed = Feed(encoder, make_mesh(devices=jax.devices()[:1]))
    pipeline = Pipeline(encoder, make_rows(tmp_path, films=True), rows=2)
    batch, _, _ = next(pipeline.batches(None, feed.bytes_only))
    assert batch.patches.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(feed(batch).patches), batch.patches)


def test_values_never_pass_for_bytes(tmp_path):
    encoder = Encoder(qwen2_vl_files(tmp_path / "base"))
    picture = str(write_image(tmp_path / "one.png", 30, 30).name)
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}]
    record = {"id": "r", "image": picture, "conversations": turns}
    encoder = Encoder(encoder.directory, image_folder=tmp_path)
    example = encoder.example(record)
    with pytest.raises(ValueError, match="float32, not"):
        encoder.collate([[example]], 256, 64, bytes_only=True)
