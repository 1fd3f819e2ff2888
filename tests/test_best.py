"""The best checkpoint stays, and the result is made of it."""

import json
import math
import signal

import numpy as np
import pytest
from runs import make_config, run
from safetensors.numpy import load_file
from test_checkpoint import make_state

from vlm_jax import UserError
from vlm_jax.train import loop
from vlm_jax.train.checkpoint import Checkpoints, flat_state
from vlm_jax.train.selection import Best, best_of, kept


def test_the_best_value_wins_and_of_equal_ones_the_earliest():
    losses = {1: 2.0, 2: 1.0, 3: 1.0, 4: 3.0}
    found = {step: {"loss": value, "accuracy": value} for step, value in losses.items()}
    assert Best("loss", False).step(found) == 2
    assert Best("accuracy", True).step(found) == 4
    assert Best("loss", False).step({**found, 5: {"loss": math.nan}, 6: {"loss": -math.inf}}) == 2
    assert Best("accuracy", True).step({**found, 7: {}, 8: {"loss": 9.0}}) == 4
    assert Best("loss", False).step({1: {"loss": math.nan}, 2: {}}) is None


def test_the_newest_and_the_best_stay_under_any_limit():
    assert kept([1, 2, 3, 4], 0, 2) == {1, 2, 3, 4}
    assert kept([1, 2, 3, 4], 2, None) == {3, 4}
    assert kept([1, 2, 3, 4], 2, 4) == {3, 4}
    assert kept([1, 2, 3, 4], 2, 1) == {1, 4}
    assert kept([1, 2, 3, 4], 3, 1) == {1, 3, 4}
    assert kept([1, 2, 3, 4], 1, 1) == {1, 4}
    assert kept([], 2, None) == set()


def test_the_best_is_kept_known_again_and_read_without_moments(tmp_path):
    best, values = Best("loss", False), {1: 2.0, 2: 1.0, 3: math.nan, 4: 1.0, 5: 1.5}
    with Checkpoints(tmp_path, {}, keep=2, best=best) as checkpoints:
        for step, value in values.items():
            checkpoints.save(step, make_state(seed=step), {}, {"loss": value, "seconds": 1.0})
        checkpoints.save(6, make_state(seed=6), {})
    assert checkpoints.steps == [2, 6] and checkpoints.best_step == 2
    with Checkpoints(tmp_path, {}, keep=2, best=best) as again:
        assert again.steps == [2, 6] and again.best_step == 2
        back = again.restore_trainable(make_state().trainable, 2)
        with pytest.raises(UserError, match=r"a\.kernel"):
            again.restore_trainable(make_state(width=5).trainable, 2)
    for name, leaf in flat_state(make_state(seed=2).trainable).items():
        np.testing.assert_array_equal(leaf, flat_state(back)[name], err_msg=name)
    for path in (tmp_path / "2/meta").rglob("*"):  # a damaged one is no candidate
        path.write_bytes(b"")
    with Checkpoints(tmp_path, {}, keep=2, best=best) as damaged:
        assert damaged.best_step is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.eval_file=null"], "nothing to evaluate on: set data.eval_file"),
        (["training.eval_strategy=no"], "save_strategy is steps and training.eval_strategy is no"),
        (["training.save_strategy=epoch"], "save_strategy is epoch.*eval_strategy is steps"),
        (["training.eval_steps=3"], "save_steps is 2.*not a multiple of training.eval_steps, 3"),
        (
            ["training.metric_for_best_model=accuracy", "evaluation.accuracy=false"],
            "Set evaluation.accuracy=true",
        ),
    ],
)
def test_a_run_that_could_not_choose_is_refused_before_anything_is_written(
    tmp_path, overrides, message
):
    made = make_config(
        tmp_path / "base", tmp_path / "data", tmp_path / "run", "data.eval_file=x.jsonl",
        "training.load_best_model_at_end=true", "training.eval_steps=1", *overrides,
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        loop.train(made)
    assert not (tmp_path / "run").exists()


def test_how_a_config_chooses(tmp_path):
    def chosen(*overrides):
        return best_of(
            make_config(
                tmp_path, tmp_path, tmp_path, "data.eval_file=x", "training.eval_steps=2",
                "training.load_best_model_at_end=true", *overrides,
            )
        )  # fmt: skip

    assert chosen() == chosen("training.metric_for_best_model=eval_loss") == Best("loss", False)
    assert chosen("training.metric_for_best_model=accuracy") == Best("accuracy", True)
    assert chosen("training.greater_is_better=true") == Best("loss", True)
    assert chosen("training.load_best_model_at_end=false") is None
    with pytest.raises(UserError, match="metric_for_best_model.*Supported: loss, accuracy"):
        chosen("training.metric_for_best_model=bleu")


@pytest.mark.parametrize(("stopped", "kept"), [(5, ["4", "5"]), (4, ["2", "4"])])
def test_the_result_is_the_best_checkpoints_whether_or_not_the_run_was_stopped(
    place, monkeypatch, stopped, kept
):
    losses = {1: 0.1, 2: 1.0, 3: 0.1, 4: 0.5, 5: 0.1, 6: 0.7}  # odd steps are not saved, or stopped
    evaluate, push = loop.evaluated, loop.Watch.push

    def drawn(*, state, **rest):
        values = evaluate(state=state, **rest)
        assert np.isfinite(values["loss"])
        return {**values, "loss": losses[int(state.step)]}

    def push_and_interrupt(self, step, *rest):
        if step == stopped:
            signal.raise_signal(signal.SIGINT)
        return push(self, step, *rest)

    options = ("evaluation.accuracy=false", "training.lr_scheduler_type=constant",
               f"data.eval_file={place / 'data/train.jsonl'}")  # fmt: skip
    choosing = (*options, "training.max_steps=6", "training.load_best_model_at_end=true",
                "training.eval_steps=1", "training.save_total_limit=1")  # fmt: skip
    monkeypatch.setattr(loop, "evaluated", drawn)
    monkeypatch.setattr(loop.Watch, "push", push_and_interrupt)
    name = f"best {stopped}"
    outcome, directory, _ = run(place, name, *choosing)
    assert outcome["interrupted"] and outcome["steps"] == stopped
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == kept
    monkeypatch.setattr(loop.Watch, "push", push)
    outcome, _, text = run(place, name, *choosing, resume=True)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["4", "6"]
    facts = {"step": 4, "metric": "loss", "value": 0.5}
    assert outcome["best"] == json.loads((directory / "best.json").read_text()) == facts
    assert "The result is step 4's: its loss on held-out data, 0.5000" in text
    ours = load_file(directory / "adapter/adapter_model.safetensors")
    four = load_file(
        run(place, f"four {stopped}", *options)[1] / "adapter/adapter_model.safetensors"
    )
    assert ours.keys() == four.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], four[path], err_msg=path)
    last, _, _ = run(place, name, *choosing[:-3], resume=True)  # and the last step's without
    assert "best" not in last and not (directory / "best.json").exists()
    again = load_file(directory / "adapter/adapter_model.safetensors")
    assert any(not np.array_equal(ours[path], again[path]) for path in ours)
