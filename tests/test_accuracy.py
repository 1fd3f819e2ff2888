"""Accuracy counts what it says: exact matches after a stated normalisation, in record order."""

import json

import numpy as np
import pytest

import vlm_jax
from vlm_jax import UserError, generation
from vlm_jax.data import Encoder, read_records
from vlm_jax.data.text.tokenizer import load_tokenizer
from vlm_jax.evals import answers as module
from vlm_jax.evals.accuracy import accuracy, normalise


def test_normalisation():
    assert normalise("  A  Red\nball. ") == normalise("a red ball")
    assert normalise("2") != normalise("two")
    assert normalise("a red ball") != normalise("red ball")
    assert normalise("yes, it is") != normalise("yes")


def test_predictions_are_matched_with_their_records(place, monkeypatch):
    model, params = vlm_jax.load(place / "base")
    encoder = Encoder(place / "base")
    records = read_records(place / "data/train.jsonl")
    tokenizer = load_tokenizer(place / "base")

    def always_red(model, params, batch, max_new_tokens, **ends):
        assert batch.tokens.shape[0] == 5  # the last batch is filled up with empty rows
        ids = tokenizer.encode("Red.") + [tokenizer.eos_token_id] * 4
        return np.tile(np.int32(ids[:4]), (5, 1))

    monkeypatch.setattr(module, "generate", always_red)
    seen = []
    found = accuracy(
        model, params, encoder, records, batch_size=5, on_batch=lambda *now: seen.append(now)
    )
    assert [p.id for p in found.predictions] == [f"r{i}" for i in range(12)]
    assert [p.correct for p in found.predictions] == [i % 2 == 0 for i in range(12)]
    assert found.mean == 0.5 and found.skipped == 0
    assert seen[-1] == (12, 12)
    found = accuracy(model, params, encoder, records, batch_size=5, max_examples=3)
    assert found.mean == pytest.approx(2 / 3)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}])
def test_on_a_mesh_rows_are_spread_and_answers_the_same(place, monkeypatch, sizes):
    encoder, records = Encoder(place / "base"), read_records(place / "data/train.jsonl")
    model, params = vlm_jax.load(place / "base")
    alone = accuracy(model, params, encoder, records, batch_size=6)
    rows = []

    def spied(params, batch, key, **options):
        rows.append(batch.tokens.addressable_shards[0].data.shape[0])
        return compiled(params, batch, key, **options)

    compiled = generation._generate
    monkeypatch.setattr(generation, "_generate", spied)
    mesh = vlm_jax.make_mesh(**{"data": 1, **sizes})
    model, params = vlm_jax.load(place / "base", mesh=mesh)
    spread = accuracy(model, params, encoder, records, batch_size=6)
    assert [p.prediction for p in spread.predictions] == [p.prediction for p in alone.predictions]
    assert set(rows) == {2}  # 6 are made 8, so that four parts have equally many


def test_records_without_an_answer_are_skipped_or_refused(place):
    model, params = vlm_jax.load(place / "base")
    row = {"messages": [{"role": "user", "content": "What color is it?"}]}
    with pytest.raises(UserError, match="None of the 2 evaluation records"):
        accuracy(model, params, Encoder(place / "base"), read_records([row, row]))


def test_bad_records_are_skipped_where_the_encoder_skips(place, tmp_path, monkeypatch):
    model, params = vlm_jax.load(place / "base")
    rows = [json.loads(line) for line in (place / "data/train.jsonl").read_text().splitlines()[:4]]
    broken = tmp_path / "broken.png"  # its header is whole
    broken.write_bytes((place / "data/1.png").read_bytes()[:200])
    records = read_records(
        [rows[0], {**rows[1], "image": str(broken)}, {"id": "x", "conversations": 3}, *rows[2:]],
        place / "data",
    )
    monkeypatch.setattr(module, "generate", lambda *_, **__: np.zeros((2, 4), np.int32))
    skipping = Encoder(place / "base", on_bad_example="skip", allow_absolute_paths=True)
    seen = []
    found = accuracy(
        model, params, skipping, records, batch_size=2, on_batch=lambda *now: seen.append(now)
    )
    assert [p.id for p in found.predictions] == ["r0", "r2", "r3"] and found.skipped == 2
    assert seen[-1] == (4, 4)
    for kept, message in ((records[:2], "broken.png"), (records.rows[2:3], "no list of turns")):
        with pytest.raises(UserError, match=message):
            strict = Encoder(place / "base", allow_absolute_paths=True)
            accuracy(model, params, strict, read_records(kept), batch_size=2)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps([rows[0], {**rows[1], "image": "nowhere.png"}]))
    with pytest.raises(UserError, match=r"In '.*bad\.json', line 1: .*nowhere\.png"):
        accuracy(model, params, strict, read_records(file, place / "data"), batch_size=2)
    with pytest.raises(UserError, match="None of the 1 .*no list of turns"):
        accuracy(model, params, skipping, read_records(records.rows[2:3]))
    for wrong in ({"batch_size": 0}, {"batch_size": -1}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}.* must be at least 1, 1 and 0"):
            accuracy(model, params, skipping, records, **wrong)
    with pytest.raises(UserError, match="max_examples -1; they must be"):
        accuracy(model, params, skipping, records, max_examples=-1)
    with pytest.raises(UserError, match="all 1 evaluation records .* damaged"):
        accuracy(model, params, skipping, read_records(records[1:2]))


def test_questions_that_are_too_long_are_made_to_fit_as_in_training(place):
    model, params = vlm_jax.load(place / "base")
    rows = [json.loads(line) for line in (place / "data/train.jsonl").read_text().splitlines()[:2]]
    record = read_records(rows, place / "data")[0]
    length = Encoder(place / "base").measure(record).tokens
    encoder = Encoder(place / "base", max_seq_length=length - 1)
    fitted = encoder.measure(record)
    assert fitted.notes and fitted.patches < Encoder(place / "base").measure(record).patches
    assert len(encoder.prompt(record)["patches"]) == fitted.patches
    found = accuracy(model, params, encoder, read_records(rows, place / "data"), batch_size=2)
    assert len(found.predictions) == 2 and found.skipped == 0
