"""The YAML that guides print for Qwen2-VL: it trains as it is, and is planned at its size."""

import pytest
from runs import lines
from test_metrics import wandb

from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.config import choices

RECIPE = """
model:
  name: "Qwen/Qwen2-VL-7B-Instruct"
  vision_encoder_lr_scale: 0.0
  projector_lr_scale: 1.0

lora:
  enabled: true
  r: 64
  alpha: 128
  target_modules:
    - "q_proj"
    - "k_proj"
    - "v_proj"
    - "o_proj"
    - "gate_proj"
    - "up_proj"
    - "down_proj"
  dropout: 0.05
  bias: "none"

training:
  output_dir: "./outputs"
  num_train_epochs: 3
  per_device_train_batch_size: 2
  per_device_eval_batch_size: 2
  gradient_accumulation_steps: 8
  learning_rate: 2e-4
  weight_decay: 0.01
  warmup_ratio: 0.03
  lr_scheduler_type: "cosine"
  logging_steps: 10
  save_steps: 500
  eval_steps: 500
  bf16: true
  gradient_checkpointing: true
  dataloader_num_workers: 4

data:
  train_file: "train.json"
  eval_file: "eval.json"
  max_seq_length: 2048
  image_resolution: "dynamic"
"""
# What the script around it passes on to TrainingArguments and LoraConfig.
SCRIPT = ("evaluation_strategy=steps", "save_total_limit=3", "report_to=wandb")


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return str(file)


def test_the_recipe_trains_as_it_is(place, tmp_path, recipe, monkeypatch):
    told, fake = [], wandb(monkeypatch)
    fake.init = lambda **options: told.append(options["config"]["lora"]["r"])
    fake.log = lambda values, step: told.append(step)
    fake.finish = lambda: None
    monkeypatch.chdir(tmp_path)
    data = place / "data/train.jsonl"
    code = main([
        "train", "--config", recipe, f"--config.model.name_or_path={place / 'base'}",
        f"--config.data.train_file={data}", f"--config.data.eval_file={data}",
        "--config.training.max_steps=2", "--config.evaluation.max_examples=2",
        "--config.evaluation.max_new_tokens=2", "--config.mesh.devices=1",
        "--config.training.dataloader_num_workers=0",
        *(f"--config.training.{key}" for key in SCRIPT), "--config.lora.bias=none",
    ])  # fmt: skip
    assert code == 0 and (tmp_path / "outputs/adapter/adapter_config.json").exists()
    assert lines(tmp_path / "outputs/evaluations.jsonl")[-1]["step"] == 2
    assert told == [64, 2]


def test_the_recipe_is_planned_at_its_size(recipe):
    """An image may fill a row: 2,048 tokens stand for 8,192 patches."""
    from vlm_jax.plan.report import plan_step

    report = plan_step(config.load(recipe), "rtx4090")
    assert (report.tokens, report.patches, report.rows) == (2048, 8192, 16)


@pytest.mark.nightly
def test_the_recipe_compiles_at_its_size(recipe, capsys):
    assert main(["plan", "--config", recipe, "--topology", "v5p-8", "--json"]) in (0, 1)
    assert '"compiled"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.image_resolution", "dynamic", 0),
        ("data.image_resolution", "Dynamic", 0),
        ("data.image_resolution", "null", 0),
        ("data.image_resolution", "'448'", 448),
        ("training.learning_rate", "1e-5", 1e-5),  # text to the YAML parser
        ("training.save_strategy", "no", "no"),  # false to it
        ("training.eval_strategy", "no", "no"),
        ("training.evaluation_strategy", "none", "no"),
        ("training.logging_strategy", "off", "no"),
        ("training.report_to", "no", ("none",)),
        ("training.report_to", "null", ()),
        ("training.max_grad_norm", "null", 0.0),
        ("training.warmup_ratio", "null", 0.0),
        ("training.bf16", "'off'", False),
        ("lora.bias", "null", "none"),
        ("lora.bias", "None", "none"),
        ("model.torch_dtype", "null", "auto"),
    ],
)
def test_spellings_of_yaml(tmp_path, key, text, value):
    section, name = key.split(".")
    file = tmp_path / "one.yaml"
    file.write_text(f"{section}: {{{name}: {text}}}\n")
    key = choices.ALIASES.get(key, key)
    assert config.flatten_config(config.load(file))[key] == value


@pytest.mark.parametrize("text", ["high", "[448, 448]", "448.5", "true", "-1"])
def test_a_resolution_that_is_none_is_refused(tmp_path, text):
    file = tmp_path / "one.yaml"
    file.write_text(f"data: {{image_resolution: {text}}}\n")
    with pytest.raises(UserError, match="a square in pixels, or dynamic|between 0 and"):
        config.load(file)
