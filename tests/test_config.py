"""Configs: defaults, files, coercion, and every wrong key or value refused by name."""

import dataclasses
import inspect
import itertools
import json
import re
from pathlib import Path

import pytest

from vlm_jax import UserError, config
from vlm_jax.config import choices, specs

ROOT = Path(__file__).parents[1]

# The YAML of the usual VLM recipe, as people have it.
YAML = """
model:
  name_or_path: Qwen/Qwen2-VL-7B-Instruct
  vision_encoder_lr_scale: 0.0
  projector_lr_scale: 1.0
lora:
  enabled: true
  r: 64
  alpha: 128
  target_modules: [q_proj, k_proj, v_proj, o_proj]
  dropout: 0.05
  bias: none
training:
  num_train_epochs: 3
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 8
  learning_rate: 2e-4
  weight_decay: 0
  warmup_ratio: 0.03
  lr_scheduler_type: cosine
  logging_steps: 10
  save_steps: 500
  eval_steps: 500
  save_total_limit: 3
  bf16: true
  gradient_checkpointing: true
  dataloader_num_workers: 4
  report_to: tensorboard
data:
  train_file: data/train.json
  eval_file: data/eval.json
  max_seq_length: 2048
  image_resolution: 336
"""


def write(path, text):
    path.write_text(text)
    return path


def test_the_usual_yaml_runs_as_it_is(tmp_path):
    c = config.load(write(tmp_path / "recipe.yaml", YAML))
    assert c.training.learning_rate == 2e-4  # a string to the YAML parser
    assert c.training.num_train_epochs == 3.0 and isinstance(c.training.num_train_epochs, float)
    assert c.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert c.training.report_to == ("tensorboard",)
    assert c.lora.bias == "none"
    assert c.data.image_resolution == 336
    assert c.model.vision_encoder_lr_scale == 0.0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_shipped_configs_load(path):
    c = config.load(path)
    assert c.model.name_or_path and c.data.train_file
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.model.type = "llava"


def test_a_config_survives_json(tmp_path):
    c = config.load(None, ["lora.target_modules=all-linear", "data.max_pixels=1e6"])
    path = write(tmp_path / "config.json", json.dumps(config.to_dict(c)))
    assert config.load(path) == c
    assert c.data.max_pixels == 1_000_000


def test_python_files_take_an_argument_and_overrides_win(tmp_path):
    path = write(
        tmp_path / "my.py",
        "from vlm_jax import config\n"
        "def get_config(rank='8'):\n"
        "    c = config.get_config()\n"
        "    c.lora.r = int(rank)\n"
        "    c.training.seed = 7\n"
        "    return c\n",
    )
    assert config.load(path).lora.r == 8
    c = config.load(f"{path}:4", {"training.seed": "9"})
    assert (c.lora.r, c.training.seed) == (4, 9)
    assert not list(tmp_path.glob("__pycache__"))


def test_names_that_others_use_are_known():
    c = config.load(None, ["model.model_name_or_path=x", "lora.lora_alpha=8", "training.lr=1e-3"])
    assert (c.model.name_or_path, c.lora.alpha, c.training.learning_rate) == ("x", 8.0, 1e-3)
    with pytest.raises(UserError, match="one key: model.name_or_path"):
        config.load(None, ["model.name=x", "model.name_or_path=y"])
    known = config.flatten_config(config.get_config())
    assert set(choices.ALIASES.values()) <= known.keys()
    assert not choices.ALIASES.keys() & known.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "did you mean 'training.learning_rate'"),
        ("trainin.learning_rate=1", "did you mean 'training.learning_rate'"),
        ("training.learning_rate=fast", "'fast'.*expected float.*0.0002"),
        ("training.max_steps=1.5", "expected int"),
        ("training.max_steps=null", "expected int"),
        ("training.bf16=maybe", "expected true or false"),
        ("training.lr_scheduler_type=cosin", "did you mean 'cosine'"),
        ("training.fp16=true", "float16 needs loss scaling"),
        ("training.report_to=tensorbord", "did you mean 'tensorboard'"),
        ("training.optim=ademamix", "not supported.*adamw"),
        ("training.gradient_accumulation_steps=0", "between 1 and"),
        ("lora.bias=some", "Supported: none"),
        ("lora.dropout=1.0", "between 0 and 0.999"),
        ("data.on_bad_example=ignore", "raise, skip"),
        ("training.seed", "has no value"),
    ],
)
def test_what_is_wrong_is_named(override, message):
    with pytest.raises(UserError, match=message):
        config.load(None, [override])


