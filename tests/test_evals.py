"""What every evaluator promises; ANLS; and named ones in a run, by the command as users give it."""

import json

import numpy as np
import pytest
import yaml
from runs import lines, write_recipe

import vlm_jax
from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.config.options import parser
from vlm_jax.config.specs import EvaluatorSpec, RunSpec, TrainSpec
from vlm_jax.data import Encoder, read_records
from vlm_jax.data.text.tokenizer import load_tokenizer
from vlm_jax.evals import EVALS, answers
from vlm_jax.evals.anls import edit_distance, similarity
from vlm_jax.evals.answers import right_answers
from vlm_jax.train.selection import Intervals
from vlm_jax.train.setup import evaluators_of


@pytest.mark.parametrize("name", EVALS)
def test_an_evaluator(name, place, monkeypatch):
    model, params = vlm_jax.load(place / "base")
    encoder, records = Encoder(place / "base"), read_records(place / "data/train.jsonl")
    tokenizer, said, seen = load_tokenizer(place / "base"), "RED", []

    def answer(model, params, batch, max_new_tokens, **ends):
        ids = tokenizer.encode(said)[:max_new_tokens]
        row = np.full(max_new_tokens, ends["pad_token_id"], np.int32)
        row[: len(ids)] = ids
        return np.tile(row, (len(batch.tokens), 1))

    monkeypatch.setattr(answers, "generate", answer)
    judge = lambda **more: EVALS[name](model, params, encoder, records, batch_size=5, **more)  # noqa: E731
    found = judge(on_batch=lambda *now: seen.append(now))
    assert [p.id for p in found.predictions] == [f"r{i}" for i in range(12)] and not found.skipped
    assert [p.score for p in found.predictions] == [1, 0] * 6  # whatever its case
    assert found.figures == {name: 0.5, "examples": 12} and found.metric == name
    assert seen[-1] == (12, 12) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    line = json.loads(json.dumps(found.predictions[0].to_json()))
    assert line["id"] == "r0" and line["prediction"] == "RED"
    assert judge(max_examples=3).figures == {name: pytest.approx(2 / 3), "examples": 3}
    said = ""
    assert judge().mean == 0
    with pytest.raises(UserError, match="must be at least"):
        judge(max_new_tokens=0)


def test_the_help_of_evaluate_names_every_evaluator(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["evaluate", "--help"])
    told = capsys.readouterr().out.rpartition("--eval ")[2].partition("--split")[0]
    assert all(name in told for name in EVALS)


