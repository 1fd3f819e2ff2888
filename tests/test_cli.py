"""The command line: quick help, one-paragraph errors with exit code 2, and a whole round trip."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from runs import make_config
from transformers import AutoTokenizer

import vlm_jax
from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.data import Encoder, Pipeline
from vlm_jax.train import results as exporting
from vlm_jax.train.trackers import Lines


def test_help_does_not_import_jax():
    code = (
        "import sys, vlm_jax.cli\n"
        "try: vlm_jax.cli.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "slow = {'jax', 'numpy', 'transformers', 'ml_collections', 'rich'} & sys.modules.keys()\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "preview", "recommend", "export", "evaluate", "generate"):
        assert command in done.stdout


def wrong(capsys, *arguments):
    """Run a command that must fail, and return what it says."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vlm-jax {arguments[0]}: ")
    assert said.count("\n") == 1 and "Traceback" not in said  # one paragraph
    return said


def test_a_run_loads_its_tokenizer_once(tmp_path, place, monkeypatch):
    """For its vocabulary, its data, its evaluations and their accuracy; a worker loads its own."""
    loaded, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda d, **k: loaded.append(d) or load(d, **k)
    )
    data, recipe = place / "data/train.jsonl", tmp_path / "recipe.yaml"
    made = make_config(
        place / "base", data, tmp_path / "out", "training.max_steps=1", "training.save_steps=1",
        f"data.eval_file={data}", "training.eval_strategy=steps", "training.eval_steps=1",
        "evaluation.max_new_tokens=2",
    )  # fmt: skip
    recipe.write_text(yaml.safe_dump(config.to_dict(made)))
    assert main(["train", "--config", str(recipe)]) == 0
    row = json.loads((tmp_path / "out/evaluations.jsonl").read_text())
    assert "accuracy" in row and len(loaded) == 1

    encoder = Encoder(place / "base", max_seq_length=64)
    pickle.loads(pickle.dumps(Pipeline(encoder, data, rows=2, max_length=48).planner))
    assert len(loaded) == 3


def test_bad_input_is_one_paragraph_and_exit_code_2(capsys, tmp_path, place):
    recipe = tmp_path / "recipe.yaml"
    made = make_config(place / "base", place / "data/train.jsonl", tmp_path / "out")
    recipe.write_text(yaml.safe_dump(config.to_dict(made)))
    train = ("train", "--config", str(recipe))

    assert "no config file" in wrong(capsys, "train", "--config", "nowhere.yaml")
    assert "did you mean 'lora.r'" in wrong(capsys, *train, "--config.lora.rr=3")
    said = wrong(capsys, *train, "--config.model.name_or_path=./nowhere")
    assert "no checkpoint directory './nowhere'" in said
    said = wrong(capsys, *train, "--config.data.train_file=nowhere.json")
    assert "nowhere.json" in said
    said = wrong(capsys, *train, "--config.lora.target_modules=q_prok,v_proj")
    assert "q_prok" in said and "did you mean 'q_proj'" in said
    said = wrong(
        capsys, *train, "--config.lora.enabled=false", "--config.model.projector_lr_scale=0",
        "--config.model.language_model_lr_scale=0",
    )  # fmt: skip
    assert "Nothing is left to train" in said
    assert "no run to resume" in wrong(capsys, *train, "--resume")
    said = wrong(capsys, *train, "--config.model.type=llava")
    assert "is a 'qwen2_vl'" in said
    said = wrong(capsys, *train, "--config.data.max_seq_length=8")
    assert "too_long" in said
    assert "no run" in wrong(capsys, "export", "--run", str(tmp_path), "--out", "x")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "a"}\n{"id": \n')
    assert "line 2" in wrong(capsys, *train, f"--config.data.train_file={bad}")
    file = tmp_path / "file"
    file.write_text("mine")
    said = wrong(capsys, *train, f"--config.training.output_dir={file / 'below/out'}")
    assert f"'{file}' is a file" in said
    assert "is a file" in wrong(capsys, *train, f"--config.training.output_dir={file}")
    assert file.read_text() == "mine"
    assert not (tmp_path / "out").exists()  # nothing half-written


def test_bad_images_raise_with_their_record_or_are_skipped(capsys, tmp_path, place):
    rows = (place / "data/train.jsonl").read_text().splitlines()[:4]
    broken = json.loads(rows[1])
    whole = (place / "data/1.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[:40])  # its header cannot be read
    broken["image"] = str(tmp_path / "broken.png")
    broken["id"] = "[/b]\x1b[2J"
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([rows[0], json.dumps(broken), *rows[2:]]))
    made = make_config(
        place / "base", data, tmp_path / "out", f"data.image_folder={place / 'data'}",
        "data.allow_absolute_paths=true", "training.max_steps=2",
    )  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict(made)))
    said = wrong(capsys, "train", "--config", str(recipe))
    assert f"In '{data}', line 2: Image 0" in said and "record 1" in said and "broken.png" in said
    assert not (tmp_path / "out").exists()
    skip = ("--config.data.on_bad_example=skip", "--config.data.max_bad_share=0.5")
    out = f"--config.training.output_dir={tmp_path / 'skipped'}"
    assert main(["train", "--config", str(recipe), *skip, out]) == 0
    told = capsys.readouterr().out
    assert "1 image" in told and "[/b]" in told and "\x1b" not in told
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])  # found only while training
    said = wrong(capsys, "train", "--config", str(recipe))
    assert f"In '{data}', line 2: Image 0" in said and "record 1" in said and "truncated" in said
    assert "give the same command again" in said
    assert not (tmp_path / "out").exists()  # nothing half-written, nothing in the next try's way
    (tmp_path / "broken.png").write_bytes(whole)
    assert main(["train", "--config", str(recipe)]) == 0
    assert (tmp_path / "out/adapter").is_dir()


