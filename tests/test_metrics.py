"""Where numbers go: whole lines, cut on resume, and to the services that are asked for."""

import json
import subprocess
import sys
import types

import pytest
import yaml
from runs import make_config

from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.train import loop, trackers
from vlm_jax.train.trackers import JsonLines, Lines, Log, Meter, Profiler, check_reporters


def test_resume_cuts_lines_of_steps_that_are_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')  # killed while writing
    log = JsonLines(path, resume_step=2)
    log.write(3, {"loss": 0.5})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def wandb(monkeypatch, mode="offline"):
    """Put a module of wandb's name and interface in its place, and return it."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    fake.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def fail(words):
    raise RuntimeError(words)


def test_hosted_reporters_get_the_numbers(tmp_path, monkeypatch):
    calls = []
    fake = wandb(monkeypatch)
    fake.init = lambda **kw: calls.append(("init", kw["name"], kw["config"], kw["dir"]))
    fake.log = lambda values, step: calls.append((step, values))
    fake.finish = lambda: calls.append("finish")
    check_reporters(["wandb", "none", "tensorboard"])
    log = Log(tmp_path, ["wandb", "tensorboard"], config={"a": 1})
    log.write(1, {"loss": 2.0})
    log.write_evaluation(1, {"accuracy": 0.5})
    log.close()
    assert calls == [
        ("init", tmp_path.name, {"a": 1}, str(tmp_path)),
        (1, {"train/loss": 2.0}),
        (1, {"eval/accuracy": 0.5}),
        "finish",
    ]
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {"step": 1, "accuracy": 0.5}


def test_a_reporter_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"pip install 'vlm_jax\[trackio\]'"):
        check_reporters(["trackio"])


def test_wandb_without_a_key_is_told_before_the_model_is_read(monkeypatch, tmp_path, capsys, place):
    fake = wandb(monkeypatch, "online")
    fake.login = lambda: fail("No API key configured. Use `wandb login` to log in.\nMore.")
    monkeypatch.setattr(loop, "build", lambda *_: fail("the model was read"))
    made = make_config(
        place / "base", place / "data/train.jsonl", tmp_path / "out", "training.report_to=wandb"
    )
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(config.to_dict(made)))
    assert main(["train", "--config", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "cannot log in: No API key configured" in said and said.count("\n") == 1
    assert "WANDB_MODE=offline" in said and not (tmp_path / "out").exists()


def test_a_reporter_that_cannot_start_is_told(monkeypatch, tmp_path):
    fake = wandb(monkeypatch)
    fake.init = lambda **_: fail("Timed out while retrying")
    with pytest.raises(UserError, match="'wandb', which cannot start: Timed out while retrying"):
        Log(tmp_path, ["wandb"])
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(UserError, match="'tensorboard', which cannot write.*Leave tensorboard out"):
        Log(tmp_path, ["tensorboard"])


def test_the_loss_of_a_line_is_the_mean_over_its_answer_tokens():
    meter = Meter()
    meter.add(1.0, 10.0)
    meter.add(4.0, 30.0)
    line = meter.read()
    assert line["loss"] == 3.25 and line["tokens"] == 40.0 and line["tokens_per_second"] > 0
    assert meter.read()["tokens"] == 0


def test_time_that_is_left_out_is_in_no_rate_and_loses_no_loss(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trackers.time, "perf_counter", lambda: now[0])
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


@pytest.mark.nightly
def test_a_profile_of_some_steps(place, tmp_path):
    # In a process of its own: torch, which others of this session import, has a profiler too.
    made = make_config(
        place / "base", place / "data/train.jsonl", tmp_path / "run", "training.profile_steps=2-3"
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict(made)))
    command = [sys.executable, "-m", "vlm_jax", "train", "--config", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [*tmp_path.glob("run/profile/plugins/profile/*/*.xplane.pb")]
    assert f"Wrote the profile until step 3 to '{tmp_path / 'run/profile'}'." in done.stdout


@pytest.mark.parametrize(("steps", "done"), [("2-3", [1, 3]), ("4", [3, 4]), ("", [])])
def test_where_a_profile_begins_and_ends(monkeypatch, tmp_path, steps, done):
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(f"jax.profiler.{name}", lambda *_, **__: None)
    toggled = []
    with Profiler(steps, tmp_path, Lines()) as profiler:
        for step in range(6):
            if profiler.at(step):
                profiler.toggle(step)
                toggled.append(step)
    assert toggled == done and not profiler.running


def test_steps_that_are_none_to_profile():
    for steps in ("0-3", "5-4", "a"):
        with pytest.raises(UserError, match="profile_steps"):
            config.load(None, ["model.name_or_path=x", f"training.profile_steps={steps}"])