def test_edit_distances():
    for one, other, distance in (
        *(("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0)),
        *(("flaw", "lawn", 2), ("same", "same", 0), ("ab", "ba", 2)),
    ):
        assert edit_distance(one, other) == edit_distance(other, one) == distance


@pytest.mark.parametrize(
    ("prediction", "right", "score"),
    [
        ("Paris", ["paris"], 1.0),  # case counts nothing
        ("  new   york ", ["New York"], 1.0),
        ("parid", ["paris"], 0.8),
        ("pards", ["london", "paris"], 0.8),  # the best of several
        ("ab", ["abcd"], 0.0),  # half of it is missing: no longer below 0.5
        ("abc", ["abcde"], 0.6),
        ("", ["yes"], 0.0),
    ],
)
def test_anls(prediction, right, score):
    assert similarity(prediction, right) == pytest.approx(score)


def test_records_may_have_several_right_answers():
    rows = [
        {"question": "where?", "answer": ["Paris", " paris, france ", "Paris"]},
        {"question": "where?", "answer": "Paris"},
        {"messages": [{"role": "user", "content": "where?"}]},
    ]
    found = [right_answers(record) for record in read_records(rows)]
    assert found == [("Paris", "paris, france"), ("Paris",), ()]


def test_when_an_evaluator_is_due():
    def due(every):
        t = TrainSpec(eval_strategy="steps", eval_steps=5)
        named = {"a": EvaluatorSpec(eval="anls", file="a.jsonl", every=every)}
        at = Intervals.of(t, 8, 8, False, None, None, named).evaluate["a"]
        return [step for step in range(9) if at(step)]

    assert due(None) == [0, 5, 8] and due(3) == [0, 3, 6, 8]


def test_evaluators_are_settings_as_others(tmp_path):
    made = config.load(
        None, ["evaluators.docvqa.file=[{path: a.jsonl}, b.jsonl]", "evaluators.docvqa.every=20"]
    )
    assert made.evaluators == {
        "docvqa": EvaluatorSpec(file=[{"path": "a.jsonl"}, "b.jsonl"], every=20)
    }
    assert made.flat()["evaluators.docvqa.every"] == 20
    assert made.having({"evaluators.docvqa.every": 5}).evaluators["docvqa"].every == 5
    assert made.evaluators["docvqa"].every == 20
    file = tmp_path / "config.json"
    file.write_text(json.dumps(made.to_dict()))
    assert config.load(file) == config.load(None, made.flat()) == made
    given = config.get_config()
    given.evaluators.docvqa = {"file": "a.jsonl"}
    assert RunSpec.of(given).evaluators == {"docvqa": EvaluatorSpec(file="a.jsonl")}
    assert config.load(None).evaluators == {} and config.load(None).to_dict()["evaluators"] == {}


def recipe(place, directory, **evaluators):
    file = write_recipe(
        directory, place / "base", place / "data/train.jsonl", "training.max_steps=3"
    )
    tree = yaml.safe_load(file.read_text())
    tree["evaluators"] = evaluators
    tree["training"]["report_to"] = ["tensorboard"]
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def test_named_evaluators_run_at_steps_of_their_own(place, tmp_path, capsys):
    data = place / "data/train.jsonl"
    rows = [{**row, "id": f"d{row['id']}"} for row in lines(data)][:5]
    questions = [
        {"id": row["id"], "image": row["image"], "question": "<image>What color is it?"}
        | {"answer": [row["conversations"][1]["value"], "a color"]}
        for row in rows
    ]
    asked = place / "data/asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in questions))
    file = recipe(
        place,
        tmp_path,
        docvqa={"eval": "anls", "file": str(asked), "every": 2, "max_new_tokens": 4},
        exact={"file": str(data), "max_examples": 3},
    )
    command = ["train", "--config", file, "--config.evaluators.exact.batch_size=3"]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    out = tmp_path / "out"
    second, last = lines(out / "evaluations.jsonl")
    assert second.keys() == {"step", "docvqa/anls", "docvqa/examples", "seconds"}
    assert second.keys() | {"exact/accuracy", "exact/examples"} == last.keys()
    assert (second["step"], last["step"]) == (2, 3)
    assert last["docvqa/examples"] == 5 and last["exact/examples"] == 3
    assert f"step 2/3 evaluation: docvqa/anls {second['docvqa/anls']:.4f}, " in said
    assert f", exact/accuracy {last['exact/accuracy']:.4f}, " in said
    board = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert b"eval/docvqa/anls" in board

    # The command for a finished run finds the same.
    judged = ["evaluate", "--run", str(out), "--data", str(asked), "--json", "--eval", "anls"]
    file = tmp_path / "predictions.jsonl"
    assert main([*judged, "--max-new-tokens", "4", "--predictions", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["anls"] == last["docvqa/anls"] and found["examples"] == 5
    first = lines(file)[0]
    assert first["answers"] == ["red", "a color"] and 0 <= first["score"] <= 1

    # A stop between a save and its evaluation: the resumed run makes it.
    whole = (out / "evaluations.jsonl").read_text()
    (out / "evaluations.jsonl").write_text(whole.splitlines(True)[0])
    assert main([*command, "--resume"]) == 0
    again = lines(out / "evaluations.jsonl")
    assert [{**row, "seconds": 0} for row in again] == [
        {**row, "seconds": 0} for row in (second, last)
    ]


def test_named_evaluators_beside_held_out_data(place, tmp_path):
    data = str(place / "data/train.jsonl")
    file = recipe(place, tmp_path, a={"file": data, "max_examples": 2, "every": 2})
    held_out = [f"data.eval_file={data}", "training.eval_strategy=steps", "training.eval_steps=3"]
    more = ["training.eval_on_start=true", "training.early_stopping_patience=1"]
    words = [f"--config.{word}" for word in (*held_out, *more, "evaluation.max_examples=2")]
    assert main(["train", "--config", file, *words]) == 0
    rows = lines(tmp_path / "out/evaluations.jsonl")
    both = {"step", "loss", "accuracy", "examples", "a/accuracy", "a/examples", "seconds"}
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert [set(row) for row in rows] == [
        both,
        {"step", "a/accuracy", "a/examples", "seconds"},
        both,
    ]
    assert rows[2]["accuracy"] == rows[2]["a/accuracy"]  # of the same two records


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        ({"eval": "anls"}, "'evaluators.a.file' is not set: name a file"),
        ({"file": "no.jsonl"}, "evaluators.a.file: .*'no.jsonl'"),
        ({"file": "DATA", "eval": "anlss"}, "'evaluators.a.eval' is 'anlss'.*'anls'"),
        (
            {"file": "DATA", "evry": 3},
            "key 'evaluators.a.evry' in .*did you mean 'every'.*NAME.KEY",
        ),
        ({"file": "DATA", "every": 0}, "'evaluators.a.every' is 0; it must be between 1"),
        ({"file": "DATA", "every": "soon"}, "'evaluators.a.every' has the value 'soon'.*int.*None"),
        ("some.jsonl", "Unknown config key 'evaluators.a' .*Expected evaluators.NAME.KEY"),
        ({}, "Unknown config key 'evaluators.a' "),
    ],
)
def test_an_evaluator_that_cannot_run_is_refused_at_the_start(
    place, tmp_path, monkeypatch, evaluator, message
):
    monkeypatch.setattr(vlm_jax.hub.load, "read_leaf", None)  # nobody comes to read weights
    if isinstance(evaluator, dict) and evaluator.get("file") == "DATA":
        evaluator = {**evaluator, "file": str(place / "data/train.jsonl")}
    with pytest.raises(UserError, match=message):
        evaluators_of(config.load(recipe(place, tmp_path, a=evaluator)))