def test_predictions_that_cannot_be_written_fail_first(capsys, tmp_path):
    arguments = ("evaluate", "--model", "nowhere", "--data", "nowhere.jsonl", "--predictions")
    assert "cannot be written" in wrong(capsys, *arguments, str(tmp_path / "no/such/x"))
    assert "cannot be written" in wrong(capsys, *arguments, str(tmp_path))
    (tmp_path / "data.jsonl").write_text('{"id": "a", "question": "q", "answer": "a"}')
    assert "not a file of this kind" in wrong(capsys, *arguments, str(tmp_path / "data.jsonl"))


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("evaluate", "--batch-size", value) for value in ("-1", "0", "1.5", "many")),
        *(("evaluate", "--max-new-tokens", value) for value in ("-1", "0")),
        *(("evaluate", "--max-examples", "-1"), ("generate", "--max-new-tokens", "0")),
        *(("generate", "--temperature", "nan"), ("generate", "--temperature", "-1")),
        *(
            ("generate", "--top-p", "2"),
            ("generate", "--top-k", "-1"),
            ("generate", "--seed", "-1"),
        ),
    ],
)
def test_numbers_out_of_range_are_refused(capsys, command, option, value):
    rest = {"evaluate": ["--data", "x.json"], "generate": ["--prompt", "q"]}[command]
    with pytest.raises(SystemExit) as stop:
        main([command, "--model", "nowhere", *rest, option, value])
    assert stop.value.code == 2
    assert f"argument {option}: '{value}' is not a" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_says_why(capsys, tmp_path):
    def said(text):
        (tmp_path / "config.json").write_text(text)
        return wrong(capsys, "export", "--run", str(tmp_path), "--out", str(tmp_path / "out"))

    assert "not valid JSON: line 1" in said("{")
    assert "holds no sections" in said("[]")
    assert "holds no sections" in said('"x"')
    assert "Unknown config key 'model.zz'" in said('{"model": {"zz": 1}}')
    assert "is a section, not the value 3" in said('{"model": 3}')
    assert "give it by --model" in said('{"model_type": "llava"}')


