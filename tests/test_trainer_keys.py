"""Keys of a config mean what they mean in transformers: turns, early stopping, smoothing, order."""

import dataclasses
import json
import math
import random
import signal
import types

import jax
import numpy as np
import pytest
import torch
from checkpoint_files import qwen2_vl_files
from references import quiet, qwen2_vl, qwen2_vl_inputs, tensors
from runs import lines, make_config, run
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_callback import DefaultFlowCallback, TrainerControl, TrainerState
from transformers.trainer_pt_utils import LabelSmoother, get_length_grouped_indices

import vlm_jax
from vlm_jax import UserError, config
from vlm_jax.data import Encoder, Pipeline
from vlm_jax.train import loop
from vlm_jax.train.selection import Best, Patience, every
from vlm_jax.train.setup import make_encoder


def their_turns(args, epoch, total):
    """Return the steps at which transformers logs, evaluates and saves, the last one left out."""
    state = TrainerState(max_steps=total)
    state.compute_steps(args, total)
    flow, due = DefaultFlowCallback(), ([], [], [])
    for step in range(1, total):
        state.global_step, state.epoch = step, step / epoch
        control = flow.on_step_end(args, state, TrainerControl())
        if step % epoch == 0:
            control = flow.on_epoch_end(args, state, control)
        turns = control.should_log, control.should_evaluate, control.should_save
        for steps, now in zip(due, turns, strict=True):
            steps += [step] if now else []
    return due


@pytest.mark.parametrize("number", range(12))
def test_turns_are_those_of_transformers(number, tmp_path):
    rng = random.Random(number)
    epoch, total = rng.randint(2, 9), rng.randint(8, 40)
    chosen = {f"{k}_strategy": rng.choice(["no", "steps", "steps", "epoch"])
              for k in ("logging", "eval", "save")}  # fmt: skip
    chosen |= {f"{k}_steps": rng.choice([1, 3, 7, 0.1, 0.34]) for k in ("logging", "eval", "save")}
    chosen["eval_delay"] = rng.choice([0, 1.5, 2, 6])
    chosen["logging_first_step"] = number % 2 == 0
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **chosen)
    logs, evaluations, saves = their_turns(args, epoch, total)

    def ours(kind, delay=0.0):
        at = every(chosen[f"{kind}_strategy"], chosen[f"{kind}_steps"], epoch, total, delay)
        return [step for step in range(1, total) if at(step)]

    assert ours("eval", chosen["eval_delay"]) == evaluations
    assert ours("save") == saves
    first = [1] if chosen["logging_first_step"] else []
    assert sorted({*first, *ours("logging")}) == logs


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_patience_is_the_callbacks(greater, threshold):
    rng = np.random.default_rng(0)
    stopped = 0
    for limit in (1, 2, 3):
        for _ in range(40):
            values = np.round(rng.normal(size=10), 1)
            values[rng.random(10) < 0.1] = math.nan
            callback = EarlyStoppingCallback(limit, threshold)
            args = types.SimpleNamespace(
                metric_for_best_model="loss", greater_is_better=greater, save_strategy="no"
            )
            trainer = types.SimpleNamespace(args=args, state=TrainerState())
            control, patience = TrainerControl(), Patience(Best("loss", greater), limit, threshold)
            for value in values:
                metrics = {"eval_loss": float(value)}
                callback.on_evaluate(args, trainer.state, control, metrics)
                Trainer._determine_best_metric(trainer, metrics, None)
                patience = patience.after({"loss": float(value)})
                note = json.loads(json.dumps(patience.note))
                patience = dataclasses.replace(patience, **note)
                assert patience.waited == callback.early_stopping_patience_counter
                assert patience.over == control.should_training_stop
                if patience.over:
                    stopped += 1
                    break
    assert stopped > 60


LOSSES = {1: 1.0, 2: 0.5, 3: 0.6, 4: 0.55, 5: 0.2, 6: 0.1}


