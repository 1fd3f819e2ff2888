"""data.eval_share: a share of the records is never trained on, always the same, and evaluated."""

import json
import signal

import pytest
import yaml
from runs import lines, make_config, run, same_run

from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.data import read_records
from vlm_jax.data.records.held_out import hold_out
from vlm_jax.train import metrics


def rows(count, name="r"):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return [{"id": f"{name}{i}", "messages": turns} for i in range(count)]


def ids(records):
    return [record["id"] for record in records]


@pytest.mark.parametrize(("count", "share", "held"), [(2, 0.001, 1), (7, 0.9, 6), (200, 0.1, 20)])
def test_every_record_is_on_one_side(count, share, held):
    whole = read_records(rows(count))
    left, out = hold_out(whole, share, seed=42)
    assert len(out) == held and sorted(ids(left) + ids(out), key=lambda n: int(n[1:])) == ids(whole)
    assert [record["index"] for record in left] == sorted(record["index"] for record in left)
    again = hold_out(read_records(rows(count)), share, seed=42)[1]
    assert ids(again) == ids(out) and again.fingerprint == out.fingerprint
    assert len({left.fingerprint, out.fingerprint, whole.fingerprint}) == 3  # sizes are kept by it
    if count == 200:
        assert ids(hold_out(whole, share, seed=43)[1]) != ids(out)
        assert ids(out) != sorted(ids(out))  # the first ones are a fair sample
    with pytest.raises(UserError, match="one record, of which nothing can be held out"):
        hold_out(read_records(rows(1)), share, 0)


def test_each_source_of_a_mixture_gives_its_share(tmp_path):
    for name, count in (("a", 30), ("b", 10)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count, name))
        (tmp_path / f"{name}.jsonl").write_text(text)
    parts = [{"path": str(tmp_path / "a.jsonl"), "epochs": 0.5}, str(tmp_path / "b.jsonl")]
    left, out = hold_out(read_records(parts), 0.1, seed=1)
    assert [len(part.records) for part in left.parts] == [27, 9]
    assert [len(part.records) for part in out.parts] == [3, 1]
    assert not {*ids(left)} & {*ids(out)} and len(left.order(0, 0)) == 13 + 9
    line = out.parts[0].records[0]["index"] + 1
    assert out.place(0) == f"'{tmp_path / 'a.jsonl'}', line {line}"


@pytest.mark.exact
def test_a_run_holds_out_the_same_when_it_goes_on(place, tmp_path, monkeypatch):
    """Through the command; what is trained on and what is evaluated never meet."""
    made = make_config(
        place / "base", place / "data/train.jsonl", place / "held", "training.eval_steps=2",
        "evaluation.accuracy=false",
    )  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict(made)))
    seen = []
    push = metrics.Watch.push

    def noted(self, step, ids, *rest):
        seen.extend(ids)
        return push(self, step, ids, *rest)

    monkeypatch.setattr(metrics.Watch, "push", noted)
    assert main(["train", "--config", str(recipe), "--eval-share", "0.25"]) == 0
    out = ids(hold_out(read_records(place / "data/train.jsonl"), 0.25, seed=42)[1])
    assert len(out) == 3 and not {*seen} & {*out} and len({*seen}) > 5
    assert [row["step"] for row in lines(place / "held/evaluations.jsonl")] == [2, 4]

    def interrupted(self, step, ids, *rest):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return push(self, step, ids, *rest)

    monkeypatch.setattr(metrics.Watch, "push", interrupted)
    options = ("training.eval_steps=2", "evaluation.accuracy=false", "data.eval_share=0.25")
    assert run(place, "held stopped", *options)[0]["interrupted"]
    monkeypatch.setattr(metrics.Watch, "push", push)
    with pytest.raises(UserError, match="eval_share"):
        run(place, "held stopped", *options[:2], "data.eval_share=0.5", resume=True)
    run(place, "held stopped", *options, resume=True)
    same_run(place / "held", place / "held stopped")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.eval_file=x.jsonl"], "both say what to evaluate on"),
        (["data.streaming=true"], "the length of a stream is unknown"),
    ],
)
def test_a_share_of_nothing_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        config.load(None, ["data.eval_share=0.1", *overrides])


def test_the_held_out_are_previewed(place, capsys, tmp_path):
    arguments = ["--config", str(tmp_path / "c.yaml"), "--split", "eval", "--text"]
    made = make_config(place / "base", place / "data/train.jsonl", place / "no")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict(made)))
    assert main(["preview", *arguments, "--config.data.eval_share=0.25"]) == 0
    said = capsys.readouterr().out
    out = ids(hold_out(read_records(place / "data/train.jsonl"), 0.25, seed=42)[1])
    assert "the first 3 examples in evaluation order" in said and all(one in said for one in out)