def test_configs_that_are_no_config(capsys, tmp_path):
    def said(text, name="c.py"):
        (tmp_path / name).write_bytes(text.encode("latin1"))
        return wrong(capsys, "train", "--config", str(tmp_path / name))

    assert "raised ValueError: two lines" in said("raise ValueError('two\\nlines')")
    assert "raised NameError" in said("def get_config(): return nothing")
    assert "returned NoneType" in said("def get_config(): pass")
    assert "not valid YAML" in said("model: [\n a: b\n", "c.yaml")
    assert "not valid YAML" in said("\xff\xfe", "c.yaml")
    assert "not valid JSON: line 2" in said("{\n", "c.json")
    assert "'lora.target_modules' is empty" in said("lora: {target_modules: []}", "c.yaml")
    assert "'training.seed' has the value {}" in said("training: {seed: {}}", "c.yaml")
    assert "'training.output_dir' is empty" in said("training: {output_dir: ' '}", "c.yaml")
    assert "must be between" in said("training: {adam_beta2: 1}", "c.yaml")


def test_a_place_that_cannot_be_written(capsys, tmp_path, place, straight):
    file = tmp_path / "file"
    file.write_text("mine")
    export = ("export", "--run", str(straight[1]), "--out")
    assert "cannot be made" in wrong(capsys, *export, str(file / "below"))
    recipe = tmp_path / "recipe.yaml"
    made = make_config(place / "base", place / "data/train.jsonl", tmp_path / ("x" * 300))
    recipe.write_text(yaml.safe_dump(config.to_dict(made)))
    assert "cannot be a directory" in wrong(capsys, "train", "--config", str(recipe))


def test_debug_shows_the_traceback():
    with pytest.raises(UserError):
        main(["train", "--config", "nowhere.yaml", "--debug"])


