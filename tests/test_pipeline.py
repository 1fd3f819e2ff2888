"""Batches: every example once an epoch, few shapes, and a resume that nothing can tell."""

import itertools
import json

import numpy as np
import pytest
from checkpoint_files import llava_files, qwen2_vl_files, write_image
from PIL import Image

import vlm_jax.data.pipeline as pipeline_module
from vlm_jax.data import Encoder, Pipeline, encode, read_records
from vlm_jax.data.images import read_image
from vlm_jax.data.shapes import LEAST_GAIN, choose_shapes, cost, group, round_up
from vlm_jax.errors import UserError

WORDS = "What color is the ball and the box? "


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Encoder(qwen2_vl_files(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data file of 50 records: no, one or two images of many sizes, short and long answers."""
    path = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(50):
        images = []
        for k in range(i % 3):
            height, width = (int(n) for n in rng.integers(8, 60, 2))
            images.append(write_image(path / f"{i}-{k}.png", height, width, seed=i).name)
        question = "<image>" * len(images) + WORDS * int(rng.integers(1, 4))
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": "red " * (1 + i % 9)},
        ]
        rows.append({"id": f"r{i}", "image": images, "conversations": turns})
    (path / "data.json").write_text(json.dumps(rows))
    return path


def same(one, other):
    for name in one.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def epoch(pipeline, state=None):
    """Return the batches, ids and states of one epoch."""
    return list(itertools.islice(pipeline.batches(state), pipeline.steps_per_epoch))


def test_encode_gives_the_arrays_of_the_reference_processor(qwen, folder):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    records = read_records(folder / "data.json")
    reference = Qwen2VLImageProcessorPil.from_pretrained(qwen.directory)
    for index in (0, 1, 2):
        record = records[index]
        got = encode(qwen.directory, record)
        assert got["id"] == record["id"]
        assert got["tokens"].dtype == np.int32 and got["weights"].dtype == np.float32
        assert got["tokens"].shape == got["weights"].shape
        if not record["images"]:
            assert got["pixel_values"] is None and got["image_grid_thw"] is None
            continue
        opened = [Image.fromarray(read_image(name, folder)) for name in record["images"]]
        want = reference(opened, return_tensors="np")
        np.testing.assert_array_equal(got["pixel_values"], want["pixel_values"])
        np.testing.assert_array_equal(got["image_grid_thw"], want["image_grid_thw"])
        features = int(want["image_grid_thw"].prod(1).sum()) // 4
        assert (got["tokens"] == qwen.model.config.image_token_id).sum() == features


def test_measuring_by_headers_equals_encoding(qwen, folder):
    for record in read_records(folder / "data.json"):
        size, example = qwen.measure(record), qwen.example(record)
        assert size.tokens == len(example["tokens"])
        assert size.patches == len(example["patches"])
        assert size.answers == example["weights"].sum()


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_comes_once_an_epoch(qwen, folder, shuffle):
    pipeline = Pipeline(qwen, folder / "data.json", rows=4, seed=3, shuffle=shuffle)
    assert pipeline.steps_per_epoch == 13
    everything = [f"r{i}" for i in range(50)]
    orders, together = [], []
    state = None
    for number in range(2):
        steps = epoch(pipeline, state)
        ids = [name for _, names, _ in steps for name in names]
        assert sorted(ids) == sorted(everything)
        orders.append(ids)
        together.append({frozenset(names) for _, names, _ in steps})
        state = steps[-1][2]
        assert (state["epoch"], state["step"]) == (number + 1, 0)
        # the last 2 rows of some batch are empty and carry no loss
        empty = [batch for batch, names, _ in steps if len(names) < 4]
        assert len(empty) == 1 and not empty[0].segments[2:].any()
        assert not empty[0].weights[2:].any()
    assert (orders[0] != orders[1]) == (together[0] != together[1]) == shuffle
    if not shuffle:
        assert orders[0] == everything


def test_batches_hold_their_examples_whole(qwen, folder):
    records = {record["id"]: record for record in read_records(folder / "data.json")}
    pipeline = Pipeline(qwen, list(records.values()), rows=4)
    for batch, ids, _ in epoch(pipeline):
        assert (batch.tokens.shape[1], batch.patches.shape[1]) in pipeline.shapes
        for row, name in enumerate(ids):
            example = qwen.example(records[name])
            n, p = len(example["tokens"]), len(example["patches"])
            np.testing.assert_array_equal(batch.tokens[row, :n], example["tokens"])
            np.testing.assert_array_equal(batch.weights[row, : n - 1], example["weights"][1:])
            np.testing.assert_array_equal(batch.patches[row, :p], example["patches"])
            assert not batch.segments[row, n:].any() and not batch.patch_segments[row, p:].any()


@pytest.mark.parametrize("stop", [1, 5, 8, 12, 13, 20])
def test_a_resume_is_bit_for_bit(qwen, folder, stop, monkeypatch):
    monkeypatch.setattr(pipeline_module, "WINDOW", 16)  # two windows an epoch
    make = lambda: Pipeline(qwen, folder / "data.json", rows=4, seed=1)  # noqa: E731
    straight = list(itertools.islice(make().batches({"epoch": 0, "step": 0}), stop + 6))
    state = json.loads(json.dumps(straight[stop - 1][2]))
    again = list(itertools.islice(make().batches(state), 6))
    for (batch, ids, after), (other, other_ids, other_after) in zip(
        straight[stop:], again, strict=True
    ):
        same(batch, other)
        assert ids == other_ids and after == other_after


def test_a_resume_decodes_nothing_that_was_seen(qwen, folder, monkeypatch):
    pipeline = Pipeline(qwen, folder / "data.json", rows=4, prefetch=1)
    state = epoch(pipeline)[9][2]
    seen = []
    original = pipeline._example
    monkeypatch.setattr(pipeline, "_example", lambda index: seen.append(index) or original(index))
    next(pipeline.batches(state))
    assert len(seen) < 4 * 5


def test_lazily_measured_data_gives_the_same_promises(qwen, folder, monkeypatch):
    monkeypatch.setattr(pipeline_module, "SAMPLE", 20)
    monkeypatch.setattr(pipeline_module, "WINDOW", 16)
    make = lambda: Pipeline(qwen, folder / "data.json", rows=4, max_length=220)  # noqa: E731
    pipeline = make()
    assert pipeline.report["measured"] == 20
    assert pipeline.shapes[-1][0] == 220
    steps = list(itertools.islice(pipeline.batches(), 30))
    first = [name for _, names, after in steps for name in names if after["epoch"] == 0]
    first += [
        n for _, names, after in steps if (after["epoch"], after["step"]) == (1, 0) for n in names
    ]
    assert sorted(first) == sorted(f"r{i}" for i in range(50))
    assert {(b.tokens.shape[1], b.patches.shape[1]) for b, _, _ in steps} <= set(pipeline.shapes)
    for stop in (3, 11, 13, 14):
        batch, ids, after = next(make().batches(steps[stop - 1][2]))
        same(batch, steps[stop][0])
        assert (ids, after) == steps[stop][1:]
    with pytest.raises(UserError, match="max_seq_length"):
        Pipeline(qwen, folder / "data.json", rows=4)


def test_hosts_divide_the_global_batch(qwen, folder):
    whole = epoch(Pipeline(qwen, folder / "data.json", rows=4))
    parts = [
        epoch(Pipeline(qwen, folder / "data.json", rows=4, process_index=i, process_count=2))
        for i in range(2)
    ]
    for (batch, ids, after), (one, a, _), (two, b, last) in zip(whole, *parts, strict=True):
        assert a + b == ids and last == after
        np.testing.assert_array_equal(np.concatenate([one.tokens, two.tokens]), batch.tokens)
        np.testing.assert_array_equal(np.concatenate([one.patches, two.patches]), batch.patches)
    with pytest.raises(UserError, match="does not divide"):
        Pipeline(qwen, folder / "data.json", rows=3, process_count=2)


def test_evaluation_covers_everything_once(qwen, folder):
    pipeline = Pipeline(qwen, folder / "data.json", rows=8)
    batches = list(pipeline.eval_batches())
    ids = [name for _, names in batches for name in names]
    assert sorted(ids) == sorted(f"r{i}" for i in range(50))
    assert {batch.tokens.shape[0] for batch, _ in batches} == {8}
    assert sum((batch.segments.max(1) > 0).sum() for batch, _ in batches) == 50


def test_drop_last_leaves_out_what_does_not_fill_a_batch(qwen, folder):
    pipeline = Pipeline(qwen, folder / "data.json", rows=4, drop_last=True)
    steps = epoch(pipeline)
    assert pipeline.steps_per_epoch == 12
    assert all(len(names) == 4 for _, names, _ in steps)
    assert steps[-1][2]["epoch"] == 1
    with pytest.raises(UserError, match="do not fill one batch"):
        Pipeline(qwen, folder / "data.json", rows=64, drop_last=True)


def test_over_long_examples_are_dropped_and_counted_never_cut(qwen, folder):
    sizes = [qwen.measure(record).tokens for record in read_records(folder / "data.json")]
    limit = sorted(sizes)[30]
    pipeline = Pipeline(qwen, folder / "data.json", rows=4, max_length=limit)
    kept = sum(size <= limit for size in sizes)
    report = pipeline.report
    assert report["dropped"] == {"too_long": 50 - kept} and report["examples"] == kept
    assert "not cut" in report["first_dropped"]["too_long"]
    ids = [name for _, names, _ in epoch(pipeline) for name in names]
    assert len(ids) == kept == len(set(ids))
    with pytest.raises(UserError, match=r"record 2 \(id 'r2'\) has .* = 20\."):
        encode(qwen.directory, read_records(folder / "data.json")[2], max_seq_length=20)
    with pytest.raises(UserError, match="None of the 50 records"):
        Pipeline(qwen, folder / "data.json", rows=4, max_length=5)


def test_bad_examples_raise_or_are_counted(qwen, folder, tmp_path):
    rows = json.loads((folder / "data.json").read_text())[:12]
    rows[4]["image"] = ["gone.png"]
    rows[7]["conversations"][1]["train"] = False
    rows[8]["conversations"][1]["from"] = "nobody"
    data = (folder / rows[5]["image"][0]).read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    rows[5]["image"] = ["cut.png", rows[5]["image"][1]]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    records = read_records(tmp_path / "data.json", image_folder=folder)
    with pytest.raises(UserError, match=r"gone\.png.*record 4 \(id 'r4'\)"):
        Pipeline(qwen, records, rows=4)
    pipeline = Pipeline(qwen, records, rows=4, on_bad_example="skip")
    assert pipeline.report["dropped"] == {"image": 1, "no_answer": 1, "record": 1}
    assert pipeline.report["measured"] == 12 and pipeline.report["examples"] == 9
    steps = epoch(pipeline)
    ids = [name for _, names, _ in steps for name in names]
    assert sorted(ids) == sorted(f"r{i}" for i in (0, 1, 2, 3, 6, 9, 10, 11))
    assert pipeline.report["dropped"]["image"] == 2  # the truncated one shows when it is decoded
    assert encode(qwen.directory, rows[4], on_bad_example="skip") is None
    rows[4] = rows[5]
    broken = Pipeline(qwen, read_records(rows[:6], image_folder=folder), rows=2)
    with pytest.raises(UserError, match=r"cut\.png.*truncated"):
        epoch(broken)


def test_a_state_of_other_data_is_refused(qwen, folder):
    pipeline = Pipeline(qwen, folder / "data.json", rows=4)
    state = next(pipeline.batches())[2]
    with pytest.raises(UserError, match="rows = 4, but now rows = 2"):
        next(Pipeline(qwen, folder / "data.json", rows=2).batches(state))
    with pytest.raises(UserError, match="cursor"):
        next(pipeline.batches({"epoch": 0, "step": 3}))


def test_options_reach_the_images(qwen, folder):
    record = read_records(folder / "data.json")[2]
    small = encode(qwen.directory, record, image_resolution=16)
    limits = encode(qwen.directory, record, min_pixels=16 * 16, max_pixels=16 * 16)
    np.testing.assert_array_equal(small["pixel_values"], limits["pixel_values"])
    assert small["image_grid_thw"].tolist() == [[1, 8, 4], [1, 6, 4]]  # tall images stay tall
    limited = encode(qwen.directory, record, max_pixels=64 * 6)
    assert limited["image_grid_thw"].prod(1).max() <= 6 * 4
    last = encode(qwen.directory, record, train_on="last")
    np.testing.assert_array_equal(last["weights"], encode(qwen.directory, record)["weights"])
    with pytest.raises(UserError, match="train_on"):
        Encoder(qwen.directory, train_on="some")


def test_llava_rows_hold_whole_images(folder, tmp_path):
    encoder = Encoder(llava_files(tmp_path))
    pipeline = Pipeline(encoder, folder / "data.json", rows=4)
    unit = encoder.model.family.patch_unit(encoder.model.config)
    assert all(patches % unit == 0 and patches > 0 for _, patches in pipeline.shapes)
    assert len([name for _, names, _ in epoch(pipeline) for name in names]) == 50
    record = read_records(folder / "data.json")[2]
    got = encoder.encode(record)
    assert got["pixel_values"].shape == (2, 3, 16, 16) and got["image_grid_thw"] is None
    prompt = encoder.prompt(record)
    np.testing.assert_array_equal(got["tokens"][: len(prompt["tokens"])], prompt["tokens"])


def test_shapes_are_few_round_and_beat_one_shape():
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(30, 900, 500), rng.choice([0, 256, 700, 2000], 500)], 1)
    cap = (1024, 2048)
    previous = np.inf
    for count in (1, 2, 3, 4):
        shapes = choose_shapes(sizes, cap, count, 4)
        assert len(shapes) <= count and shapes[-1] == cap
        assert all(t % 16 == 0 and p % 16 == 0 and p > 0 for t, p in shapes)
        steps = group(sizes, 8, shapes)
        members = np.concatenate([members for members, _ in steps])
        assert sorted(members) == list(range(500))
        for members, (t, p) in steps:
            assert sizes[members, 0].max() <= t and sizes[members, 1].max() <= p
        total = sum(float(cost(np.array(shape))) for _, shape in steps)
        assert total <= previous
        previous = total
    assert choose_shapes(sizes[:, [0, 0]] * [1, 0], (1024, 0), 4, 4)[-1] == (1024, 0)


def test_shapes_find_the_best_cut():
    """Against all ways to cut ten sizes into three runs."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = np.sort(rng.integers(1, 2000, 10))
        cap = round_up(int(lengths[-1]))
        got = choose_shapes(np.stack([lengths, 0 * lengths], 1), (cap, 0), 3, 4)

        def pay(ladder, lengths=lengths):
            return sum(min(t for t in ladder if t >= length) for length in lengths)

        rungs = [round_up(int(length)) for length in lengths]
        best = min(pay([a, b, cap]) for a in rungs for b in rungs)
        assert best <= pay([t for t, _ in got]) <= best / (1 - LEAST_GAIN) ** 2