@pytest.mark.parametrize(("best", "stopped"), [(False, 3), (True, 4)])
def test_a_resumed_run_stops_where_one_that_ran_through_does(place, monkeypatch, best, stopped):
    evaluate, push = loop.evaluated, loop.Watch.push

    def drawn(*, state, **rest):
        return {**evaluate(state=state, **rest), "loss": LOSSES[int(state.step)]}

    def push_and_interrupt(self, step, *rest):
        if step == stopped:
            signal.raise_signal(signal.SIGINT)
        return push(self, step, *rest)

    monkeypatch.setattr(loop, "evaluated", drawn)
    options = ("evaluation.accuracy=false", f"data.eval_file={place / 'data/train.jsonl'}",
               "training.max_steps=6", "training.eval_steps=1", "training.save_steps=2",
               "training.early_stopping_patience=2",
               f"training.load_best_model_at_end={best}")  # fmt: skip
    name = f"early {best} {stopped}"
    monkeypatch.setattr(loop.Watch, "push", push_and_interrupt)
    outcome, directory, _ = run(place, name, *options)
    assert outcome["steps"] == stopped
    assert outcome["interrupted"]  # at 4, too, where only that step's evaluation is left to make
    monkeypatch.setattr(loop.Watch, "push", push)
    outcome, _, text = run(place, name, *options, resume=True)
    assert outcome["steps"] == 4 and outcome["stopped_early"] and not outcome["interrupted"]
    assert "Stopped early, after step 4 of 6: 2 evaluations in a row" in text
    assert [row["step"] for row in lines(directory / "evaluations.jsonl")] == [1, 2, 3, 4]
    assert (directory / "adapter").is_dir()
    assert outcome.get("best", {}).get("step") == (2 if best else None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.eval_file=null"], "early_stopping_patience is 1, but there is nothing to evaluate"),
        (["training.eval_strategy=no"], "early_stopping_patience is 1.*eval_strategy is no"),
    ],
)
def test_a_run_that_nothing_could_stop_early_is_refused(tmp_path, overrides, message):
    made = make_config(tmp_path, tmp_path, tmp_path / "run", "data.eval_file=x.jsonl",
                       "training.early_stopping_patience=1", *overrides)  # fmt: skip
    with pytest.raises(UserError, match=message):
        loop.train(made)


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_label_smoothing_is_transformers(tmp_path, epsilon):
    twin = qwen2_vl(tmp_path)
    model, params = vlm_jax.load(tmp_path)
    inputs = qwen2_vl_inputs("one image")
    labels = np.where(inputs["input_ids"] < 180, inputs["input_ids"], -100)
    labels[:, :2] = -100
    with quiet():
        logits = twin(**tensors(inputs)).logits
    smoother = LabelSmoother(epsilon=epsilon)
    expected = smoother({"logits": logits}, torch.from_numpy(labels), shift_labels=True)
    expected.backward()
    table = [("lm_head/.*", "full"), (".*", "frozen")]
    trainable, frozen = vlm_jax.split(params, table)
    batch = model.batch(**inputs, labels=labels)

    def mean(trainable):
        total, tokens = vlm_jax.loss(model, trainable, frozen, batch, label_smoothing=epsilon)
        return total / tokens

    value, grads = jax.jit(jax.value_and_grad(mean))(trainable)
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    theirs = twin.lm_head.weight.grad.numpy().T
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(grads["lm_head"]["kernel"], theirs, atol=1e-5)


def test_neftune_is_transformers(tmp_path):
    """Noise as its hook draws, on text alone, and of the size of an unpadded row."""
    qwen2_vl(tmp_path)
    model, params = vlm_jax.load(tmp_path)
    inputs = qwen2_vl_inputs("images of different sizes")
    T, D, alpha = inputs["input_ids"].shape[1], model.config.text.hidden_size, 5.0
    embed = lambda length, noise, key: model.module.apply(  # noqa: E731
        {"params": params}, model.batch(**inputs, pad_to=length), noise,
        method="embed", rngs={"noise": key},
    )  # fmt: skip
    noisy = jax.jit(embed, static_argnums=(0, 1))
    keys = [jax.random.key(n) for n in range(30)]
    plain = noisy(T + 8, 0.0, keys[0])
    drawn = np.stack([noisy(T + 8, alpha, key) - plain for key in keys])[:, 0, :T]
    text = inputs["mm_token_type_ids"][0] == 0
    assert 0 < text.sum() < T and not drawn[:, ~text].any()
    embedding = torch.nn.Embedding(200, D)
    embedding.neftune_noise_alpha = alpha
    ids = torch.from_numpy(inputs["input_ids"]).repeat(30, 1)
    with torch.no_grad():
        hook = neftune_post_forward_hook(embedding, None, embedding(ids)) - embedding(ids)
    theirs = hook.numpy()[:, text]
    ours = drawn[:, text]
    assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=1e-3)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.02)
    assert abs(ours.mean()) < 0.02 * ours.std() * 3

    batch, key = model.batch(**inputs, labels=inputs["input_ids"]), {"dropout": keys[0]}
    loss = jax.jit(
        lambda key, alpha: vlm_jax.loss(model, params, {}, batch, key, neftune_alpha=alpha)[0],
        static_argnums=1,
    )
    other = {"dropout": keys[1]}
    assert float(loss(key, 0.0)) == float(loss(other, 0.0))
    assert len({float(loss(k, a)) for k in (key, other) for a in (0.0, alpha)}) == 3


