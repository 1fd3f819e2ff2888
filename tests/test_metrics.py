"""Where numbers go: whole lines, cut on resume, and to the services that are asked for."""

import json
import sys
import types

import pytest

from vlm_jax import UserError
from vlm_jax.train import metrics
from vlm_jax.train.metrics import JsonLines, Log, Meter, check_reporters


def test_resume_cuts_lines_of_steps_that_are_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')  # killed while writing
    log = JsonLines(path, resume_step=2)
    log.write(3, {"loss": 0.5})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_hosted_reporters_get_the_numbers(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    fake.init = lambda **kw: calls.append(("init", kw["name"], kw["config"]))
    fake.log = lambda values, step: calls.append((step, values))
    fake.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    check_reporters(["wandb", "none", "tensorboard"])
    log = Log(tmp_path, ["wandb", "tensorboard"], config={"a": 1})
    log.write(1, {"loss": 2.0})
    log.write_evaluation(1, {"accuracy": 0.5})
    log.close()
    assert calls == [
        ("init", tmp_path.name, {"a": 1}),
        (1, {"train/loss": 2.0}),
        (1, {"eval/accuracy": 0.5}),
        "finish",
    ]
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {"step": 1, "accuracy": 0.5}


def test_a_reporter_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"pip install 'vlm_jax\[trackio\]'"):
        check_reporters(["trackio"])


def test_the_loss_of_a_line_is_the_mean_over_its_answer_tokens():
    meter = Meter()
    meter.add(1.0, 10.0)
    meter.add(4.0, 30.0)
    line = meter.read()
    assert line["loss"] == 3.25 and line["tokens"] == 40.0 and line["tokens_per_second"] > 0
    assert meter.read()["tokens"] == 0


def test_time_that_is_left_out_is_in_no_rate_and_loses_no_loss(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = Meter()
    meter.add(1.0, 10.0)
    now[0] += 2.0  # a step
    meter.wait(0.5)
    now[0] += 30.0  # an evaluation
    meter.leave_out(30.0)
    meter.add(3.0, 10.0)
    now[0] += 2.0
    line = meter.read()
    assert line["loss"] == 2.0 and line["tokens"] == 20.0
    assert line["tokens_per_second"] == 5.0 and line["data_wait"] == 0.125
