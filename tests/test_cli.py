"""The command line: quick help, one-paragraph errors with exit code 2, and a whole round trip."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import make_config
from transformers import AutoTokenizer

import vlm_jax
from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.data import Encoder, Pipeline


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
    assert "1 image" in capsys.readouterr().out
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
    with pytest.raises(SystemExit) as stop:
        main(["export", "--run", "x", "--out", "y", "--config.lora.r=3"])
    assert stop.value.code == 2
    assert "belongs to the commands train, preview" in capsys.readouterr().err


def test_run_export_evaluate_generate(capsys, tmp_path, place, straight):
    run, merged = str(straight[1]), str(tmp_path / "merged")
    assert main(["export", "--run", run, "--merge", "--out", merged]) == 0
    said = capsys.readouterr().out
    assert float(said.split("probe batch is ")[1].split()[0]) < 1e-4
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


def test_a_loaded_adapter_moves_the_logits(place, straight):
    model, params = vlm_jax.load(place / "base")
    adapted, tree = vlm_jax.load_peft(model, params, straight[1] / "adapter")
    batch = model.batch(input_ids=np.arange(12)[None])
    base = np.asarray(model.apply({"params": params}, batch))
    ours = np.asarray(adapted.apply({"params": tree}, batch))
    assert np.abs(ours - base).max() > 1e-3  # training has moved it