def test_keys_of_a_run_reach_it(place):
    smooth = 0.2
    _, directory, _ = run(
        place, "keys", f"data.eval_file={place / 'data/train.jsonl'}", "evaluation.accuracy=false",
        "training.eval_on_start=true", "training.eval_steps=1", "training.eval_delay=3",
        "training.logging_steps=0.5", "training.logging_first_step=true",
        f"training.label_smoothing_factor={smooth}", "training.data_seed=7",
        "training.neftune_noise_alpha=5",
    )  # fmt: skip
    assert [row["step"] for row in lines(directory / "metrics.jsonl")] == [1, 2, 4]
    found = lines(directory / "evaluations.jsonl")
    assert [row["step"] for row in found] == [0, 3, 4]
    made = config.load(directory / "config.json")
    model, params = vlm_jax.load(place / "base")
    data = Pipeline(make_encoder(made, model), place / "data/train.jsonl", rows=4)
    for smoothing, same in ((smooth, True), (0.0, False)):
        loss = jax.jit(lambda b, s=smoothing: vlm_jax.loss(model, params, {}, b, label_smoothing=s))
        sums = [loss(batch) for batch, _ in data.eval_batches()]
        total, tokens = np.sum(np.array(jax.device_get(sums), np.float64), 0)
        assert (found[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)) == same
    with pytest.raises(UserError, match="training.data_seed"):
        run(place, "keys", "training.data_seed=8", resume=True)


@pytest.fixture(scope="module")
def long_and_short(tmp_path_factory):
    """Return (encoder, a file of 90 records of many lengths, their lengths)."""
    place = tmp_path_factory.mktemp("lengths")
    encoder = Encoder(qwen2_vl_files(place / "base"))
    words = np.random.default_rng(0).permutation(90) % 70 + 1
    rows = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": "red " * int(n)},
                {"from": "gpt", "value": "red"},
            ],
        }
        for i, n in enumerate(words)
    ]
    (place / "data.json").write_text(json.dumps(rows))
    lengths = [encoder.measure(record).tokens for record in rows]
    return encoder, place / "data.json", lengths


def members(steps):
    return [[row[0] for row in step.rows] for step in steps]


def test_group_by_length_is_transformers_sampler(long_and_short, monkeypatch):
    encoder, path, lengths = long_and_short
    data = Pipeline(encoder, path, rows=3, seed=5, sampling="group_by_length")
    assert data.planner.window == 3 * (90 // 12)
    for epoch in range(3):
        order = data.records.order(5, epoch, True)
        monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.tensor(order))  # noqa: B023
        theirs = get_length_grouped_indices(lengths, 3)
        # There the longest example of all changes places with the first: memory runs out early.
        # Here the largest shape is compiled before the first step.
        first, longest = max(order[:21], key=lambda i: lengths[i]), int(np.argmax(lengths))
        ours = list(data.planner.epoch({"epoch": epoch, "step": 0}))
        flat = [index for step in members(ours) for index in step]
        assert sorted(flat) == list(range(90))
        swapped = {first: longest, longest: first}
        assert [lengths[i] for i in theirs] == [lengths[swapped.get(i, i)] for i in flat]
        rest = data.planner.epoch(ours[10].after)
        assert members(rest) == members(ours[11:])


def test_random_and_sequential_steps(long_and_short):
    encoder, path, _ = long_and_short
    order = Pipeline(encoder, path, rows=4, seed=5).records.order(5, 0, True)
    for sampling, wanted in (("random", order), ("sequential", np.arange(90))):
        data = Pipeline(encoder, path, rows=4, seed=5, sampling=sampling)
        steps = members(data.planner.epoch({"epoch": 0, "step": 0}))
        assert [index for step in steps for index in step] == wanted.tolist()
        assert [len(step) for step in steps] == [4] * 22 + [2]


def test_words_and_shares_of_keys():
    read = lambda *pairs: config.load(None, [f"training.{pair}" for pair in pairs]).training  # noqa: E731
    assert read("group_by_length=true").train_sampling_strategy == "group_by_length"
    assert read("group_by_length=false").train_sampling_strategy == "random"
    assert read("save_steps=0.25").save_steps == 0.25 and read("eval_steps=2e1").eval_steps == 20
    for pair in ("save_steps=1.5", "logging_steps=-1", "warmup_steps=many"):
        with pytest.raises(UserError, match="number of steps, or a share of all steps below 1"):
            read(pair)
    with pytest.raises(UserError, match="packed rows all have one length"):
        config.load(None, ["training.group_by_length=true", "data.packing=true"])
    with pytest.raises(UserError, match="data.shuffle' is false"):
        config.load(None, ["training.train_sampling_strategy=random", "data.shuffle=false"])
