"""Batches: every example once an epoch, few shapes, and a resume that nothing can tell."""

import itertools
import json

import numpy as np
import pytest
from checkpoint_files import llava_files, qwen2_vl_files, write_image
from PIL import Image
from tiers import fast

import vlm_jax.data.pipeline as pipeline_module
from vlm_jax.data import Encoder, Pipeline, encode, read_records
from vlm_jax.data.loader import Steps
from vlm_jax.data.media.images import read_image
from vlm_jax.data.records.stream import open_stream
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
        assert (got["tokens"] == qwen.config.image_token_id).sum() == features


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
    original = Encoder.example
    see = lambda self, record, *rest: (  # noqa: E731
        seen.append(record["id"]) or original(self, record, *rest)
    )
    monkeypatch.setattr(Encoder, "example", see)
    next(pipeline.batches(state))
    assert len(seen) < 4 * 5


def test_lazily_measured_data_gives_the_same_promises(qwen, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline_module, "SAMPLE", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
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
    with pytest.raises(UserError, match="do not fill one micro-batch of 64 rows"):
        Pipeline(qwen, folder / "data.json", rows=64, drop_last=True)


def test_no_shape_has_more_patches_than_are_allowed(qwen, folder):
    pipeline = Pipeline(qwen, folder / "data.json", rows=4, max_patches=22)
    assert max(patches for _, patches in pipeline.shapes) == 20  # a merged patch is four
    assert pipeline.report["shrunk"] > 0


def test_over_long_examples_are_dropped_and_counted_never_cut(qwen, folder):
    sizes = [qwen.measure(record).tokens for record in read_records(folder / "data.json")]
    limit = sorted(sizes)[30]
    drop = Encoder(qwen.directory, overlong="drop")
    pipeline = Pipeline(drop, folder / "data.json", rows=4, max_length=limit)
    kept = sum(size <= limit for size in sizes)
    report = pipeline.report
    assert report["dropped"] == {"too_long": 50 - kept} and report["examples"] == kept
    assert "not cut" in report["first_dropped"]["too_long"]
    ids = [name for _, names, _ in epoch(pipeline) for name in names]
    assert len(ids) == kept == len(set(ids))
    with pytest.raises(UserError, match=r"record 2 \(id 'r2'\) has .* = 20, even"):
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
    with pytest.raises(UserError, match=r"3 of the 12 records.*max_bad_share = 0.01.*nobody"):
        Pipeline(qwen, records, rows=4, on_bad_example="skip")
    pipeline = Pipeline(qwen, records, rows=4, on_bad_example="skip", max_bad_share=0.5)
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
    unit = encoder.config.patch_unit
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


# Rows that hold several examples


def rebuilt(batch, row, segment):
    """Return what a segment of a packed row holds."""
    here = batch.segments[row] == segment
    index = batch.image_index[row][here]
    seen = index[index >= 0]
    return {
        "tokens": batch.tokens[row][here],
        "targets": batch.targets[row][here],
        "weights": batch.weights[row][here],
        "positions": batch.positions[row][..., here],
        "features": len(seen),
        "consecutive": bool((np.diff(seen) == 1).all()),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_rows_hold_every_example_once_and_whole(qwen, folder, workers):
    records = {record["id"]: record for record in read_records(folder / "data.json")}
    pipeline = Pipeline(
        qwen, folder / "data.json", rows=2, max_length=512, packing=True, workers=workers
    )
    one = Pipeline(qwen, folder / "data.json", rows=2, max_length=512)
    assert pipeline.steps_per_epoch < one.steps_per_epoch / 2
    assert pipeline.report["packing"] and pipeline.report["padding"] < one.report["padding"]
    seen = []
    for batch, ids, _ in epoch(pipeline):
        assert (batch.tokens.shape[1], batch.patches.shape[1]) in pipeline.shapes
        names = iter(ids)
        for row in range(2):
            for segment in range(1, batch.segments[row].max() + 1):
                name = next(names)
                seen.append(name)
                example, got = qwen.example(records[name]), rebuilt(batch, row, segment)
                np.testing.assert_array_equal(got["tokens"], example["tokens"])
                np.testing.assert_array_equal(got["positions"], example["positions"])
                np.testing.assert_array_equal(got["weights"][:-1], example["weights"][1:])
                np.testing.assert_array_equal(got["targets"][:-1], example["tokens"][1:])
                assert got["weights"][-1] == 0 and got["consecutive"]
                assert got["features"] == (example["image_index"] >= 0).sum()
    assert sorted(seen) == sorted(records)


@pytest.mark.parametrize("packing", [False, True])
def test_neither_workers_nor_hosts_change_a_row(qwen, folder, packing, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make = lambda **options: Pipeline(  # noqa: E731
        qwen, folder / "data.json", rows=4, max_length=300, packing=packing, seed=5, **options
    )
    straight = list(itertools.islice(make().batches(), 20))
    state = json.loads(json.dumps(straight[6][2]))
    for options in ({"workers": 2 if packing else 1}, {"prefetch": 1}):
        again = list(itertools.islice(make(**options).batches(state), 8))
        for (batch, ids, after), (other, names, then) in zip(straight[7:], again, strict=False):
            same(batch, other)
            assert (ids, after) == (names, then)
    halves = [
        list(itertools.islice(make(process_index=i, process_count=2).batches(state), 8))
        for i in range(2)
    ]
    for (batch, ids, after), (one, a, _), (two, b, then) in zip(
        straight[7:], *halves, strict=False
    ):
        assert a + b == ids and then == after
        np.testing.assert_array_equal(np.concatenate([one.tokens, two.tokens]), batch.tokens)
        np.testing.assert_array_equal(np.concatenate([one.patches, two.patches]), batch.patches)


@pytest.mark.parametrize("workers", fast([0, 1], [0, 1, 2]))
def test_what_goes_wrong_in_a_worker_comes_back_as_it_is(qwen, folder, tmp_path, workers):
    rows = json.loads((folder / "data.json").read_text())[:12]
    name = rows[5]["image"][0]
    (folder / "cut.png").write_bytes((folder / name).read_bytes()[:-60])
    rows[5]["image"][0] = "cut.png"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    make = lambda **options: Pipeline(  # noqa: E731
        qwen, read_records(tmp_path / "data.json", folder), rows=4, workers=workers, **options
    )
    with pytest.raises(UserError, match=r"In '.*data.json', line 1: Image 0 'cut.png' of record 5"):
        epoch(make())
    left = make(on_bad_example="skip", max_bad_share=0.5)
    assert sorted(name for _, ids, _ in epoch(left) for name in ids) == sorted(
        f"r{i}" for i in range(12) if i != 5
    )
    (skipped,) = left.skipped()
    assert (skipped.index, skipped.reason) == (5, "image") and "cut.png" in skipped.why
    with pytest.raises(UserError, match="1 of the 12 records .*cut.png"):
        epoch(make(on_bad_example="skip", max_bad_share=0.05))


# Examples that are too long


def turns(*images):
    """Return a record with an exchange for each entry: an image or None."""
    talk = []
    for number, image in enumerate(images):
        asked = ("<image>" if image else "") + f"What color is ball {number}? "
        talk += [{"from": "human", "value": asked}, {"from": "gpt", "value": "red ball"}]
    return {"id": "long", "image": [i for i in images if i], "conversations": talk}


@pytest.fixture
def big(folder):
    return write_image(folder / "big.png", 60, 60, seed=1).name


def test_pixels_shrink_as_little_as_needed(qwen, folder, big):
    record = turns(big, big)
    options = {"image_folder": folder}
    whole = encode(qwen.directory, record, **options)
    least = encode(qwen.directory, record, max_pixels=qwen.media.pixels[0], **options)
    for limit in range(len(least["tokens"]), len(whole["tokens"]) + 1, 7):
        got = encode(qwen.directory, record, max_seq_length=limit, **options)
        assert len(least["tokens"]) <= len(got["tokens"]) <= limit
        features = int(got["image_grid_thw"].prod(1).sum()) // 4
        assert (got["tokens"] == qwen.config.image_token_id).sum() == features
        text = got["tokens"][got["tokens"] != qwen.config.image_token_id]
        everything = whole["tokens"][whole["tokens"] != qwen.config.image_token_id]
        np.testing.assert_array_equal(text, everything)
        # One more merged row or column in each image would not have fitted.
        rows, columns = (int(n) // 2 for n in got["image_grid_thw"][0, 1:])
        if len(got["tokens"]) < len(whole["tokens"]):
            assert len(got["tokens"]) + 2 * (rows + columns + 1) > limit
    patches = int(whole["image_grid_thw"].prod(1).sum())
    got = encode(qwen.directory, record, max_patches=patches // 2, **options)
    assert int(got["image_grid_thw"].prod(1).sum()) <= patches // 2


def test_then_leading_turns_go_with_their_images(qwen, folder, big):
    record = turns(big, None, big, None)
    record["conversations"].insert(0, {"from": "system", "value": "ball box"})
    system, talk = record["conversations"][:1], record["conversations"][1:]
    small = Encoder(qwen.directory, image_folder=folder, max_pixels=qwen.media.pixels[0])
    rest = {"image": record["image"][1:], "conversations": [*system, *talk[2:]]}
    least = len(small.encode({**record, **rest})["tokens"])
    encoder = Encoder(qwen.directory, image_folder=folder, max_seq_length=least)
    fitted = encoder.fit(record)
    assert len(fitted.record["messages"]) == 7 and fitted.record["messages"][0]["role"] == "system"
    assert len(fitted.record["images"]) == 1 and fitted.notes == 3  # shrunk, and turns dropped
    assert len(fitted.tokens) == least
    whole = Encoder(
        qwen.directory, image_folder=folder, max_seq_length=least + 100, overlong="drop_turns"
    )
    assert whole.fit(turns(big, big, big, big, big, big)).notes == 2
    for policy in ("drop", "error"):
        strict = Encoder(qwen.directory, image_folder=folder, max_seq_length=least, overlong=policy)
        with pytest.raises(UserError, match="record 0 .*more than data.max_seq_length.*not cut"):
            strict.fit(record)
    with pytest.raises(UserError, match="overlong is 'cut'; expected one of shrink_pixels"):
        Encoder(qwen.directory, overlong="cut")


def test_the_policy_decides_and_each_case_is_counted(qwen, folder, big, tmp_path):
    rows = [turns(*([big] * n)) | {"id": f"n{n}"} for n in range(1, 6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    limit = 2 * len(encode(qwen.directory, rows[0], image_folder=folder)["tokens"])
    make = lambda **o: Pipeline(  # noqa: E731
        qwen.directory, tmp_path / "data.jsonl", rows=1, image_folder=folder, max_length=limit, **o
    )
    report = make().report
    assert report["shrunk"] > 0 and report["dropped"] == {} and report["longest"] <= limit
    report = make(overlong="drop_turns").report
    assert (report["shrunk"], report["turns_dropped"], report["dropped"]) == (0, 3, {})
    assert make(overlong="drop").report["dropped"] == {"too_long": 3}
    with pytest.raises(UserError, match="data.jsonl', line 3.*data.overlong=drop"):
        make(overlong="error")


# What is kept of measuring


def test_sizes_are_measured_once_for_a_file_and_again_where_anything_changes(
    qwen, folder, tmp_path, monkeypatch
):
    (tmp_path / "data.json").write_text((folder / "data.json").read_text())
    counted = []
    original = Encoder.measure
    measure = lambda self, record: counted.append(1) or original(self, record)  # noqa: E731
    monkeypatch.setattr(Encoder, "measure", measure)

    def measured(**options):
        counted.clear()
        Pipeline(qwen.directory, tmp_path / "data.json", rows=4, image_folder=folder, **options)
        return len(counted)

    assert measured() == 50 and measured() == 0
    assert measured(max_pixels=1024) == 50 and measured(max_pixels=1024) == 0
    assert list((tmp_path / ".vlm_jax").glob("data.json-*.sizes"))
    rows = json.loads((folder / "data.json").read_text())
    rows[3]["image"] = ["missing.png"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert measured(on_bad_example="skip", max_bad_share=1.0) == 50
    assert measured(on_bad_example="skip", max_bad_share=1.0) == 1  # it may be there by now


# Streams


def test_a_stream_is_exact_whoever_reads_it(qwen, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline_module, "SAMPLE", 20)
    monkeypatch.setattr(pipeline_module, "WINDOW", 16)
    rows = json.loads((folder / "data.json").read_text())
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = lambda: open_stream(tmp_path / "data.jsonl", folder)  # noqa: E731
    make = lambda **options: Pipeline(  # noqa: E731
        qwen, stream(), rows=2, max_length=512, packing=True, **options
    )
    pipeline = make()
    assert pipeline.steps_per_epoch is None and pipeline.report["records"] == 20
    straight = list(itertools.islice(pipeline.batches(), 20))
    first = [name for _, ids, after in straight for name in ids if after["epoch"] == 0]
    ended = next(ids for _, ids, after in straight if (after["epoch"], after["step"]) == (1, 0))
    assert sorted(first + ended) == sorted(f"r{i}" for i in range(50))
    assert pipeline.report["records"] == 50
    for stop, options in ((3, {}), (7, {"workers": 1}), (11, {})):
        again = list(itertools.islice(make(**options).batches(straight[stop][2]), 3))
        for (batch, ids, after), (other, names, then) in zip(
            straight[stop + 1 :], again, strict=False
        ):
            same(batch, other)
            assert (ids, after) == (names, then)
    with pytest.raises(UserError, match="stream cannot be evaluated"):
        next(make().eval_batches())
    with pytest.raises(UserError, match="set data.max_seq_length"):
        Pipeline(qwen, stream(), rows=2)


def test_what_the_sample_did_not_show_is_made_to_fit_or_left_out(
    qwen, folder, big, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline_module, "SAMPLE", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = {"conversations": turns(None)["conversations"]}
    few = [text] * 40 + [{**turns(big), "id": f"i{i}"} for i in range(3)]
    records = read_records(few, folder)
    pipeline = Pipeline(qwen.directory, records, rows=2, max_length=512, overlong="drop")
    assert len([n for _, ids, _ in epoch(pipeline) for n in ids]) in (40, 43)
    many = [{**turns(big), "id": f"i{i}"} for i in range(40)] + [turns(*[big] * 6)]
    pipeline = Pipeline(qwen, read_records(many, folder), rows=2, max_length=512, seed=3)
    steps = epoch(pipeline)
    assert sorted(n for _, ids, _ in steps for n in ids) == sorted(
        ["long", *(f"i{i}" for i in range(40))]
    )
    assert {batch.shape[1:] for batch, _, _ in steps} <= set(pipeline.shapes)


@pytest.mark.parametrize(("workers", "count"), fast([(0, 3), (1, 1)], [(0, 3), (1, 1), (1, 3)]))
def test_images_that_were_replaced_are_measured_anew(qwen, tmp_path, workers, count):
    write_image(tmp_path / "a.png", 16, 16, seed=0)
    rows = [turns("a.png") | {"id": f"r{i}"} for i in range(count)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    make = lambda: Pipeline(qwen, tmp_path / "data.json", rows=1, workers=workers)  # noqa: E731
    first = epoch(make())
    write_image(tmp_path / "a.png", 40, 60, seed=0)
    with pytest.raises(UserError, match="record . .*replaced since. Start the run again"):
        for _ in range(count):  # one record a start
            epoch(make())
    for _ in range(count):
        try:
            again = epoch(make())
        except UserError as error:
            assert "replaced" in str(error)
    assert again[0][0].shape[2] > first[0][0].shape[2]


def test_closed_steps_read_no_more(qwen, folder):
    """What was made ahead in a thread must not measure records that a next pipeline measures."""
    pipeline = Pipeline(qwen, folder / "data.json", rows=4)
    steps = Steps(pipeline.planner, pipeline.mine, pipeline.making)
    assert steps[0][1].ids
    steps.close()
    with pytest.raises(RuntimeError, match="closed"):
        steps[1]


def test_a_resume_does_not_stop_where_the_run_would_not_have(qwen, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline_module, "WINDOW", 16)
    rows = json.loads((folder / "data.json").read_text())[:40]
    rows[-1]["image"] = ["gone.png"] * len(rows[-1]["image"]) or ["gone.png"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    make = lambda: Pipeline(  # noqa: E731
        qwen, read_records(tmp_path / "data.json", folder), rows=2, shuffle=False,
        on_bad_example="skip", max_bad_share=0.05,
    )  # fmt: skip
    steps = epoch(make())
    assert len(epoch(make(), steps[-4][2])) > 3