def test_overrides_belong_to_train(capsys):
    said = wrong(capsys, "export", "--run", "x", "--out", "y", "--config.lora.r=3")
    assert "belongs to the commands train, preview" in said
    said = wrong(capsys, "evaluate", "--run", "x", "--data", "y", "--max_tokens", "3")
    assert "not an option of this command (did you mean '--max-new-tokens'?)" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.training.learning_rate=1e-4"], {"training.learning_rate": "1e-4"}),
        (["--training.learning_rate=1e-4"], {"training.learning_rate": "1e-4"}),
        (["--learning_rate", "1e-4"], {"training.learning_rate": "1e-4"}),
        (["--learning-rate=1e-4", "--lora.r", "8"],
         {"training.learning_rate": "1e-4", "lora.r": "8"}),
        (["--config.lora.r", "8", "--method", "qlora"], {"lora.r": "8", "method": "qlora"}),
        (["--lr", "1e-4", "--max_steps", "-1"],
         {"training.learning_rate": "1e-4", "training.max_steps": "-1"}),
        (["--group_by_length", "--lora.r=8"], {"training.group_by_length": "true", "lora.r": "8"}),
        (["--load_in_4bit", "--mesh", "auto"], {"model.load_in_4bit": "true", "mesh": "auto"}),
        (["--target_modules", "q_proj", "v_proj"], {"lora.target_modules": "q_proj,v_proj"}),
        (["--group_by_length", "true"], {"training.group_by_length": "true"}),
    ],
)  # fmt: skip
def test_keys_go_by_the_names_that_people_write(words, expected, monkeypatch):
    """In the command's own options' midst, as TrainingArguments' parser takes them."""
    seen = []
    monkeypatch.setattr(config, "load", lambda file, given: seen.append((file, given)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", *words, "--config", "a_b.yaml", "--resume"])
    assert seen == [("a_b.yaml", expected)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dropout 0.1", "write --config.adapter.dropout=0.1 or --config.lora.dropout=0.1."),
        ("--data x.jsonl", "not a key. Write --config.data.train_file=x.jsonl, or another"),
        ("--model base", "Write --config.model.name_or_path=base"),
        ("--lora.r", "'--lora.r' has no value: write --config.lora.r=VALUE."),
        ("--r 8 9", "'--r' takes one value, and 2 follow it: 8 9."),
        ("--learnin_rate 1", "'learnin_rate' in the command (did you mean 'training.learning_ra"),
        ("--resum", "There is no option '--resum' (did you mean '--resume'?)."),
        ("--cutoff_len 8", "another key here: data.max_seq_length"),
        ("herons.yaml", "'herons.yaml' belongs to no option."),
    ],
)
def test_a_word_that_may_mean_several_things_is_told_its_forms(capsys, words, said):
    assert said in wrong(capsys, "train", "--config", "c.yaml", *words.split())


def test_what_a_new_user_asks_first(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"vlm-jax {vlm_jax.__version__}\n"
    assert main([]) == 2
    assert "recommend" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "a .py file is executed" in said and "--learning_rate=1e-4" in said


def test_run_export_evaluate_generate(capsys, tmp_path, place, straight):
    run, merged = str(straight[1]), str(tmp_path / "merged")
    assert main(["export", "--run", run, "--merge", "--out", merged]) == 0
    said = capsys.readouterr().out
    assert "same answers on 8 of 8 probes; " in said and "Warning" not in said
    assert float(said.split("probes; ")[1].split()[0]) < 1e-4
    assert (
        said.split("probes; ")[1]
        .split(" (")[0]
        .endswith(" is what rounding to float32 costs of logits")
    )
    assert "not empty" in wrong(capsys, "export", "--run", run, "--out", merged)
    adapter = str(tmp_path / "adapter")
    assert main(["export", "--run", run, "--out", adapter]) == 0
    assert "read it back" in capsys.readouterr().out
    settings = (Path(adapter) / "preprocessor_config.json").read_text()
    assert settings == (straight[1] / "adapter/preprocessor_config.json").read_text()

    data = str(place / "data/train.jsonl")
    results = []
    for which in (["--run", run], ["--model", merged]):
        file = tmp_path / "predictions.jsonl"
        arguments = ["evaluate", *which, "--data", data, "--json", "--predictions", str(file)]
        assert main([*arguments, "--max-new-tokens", "3", "--max-examples", "6"]) == 0
        results.append(json.loads(capsys.readouterr().out))
        answers = [json.loads(line) for line in file.read_text().splitlines()]
        assert [a["id"] for a in answers] == [f"r{i}" for i in range(6)]
        assert answers[0]["question"] == "What color is it?" and answers[0]["answer"] == "red"
        results[-1]["answers"] = [a["prediction"] for a in answers]
    assert results[0]["answers"] == results[1]["answers"]
    assert results[0]["examples"] == 6 and results[0]["accuracy"] == results[0]["correct"] / 6

    image = str(place / "data/0.png")
    model = ["--model", str(place / "base"), "--adapter", adapter]
    ask = ["--image", image, "--prompt", "What color is it?", "--max-new-tokens", "3"]
    assert main(["generate", *model, *ask]) == 0
    assert capsys.readouterr().out.strip() == results[0]["answers"][0]
    assert main(["generate", *model, *ask, "--temperature", "2", "--top-k", "40"]) == 0
    assert capsys.readouterr().out.strip() != results[0]["answers"][0]  # drawn


def test_what_is_missing_is_told_before_weights_are_read(capsys, place, tmp_path, monkeypatch):
    monkeypatch.setattr(vlm_jax.hub.load, "read_leaf", None)  # nobody comes so far
    run, data, base = ("--run", str(tmp_path)), ("--data", "no.jsonl"), str(place / "base")
    assert "holds no run" in wrong(capsys, "export", *run)
    assert "holds no run" in wrong(capsys, "evaluate", *run, *data)
    assert "'no.jsonl'" in wrong(capsys, "evaluate", "--model", base, *data)
    ask = ("generate", "--model", base, "--prompt", "q")
    assert "no file 'no.png'" in wrong(capsys, *ask, "--image", "no.png")
    assert "no adapter directory 'no'" in wrong(capsys, *ask, "--adapter", "no")


@pytest.mark.parametrize("finished", [True, False])
def test_an_export_lies_in_the_run_and_loads_one_tokenizer(
    place, straight, tmp_path, capsys, monkeypatch, finished
):
    run = tmp_path / "run"
    shutil.copytree(straight[1], run)
    if not finished:
        shutil.rmtree(run / "adapter")
    loaded, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda d, **k: loaded.append(d) or load(d, **k)
    )
    assert main(["export", "--run", str(run)]) == 0
    assert (run / "exported/adapter_model.safetensors").is_file() and len(loaded) == 1
    assert "read it back: logits are equal" in capsys.readouterr().out


def test_an_export_that_is_not_the_run_is_told(place, straight, tmp_path, capsys, monkeypatch):
    """What is read back was changed on its way: answers differ, and no rounding explains it."""
    monkeypatch.setattr(
        exporting, "load", lambda *given, mesh: (vlm_jax.load(place / "base")[0], other)
    )
    other = jax.tree.map(lambda leaf: leaf * -1.5, vlm_jax.load(place / "base")[1])
    assert main(["export", "--run", str(straight[1]), "--merge", "--out", str(tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    assert "probes; " in said and "8 of 8" not in said and "costs" not in said
    assert "Warning: this is more than rounding to float32 explains" in said


def test_answers_that_differ_within_rounding_are_told():
    fine = exporting.Exported("out", "the base", 0.19, 3.25, "bfloat16", 8, 8)
    assert "8 of 8 probes; 0.19 is what rounding to bfloat16 costs" in str(fine)
    assert "Warning" not in str(fine)
    turned = str(dataclasses.replace(fine, same=6))
    assert "6 of 8 probes" in turned and "Warning: 2 answers differ" in turned
    wide = str(dataclasses.replace(fine, difference=2.0))
    assert "Warning: this is more than rounding" in wide and "costs" not in wide


@pytest.mark.parametrize("quiet", [False, True])
def test_advice_to_install_torch_is_silenced_and_nothing_else(quiet):
    """In a process that has no PyTorch and uses the library, not the command."""
    code = (
        "import importlib.util as u, logging; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        f"{'import vlm_jax' if quiet else ''}\n"
        "import transformers; transformers.utils.logging.get_logger('transformers').warning('More')"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "More" in done.stderr
    assert ("PyTorch was not found" in done.stderr) != quiet


def test_a_loaded_adapter_moves_the_logits(place, straight):
    model, params = vlm_jax.load(place / "base")
    adapted, tree = vlm_jax.load_peft(model, params, straight[1] / "adapter")
    batch = model.batch(input_ids=np.arange(12)[None])
    base = np.asarray(model.apply({"params": params}, batch))
    ours = np.asarray(adapted.apply({"params": tree}, batch))
    assert np.abs(ours - base).max() > 1e-3  # training has moved it


def test_lines_break_at_words_on_a_terminal(place, straight, tmp_path, monkeypatch, capsys):
    """Those of errors and of a run. That a log keeps whole lines shows test_features.py."""
    run = straight[1]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict(config.load(run / "config.json"))))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "41")
    assert main(["train", "--config", str(recipe)]) == 2  # a run is there already
    told = capsys.readouterr().err
    assert max(map(len, told.replace(str(run), "").splitlines())) <= 41
    assert told.split("'")[2].split() == ["already", "holds", "a", "run", "(config.json,",
        "metrics.jsonl,", "checkpoints,", "adapter).", "Resume", "it", "with", "--resume,",
        "choose", "another", "training.output_dir,", "or", "delete", "it."]  # fmt: skip

    console = Lines()
    console.file, console._force_terminal, console._width = io.StringIO(), True, 40
    console.print("a value of [red] " * 5, soft_wrap=True)
    text = console.file.getvalue()
    assert (
        max(map(len, text.splitlines())) <= 40 and text.split() == ["a", "value", "of", "[red]"] * 5
    )