def test_pixel_limits_that_contradict_are_refused():
    with pytest.raises(UserError, match="above data.max_pixels"):
        config.load(None, ["data.min_pixels=100", "data.max_pixels=50"])
    with pytest.raises(UserError, match="sets data.min_pixels"):
        config.load(None, ["data.image_resolution=224", "data.max_pixels=50"])


def test_values_of_training_arguments_are_taken(tmp_path):
    text = "training: {dataloader_num_workers: 0, save_total_limit: null}"
    c = config.load(write(tmp_path / "a.yaml", text))
    assert (c.training.dataloader_num_workers, c.training.save_total_limit) == (0, 0)
    assert config.load(None, ["training.save_total_limit=None"]).training.save_total_limit == 0
    python = (
        "from vlm_jax import config\n"
        "def get_config():\n"
        "    c = config.get_config()\n"
        "    c.training.save_total_limit = None\n"
        "    return c\n"
    )
    assert config.load(write(tmp_path / "a.py", python)).training.save_total_limit == 0


def test_bad_files_are_named(tmp_path):
    for name, text, message in (
        ("a.yaml", "model: [", "not valid YAML"),
        ("b.yaml", "- 1", "no sections"),
        ("c.yaml", "training: 3", "is a section"),
        ("d.yaml", "training: {learning_rat: 3}", "d.yaml.*did you mean"),
        ("e.py", "x = 1", "no function get_config"),
        ("f.py", "def get_config(:", "SyntaxError"),
        (
            "g.py",
            "from vlm_jax import config\n"
            "def get_config():\n    c = config.get_config()\n    c.lora.rr = 1\n",
            'g.py.*"rr"',
        ),
        ("h.txt", "", "must end in"),
    ):
        with pytest.raises(UserError, match=message):
            config.load(write(tmp_path / name, text))
    with pytest.raises(UserError, match="no config file"):
        config.load(tmp_path / "none.yaml")


def test_every_key_has_a_comment():
    lines = inspect.getsource(specs).splitlines()
    described = set()
    for above, line in itertools.pairwise(lines):
        found = re.match(r"    (\w+): .* = ", line)
        if found and ("  # " in line or above.strip().startswith("#")):
            described.add(found[1])
    names = {key.split(".")[-1] for key in config.key_types()}
    assert names <= described


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", [], ("steps", 500, 0.03, 0)),
        ("eval_strategy: steps, logging_steps: 50", [], ("steps", 50, 0.03, 0)),
        ("eval_steps: 70", ["training.eval_strategy=steps"], ("steps", 70, 0.03, 0)),
        ("eval_strategy: epoch", [], ("epoch", 10, 0.03, 0)),
        ("warmup_steps: 0", [], ("steps", 500, 0.0, 0)),
        ("warmup_steps: 0, warmup_ratio: 0.1", [], ("steps", 500, 0.1, 0)),
        ("warmup_ratio: 0.1", ["training.warmup_steps=0"], ("steps", 500, 0.0, 0)),
        ("warmup_steps: 7", ["training.eval_strategy=none"], ("no", 10, 0.0, 7)),
    ],
)
def test_defaults_that_other_keys_decide(tmp_path, text, overrides, expected):
    t = config.load(write(tmp_path / "a.yaml", f"training: {{{text}}}"), overrides).training
    assert (t.eval_strategy, t.eval_steps, t.warmup_ratio, t.warmup_steps) == expected
    whole = config.to_dict(config.load(tmp_path / "a.yaml", overrides))
    again = config.load(write(tmp_path / "b.json", json.dumps(whole)))
    assert config.to_dict(again) == whole


def test_another_method_takes_the_place_of_the_files(tmp_path):
    path = write(tmp_path / "a.yaml", "method: loftq\nlora: {r: 4}")
    c = config.load(path)
    assert (c.model.quantize, c.lora.init_lora_weights) == ("nf4", "loftq")
    c = config.load(path, ["method=pissa"])
    assert (c.model.quantize, c.lora.init_lora_weights, c.lora.r) == (None, "pissa", 4)
    path = write(tmp_path / "b.yaml", "model: {quantize: nf4-dq}")  # not of a method: it stays
    assert config.load(path, ["method=dora"]).model.quantize == "nf4-dq"
