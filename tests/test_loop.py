"""A whole run on a tiny checkpoint: what it writes, how it resumes, and what stops it."""

import io
import json
import shutil
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console
from runs import lines, make_base, make_config, make_data, run, same_run
from safetensors.numpy import load_file

import vlm_jax
from vlm_jax import UserError
from vlm_jax.config.schema import get_config
from vlm_jax.config.specs import RunSpec
from vlm_jax.sharding import make_mesh
from vlm_jax.train import loop, metrics, moments
from vlm_jax.train.results import load_run
from vlm_jax.train.setup import build
from vlm_jax.trees import flatten

pytestmark = pytest.mark.exact


def test_a_run_writes_what_it_promises(straight):
    outcome, directory, text = straight
    assert outcome["steps"] == 4 and not outcome["interrupted"]
    names = {path.name for path in directory.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "evaluations.jsonl", "tensorboard"),
        *("checkpoints", "adapter"),
    }
    rows = lines(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() >= {"loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"}
    assert rows[0]["learning_rate"] == 0.0 and rows[1]["learning_rate"] == 0.01  # warm-up: 1 step
    evaluation = lines(directory / "evaluations.jsonl")[-1]
    assert evaluation["step"] == 4 and 0 <= evaluation["accuracy"] <= 1
    assert evaluation["examples"] == 12 and np.isfinite(evaluation["loss"])
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["2", "4"]
    assert (
        "trainable params: 5,648 || all params: 32,640 || trainable%: 17.3039" in text
    )  # as in PEFT
    assert "LoRA" in text and "nothing (frozen)" in text
    head = "\n12 of 12 records, 12 to evaluate on; 2 rows a step; 4 steps, 6 an epoch\n"
    assert head in text and "float32" not in text  # the rest is for --verbose
    right = round(12 * evaluation["accuracy"])
    assert f"step 4/4  evaluation: loss {evaluation['loss']:.4f}, {right} of 12 right, " in text
    adapter = json.loads((directory / "adapter/adapter_config.json").read_text())
    assert adapter["modules_to_save"] == ["merger"] and adapter["r"] == 2


def test_only_what_the_table_names_has_changed(place, straight):
    model, trained, _ = load_run(straight[1])
    base = flatten(vlm_jax.load(place / "base")[1])
    for path, leaf in flatten(trained).items():
        if path in base:
            same = np.array_equal(leaf, base[path])
            assert same == (model.component(path) != "projector"), path


def test_stop_and_resume_equals_no_stop(place, straight, monkeypatch):
    push = metrics.Watch.push

    def push_and_interrupt(self, step, ids, metrics, images):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return push(self, step, ids, metrics, images)

    monkeypatch.setattr(loop.Watch, "push", push_and_interrupt)
    outcome, directory, text = run(place, "stopped", "data.max_shapes=2")
    assert outcome["interrupted"] and outcome["steps"] == 2
    assert f"saved '{directory / 'checkpoints' / '2'}'" in text
    assert not (directory / "adapter").exists()
    monkeypatch.undo()

    outcome, _, text = run(place, "stopped", "data.max_shapes=2", resume=True)
    assert outcome["steps"] == 4 and "from step 2" in text
    keys = ("step", "loss", "learning_rate", "grad_norm", "tokens", "epoch")
    ours, theirs = (lines(d / "metrics.jsonl") for d in (directory, straight[1]))
    assert [[row[k] for k in keys] for row in ours] == [[row[k] for k in keys] for row in theirs]
    ours, theirs = (
        load_file(d / "adapter/adapter_model.safetensors") for d in (directory, straight[1])
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_run_goes_on_with_paged_moments_but_not_with_eight_bits(place, straight, monkeypatch):
    monkeypatch.setattr(moments, "SMALLEST_PAGED", 32)
    monkeypatch.setattr(moments, "SMALLEST_PAGE", 8)
    shutil.copytree(straight[1], place / "paged")
    shutil.rmtree(place / "paged" / "checkpoints" / "4")
    with pytest.raises(UserError, match=r"'training\.optim' was 'adamw' .* is 'adamw_8bit' now"):
        run(place, "paged", "data.max_shapes=2", "training.optim=paged_adamw_8bit", resume=True)
    *_, text = run(place, "paged", "data.max_shapes=2", "training.optim=paged_adamw", resume=True)
    assert "from step 2" in text
    meta = json.loads((place / "paged/checkpoints/4/meta/metadata").read_text())
    before = json.loads((place / "paged/checkpoints/2/meta/metadata").read_text())
    assert meta["identity"] == before["identity"] and meta["shapes"] != before["shapes"]
    ours, theirs = (
        load_file(d / "adapter/adapter_model.safetensors") for d in (place / "paged", straight[1])
    )
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_an_evaluation_that_a_stop_meets_is_made_by_the_resumed_run(place, monkeypatch):
    """Stopped in the step before it, in its losses and in its answers; and killed once behind it.

    Loss counts as the better the greater it is, so that step 2 is the best, whose evaluation was
    given up, and the run stops early, which takes that evaluation too.
    """
    options = (
        "training.max_steps=8", "training.eval_steps=2", "training.load_best_model_at_end=true",
        "training.greater_is_better=true", "training.early_stopping_patience=2",
        "training.eval_on_start=true", "evaluation.max_new_tokens=2", "evaluation.batch_size=4",
        f"data.eval_file={place / 'data/train.jsonl'}",
    )  # fmt: skip
    whole, directory, _ = run(place, "not met", *options)
    assert whole["stopped_early"] and whole["steps"] == 6 and whole["best"]["step"] == 2
    real, signals, calls = {}, [], []

    def tell(where):
        if signals and signals[0] == where:
            signal.raise_signal(getattr(signal, signals.pop(0)[0]))

    def push(self, step, *rest):
        tell(("SIGINT", "step", step))
        return real["push"](self, step, *rest)

    def evaluate(*, state, check, **rest):
        step = int(state.step)

        def checked():
            calls.append(step)
            tell(("SIGTERM", "batch", step, calls.count(step)))
            check()

        return real["evaluate"](state=state, check=checked, **rest)

    real |= {"push": loop.Watch.push, "evaluate": loop.evaluated}
    monkeypatch.setattr(loop.Watch, "push", push)
    monkeypatch.setattr(loop, "evaluated", evaluate)
    for step, told in (
        (0, ("SIGTERM", "batch", 0, 1)),  # on start
        (2, ("SIGINT", "step", 2)),
        (2, ("SIGTERM", "batch", 2, 5)),  # two of losses come before those of answers
        (6, ("SIGTERM", "batch", 6, 2)),
    ):
        signals.append(told)
        calls.clear()
        outcome, stopped, text = run(place, "met", *options, resume="auto")
        assert not signals and outcome["interrupted"] and outcome["steps"] == step
        assert "before its evaluation; saved" in text and not (stopped / "adapter").exists()
        assert all(row["step"] < step for row in lines(stopped / "evaluations.jsonl"))
    outcome, _, _ = run(place, "met", *options, resume=True)
    assert outcome["stopped_early"] and outcome["best"] == whole["best"]
    same_run(stopped, directory)


def test_an_evaluation_behind_a_save_is_made_once(place, monkeypatch):
    """Without a best checkpoint a step is saved before it is evaluated."""
    data = f"data.eval_file={place / 'data/train.jsonl'}"
    options = ("training.max_steps=2", "training.eval_steps=2", "evaluation.accuracy=false", data)
    _, directory, _ = run(place, "once", *options)
    whole = (directory / "evaluations.jsonl").read_text()
    shutil.copytree(directory, place / "killed in it")
    (place / "killed in it/evaluations.jsonl").write_text("")
    run(place, "killed in it", *options, resume=True)
    same_run(place / "killed in it", directory)
    monkeypatch.setattr(loop, "evaluated", None)  # and a line that is there is taken
    outcome, _, _ = run(place, "once", *options, resume=True)
    assert (directory / "evaluations.jsonl").read_text() == whole
    assert {"step": 2, **outcome["evaluation"]} == json.loads(whole)


def test_an_automatic_resume_begins_or_goes_on(place):
    outcome, directory, text = run(place, "auto", "training.max_steps=2", resume="auto")
    assert outcome["steps"] == 2 and "Resuming" not in text
    outcome, _, text = run(place, "auto", "training.max_steps=2", resume="auto")
    assert outcome["steps"] == 2 and "from step 2" in text
    assert [row["step"] for row in lines(directory / "metrics.jsonl")] == [1, 2]


def test_resume_after_the_last_step_writes_the_result_again(place, straight):
    _, directory, _ = straight
    before = (directory / "adapter/adapter_model.safetensors").read_bytes()
    outcome, _, _ = run(place, "straight", "data.max_shapes=2", resume=True)
    assert outcome["steps"] == 4
    assert (directory / "adapter/adapter_model.safetensors").read_bytes() == before


def test_the_config_object_is_read_at_the_door_alone(place, monkeypatch):
    """Behind RunSpec.of nothing reads a ConfigDict, nor makes one."""
    spec = make_config(place / "base", place / "data/train.jsonl", place / "door")
    given, convert = get_config(), RunSpec.of
    with given.unlocked():
        given.update(spec.having({"training.max_steps": 1}).to_dict())

    def spent(self, *names):
        raise AssertionError(f"a ConfigDict is read for {names} inside of a run")

    def at_the_door(config):
        made = convert(config)
        for name in ("__getattr__", "__getitem__", "items", "keys", "__init__"):
            monkeypatch.setattr(ConfigDict, name, spent)
        return made

    monkeypatch.setattr(RunSpec, "of", at_the_door)
    assert loop.train(given, console=Console(quiet=True))["steps"] == 1
    with pytest.raises(AssertionError, match="inside of a run"):
        _ = given.training


def test_resume_refuses_what_would_change_the_run(place, straight):
    del straight
    with pytest.raises(UserError, match="data.train_file"):
        make_data(place / "other", count=10)
        run(place, "straight", "data.max_shapes=2", resume=True, data="other/train.jsonl")
    with pytest.raises(UserError, match=r"'lora\.rank' was 2 .* and is 4 now"):
        run(place, "straight", "data.max_shapes=2", "lora.r=4", resume=True)
    with pytest.raises(UserError, match=r"training\.seed"):
        run(place, "straight", "data.max_shapes=2", "training.seed=1", resume=True)
    make_base(place / "other_base", seed=1)
    with pytest.raises(UserError, match=r"base\.model\.safetensors"):
        run(place, "straight", "data.max_shapes=2", resume=True, base="other_base")


def test_one_compilation_a_shape(place, monkeypatch):
    compiled = []
    compile_step = loop.compile_largest_step

    def counting(run, *rest):
        def traced(*arguments):
            compiled.append(arguments[2].shape)  # runs once a trace
            return run(*arguments)

        steps = compile_step(traced, *rest)
        largest = tuple(max(shape[i] for shape in steps.known) for i in range(3))
        assert compiled == [largest]  # the others when they come up
        return steps

    monkeypatch.setattr(loop, "compile_largest_step", counting)
    outcome, _, _ = run(place, "compiled", "data.max_shapes=2")
    shapes = {(2, *shape) for shape in outcome["data"]["shapes"]}
    assert len(shapes) == 2 and len(compiled) == 2 and set(compiled) == shapes


def test_a_run_that_is_there_is_not_overwritten(place, straight):
    with pytest.raises(UserError, match="already holds a run"):
        run(place, "straight")
    with pytest.raises(UserError, match="no run to resume"):
        run(place, "nowhere", resume=True)
    assert not (place / "nowhere").exists()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(place, monkeypatch):
    compile_step = loop.compile_largest_step

    def breaking(*arguments):
        steps = compile_step(*arguments)
        step = steps.jitted

        def broken(state, frozen, batch):
            third = int(state.step) == 2
            state, metrics = step(state, frozen, batch)
            return state, {**metrics, "loss": metrics["loss"] * (np.nan if third else 1.0)}

        steps.jitted = broken
        return steps

    monkeypatch.setattr(loop, "compile_largest_step", breaking)
    with pytest.raises(
        UserError, match=r"Step 3 gave loss nan.*r\d+, r\d+.*checkpoints/2'"
    ) as info:
        run(place, "nan")
    assert "learning_rate" in str(info.value)
    assert sorted(p.name for p in (place / "nan/checkpoints").iterdir()) == ["2"]
    assert not (place / "nan/adapter").exists()


def test_what_fails_before_the_first_checkpoint_leaves_only_what_was_there(place, monkeypatch):
    def fail(self, *_):
        raise UserError("It broke.")

    monkeypatch.setattr(loop.Watch, "push", fail)
    directory = place / "early"
    (directory / "tensorboard").mkdir(parents=True)
    (directory / "tensorboard/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"It broke\. Nothing had been saved yet.*same command"):
        run(place, "early")
    assert [path.name for path in directory.rglob("*")] == ["tensorboard", "notes.txt"]
    monkeypatch.undo()
    outcome, _, _ = run(place, "early", "training.max_steps=1")
    assert outcome["steps"] == 1 and (directory / "tensorboard/notes.txt").read_text() == "mine"


def test_what_fails_later_keeps_its_checkpoints_and_resumes(place):
    make_data(place / "cut")
    whole = (place / "cut/10.png").read_bytes()
    (place / "cut/10.png").write_bytes(whole[: len(whole) // 2])
    order = ("data.shuffle=false", "training.max_steps=6")
    with pytest.raises(
        UserError, match=r"10\.png.*record 10.*on_bad_example=skip.*checkpoints/4'.*add --resume"
    ):
        run(place, "cut_run", *order, data="cut/train.jsonl")
    assert sorted(path.name for path in (place / "cut_run/checkpoints").iterdir()) == ["2", "4"]
    assert not (place / "cut_run/adapter").exists()
    shutil.copytree(place / "cut_run", place / "left_out")
    (place / "cut/10.png").write_bytes(whole)
    outcome, _, text = run(place, "cut_run", *order, data="cut/train.jsonl", resume=True)
    assert outcome["steps"] == 6 and "from step 4" in text
    # or goes on without the bad example, as the error says
    (place / "cut/10.png").write_bytes(whole[: len(whole) // 2])
    skip = (*order, "data.on_bad_example=skip", "data.max_bad_share=0.5")
    outcome, _, text = run(place, "left_out", *skip, data="cut/train.jsonl", resume=True)
    assert outcome["steps"] == 6 and "from step 4" in text and "Left out 1" in text
    (line,) = (place / "left_out/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["index"] == 10 and json.loads(line)["reason"] == "image"


def test_a_trained_component_without_gradient_stops_the_run():
    watching = metrics.Watch(None, lambda step: 0.0, 1, lambda step: step % 10 == 0)
    told = {"loss": 1.0, "grad_norm": 1.0, "tokens": 1.0, "grad_norm/language_model": 1.0}
    text_only = {**told, "grad_norm/projector": 0.0}
    watching.push(1, ["a"], text_only, images=False)  # no image: the projector may wait
    watching.flush()
    watching.push(2, ["b"], text_only, images=True)
    with pytest.raises(UserError, match="projector is to be trained.*zero at step 2"):
        watching.flush()


def test_rows_of_new_tokens_may_wait_for_their_token():
    paths = ["model/language_model/embed_tokens/added", "lm_head/added", "lm_head/kernel"]
    rare = metrics.added_only(paths, lambda path: "head" if "head" in path else "embeddings")
    assert rare == {"embeddings"}
    watching = metrics.Watch(None, lambda step: 0.0, 1, lambda step: step % 10 == 0, rare)
    told = {"loss": 1.0, "grad_norm": 1.0, "tokens": 1.0, "grad_norm/embeddings": 0.0}
    watching.push(1, ["a"], told, images=True)
    watching.flush()
    assert watching.unseen == {"embeddings"}
    watching.push(2, ["b"], {**told, "grad_norm/embeddings": 1.0}, images=True)
    watching.flush()
    assert watching.unseen == set()


def test_components_that_no_image_reaches_are_told_at_the_start(place, monkeypatch):
    assert metrics.idle_components(["language_model", "projector"], 64) == []
    assert metrics.idle_components(["language_model", "projector"], 0) == ["projector"]
    rows = [json.loads(line) for line in (place / "data/train.jsonl").read_text().splitlines()]
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = "What color is it?"
    (place / "data/text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Compiling(Exception):
        pass

    def stop(*_):
        raise Compiling

    monkeypatch.setattr(loop, "compile_largest_step", stop)
    with pytest.raises(UserError, match="Only the projector would train.*no image"):
        run(
            place, "idle", "lora.enabled=false", "model.language_model_lr_scale=0",
            data="data/text.jsonl",
        )  # fmt: skip
    text = io.StringIO()
    made = make_config(place / "base", place / "data/text.jsonl", place / "idle")
    with pytest.raises(Compiling):
        loop.train(made, console=Console(file=text, width=200))
    assert "Warning: the projector is to be trained" in text.getvalue()


def test_an_adapter_that_the_config_contradicts_is_refused(place, straight, monkeypatch):
    adapter = f"model.adapter={straight[1] / 'adapter'}"
    with pytest.raises(UserError, match="also adapts .*5 modules differ"):
        run(place, "other_targets", adapter, "lora.target_modules=q_proj,v_proj")
    few = run(place, "few", "lora.target_modules=q_proj,v_proj", "training.max_steps=1")[1]
    few = f"model.adapter={few / 'adapter'}"
    with pytest.raises(UserError, match="does not adapt .*5 modules differ"):
        run(place, "all_named", few, "lora.target_modules=llama")
    unnamed = make_config(place / "base", place / "data/train.jsonl", place / "x", few)
    assert build(unnamed, make_mesh(devices=jax.devices()[:1]))[0].lora.targets == (
        "q_proj", "v_proj",
    )  # fmt: skip
    made = make_config(place / "base", place / "data/train.jsonl", place / "x", adapter,
                       "lora.target_modules=llama")  # fmt: skip
    mesh = make_mesh(devices=jax.devices()[:1])
    assert build(made, mesh)[0].lora is not None  # the same layers by another name
    monkeypatch.setattr("vlm_jax.data.Encoder.tokenizer", range(600))
    with pytest.raises(UserError, match="has 600 tokens, but .* 512 rows"):
        build(made, mesh)


def test_full_training_writes_a_whole_model(place):
    _, directory, text = run(
        place, "full", "lora.enabled=false", "model.vision_encoder_lr_scale=0.1",
        "training.max_steps=1", "training.lr_scheduler_type=constant", "mesh.devices=0",
        "training.per_device_train_batch_size=1",
    )  # fmt: skip
    assert (directory / "model/model.safetensors").exists()
    assert not (directory / "adapter").exists()
    assert "8 rows a step on 8 devices" in text
    _, trained, _ = load_run(directory)
    base = flatten(vlm_jax.load(place / "base")[1])
    for path, leaf in flatten(trained).items():
        # k_proj's bias shifts all of a query's scores alike, so it has no gradient to speak of.
        assert not np.array_equal(leaf, base[path]) or path.endswith("k_proj/bias"), path


def test_two_stages_projector_alone_then_lora(place):
    _, first, _ = run(
        place, "stage1", "lora.enabled=false", "model.language_model_lr_scale=0",
        "training.max_steps=2", "training.lr_scheduler_type=constant",
    )  # fmt: skip
    config = json.loads((first / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["merger"]
    tensors = load_file(first / "adapter/adapter_model.safetensors")
    assert tensors and all("lora_" not in name for name in tensors)
    _, second, _ = run(
        place, "stage2", f"model.adapter={first / 'adapter'}", "training.max_steps=1",
        "training.warmup_ratio=0", "training.learning_rate=1e-9",
    )  # fmt: skip
    after = load_file(second / "adapter/adapter_model.safetensors")
    for name, tensor in tensors.items():  # it went on from the first stage's projector
        np.testing.assert_allclose(after[name], tensor, atol=1e-7)
    first_adapter = f"model.adapter={first / 'adapter'}"
    _, third, _ = run(
        place, "frozen projector", first_adapter, "model.projector_lr_scale=0",
        "training.max_steps=1", "training.lr_scheduler_type=constant",
    )  # fmt: skip
    after = load_file(third / "adapter/adapter_model.safetensors")
    for name, tensor in tensors.items():  # frozen now, it is in the adapter all the same
        np.testing.assert_array_equal(after[name], tensor)
    _, fourth, _ = run(
        place, "full after the projector", first_adapter, "lora.enabled=false",
        "training.max_steps=1", "training.lr_scheduler_type=constant",
    )  # fmt: skip
    assert (fourth / "model/model.safetensors").exists() and not (fourth / "adapter").exists()
    assert any("lora_A" in name for name in after)
