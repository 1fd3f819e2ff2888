"""A tiny checkpoint with weights, a few drawn records, and a config that trains on them."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import yaml
from checkpoint_files import qwen2_vl_files
from PIL import Image
from rich.console import Console

import vlm_jax
from vlm_jax import config
from vlm_jax.train.loop import train

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def make_base(directory: Path, seed: int = 0, layers: int = 1, width: int = 16) -> Path:
    """Write a tiny random Qwen2-VL of so many layers, weights included. width: of the decoder."""
    directory.mkdir(parents=True)
    qwen2_vl_files(directory)
    file = directory / "config.json"
    settings = json.loads(file.read_text())
    kinds = ["full_attention"] * layers
    settings["text_config"] |= {"num_hidden_layers": layers, "layer_types": kinds}
    if width != 16:
        rope = {"rope_type": "default", "rope_theta": 1e4}
        rope["mrope_section"] = [width // 16, width // 16, width // 8]
        settings["text_config"] |= {"hidden_size": width, "rope_parameters": rope}
        settings["text_config"] |= {"intermediate_size": 2 * width, "num_key_value_heads": 2}
        settings["vision_config"]["hidden_size"] = width
    file.write_text(json.dumps(settings))
    model = vlm_jax.from_config(json.loads((directory / "config.json").read_text()))
    params = jax.jit(model.init)(jax.random.key(seed))
    # At this width the default scale leaves gradients of 1e-6: make each layer count.
    params = jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, params)
    vlm_jax.save_pretrained(model, params, directory)
    return directory


def make_data(directory: Path, count: int = 12) -> Path:
    """Write `count` records: is the image red or blue? Sizes differ, so that shapes do."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        color = list(COLORS)[number % 2]
        side = (16, 24, 40)[number % 3]
        pixels = np.full((side, side, 3), COLORS[color], np.uint8)
        pixels = pixels + rng.integers(0, 20, pixels.shape, np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
        rows.append(
            {
                "id": f"r{number}",
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat color is it?"},
                    {"from": "gpt", "value": color},
                ],
            }
        )
    path = directory / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(base: Path, data: Path, output: Path, *overrides: str):
    """Return a config of 4 steps of 2 rows on one device, in float32."""
    return config.load(
        None,
        [
            f"model.name_or_path={base}",
            f"data.train_file={data}",
            f"training.output_dir={output}",
            "training.per_device_train_batch_size=2",
            "training.max_steps=4",
            "training.learning_rate=1e-2",
            "training.logging_steps=1",
            "training.save_steps=2",
            "training.bf16=false",
            "training.gradient_checkpointing=false",
            "training.report_to=none",
            "data.max_shapes=1",
            "lora.r=2",
            "mesh.devices=1",
            *overrides,
        ],
    )


def write_recipe(directory: Path, base: Path, data: Path, *overrides: str) -> Path:
    """Write the YAML file of such a config whose run lies in `directory / "out"`."""
    made = make_config(base, data, directory / "out", *overrides)
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(made)))
    return path


def run(place, name, *overrides, resume=False, data="data/train.jsonl", base="base"):
    """Train in `place / name`; return (outcome, run directory, printed text)."""
    text = io.StringIO()
    made = make_config(place / base, place / data, place / name, *overrides)
    outcome = train(made, resume, Console(file=text, width=200))
    return outcome, place / name, text.getvalue()


def lines(path: Path) -> list[dict]:
    """Return the objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


TIMES = {"tokens_per_second", "data_wait", "seconds"}


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs wrote the same numbers and result, to the byte but for times."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        ours, theirs = (
            [{k: v for k, v in row.items() if k not in TIMES} for row in lines(path / name)]
            for path in (one, other)
        )
        assert ours == theirs, name
    for name in ("best.json", "adapter/adapter_model.safetensors"):
        assert (one / name).exists() == (other / name).exists(), name
        if (one / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
