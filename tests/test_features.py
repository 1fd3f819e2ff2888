"""Each row of README's table of features once through the command, several of them in a run.

What each computes is tested elsewhere, below the command; here is what lies between: the words of a
command line and of a config file, a run's files, and the commands that read them.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import yaml
from checkpoint_files import gemma3_files, llava_files, qwen2_vl_files
from runs import lines
from safetensors.numpy import load_file
from test_video import write_video

import vlm_jax
from vlm_jax.cli import main
from vlm_jax.train import results as exporting

PACKED = {
    "method": "dora",
    "lora": {"r": 2, "rank_pattern": {"q_proj": 4}, "use_rslora": True, "loraplus_lr_ratio": 4},
    "training": {"optim": "paged_adamw_8bit", "remat_policy": "dots", "neftune_noise_alpha": 5},
    "data": {"packing": True, "max_seq_length": 96},
}
FULL = {
    "method": "full",
    "model": {"freeze_layers": 0, "vision_encoder_lr_scale": 0.1, "vision_layer_decay": 0.5},
    "training": {"optim": "muon", "load_best_model_at_end": True, "early_stopping_patience": 3},
    "data": {"eval_share": 0.2},
    "evaluation": {"accuracy": False},
}
BOTTLENECK = {"method": "pfeiffer", "training": {"optim": "lion", "ema_decay": 0.9}}


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """Return what writes a config of two steps, and gives the words that train it."""
    directory = tmp_path_factory.mktemp("features")

    def make(name, base, data, changes):
        steps = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
        turns = {"eval_steps": 1, "save_steps": 1, "logging_steps": 1}
        tree = {
            "model": {"name_or_path": str(base)},
            "training": {"output_dir": str(directory / name), "bf16": False, **steps, **turns},
            "data": {"train_file": data, "max_shapes": 1},
            "mesh": {"devices": 1},
        }
        for section, values in changes.items():
            keys = isinstance(values, dict)
            tree[section] = {**tree.get(section, {}), **values} if keys else values
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return directory / name, ["train", "--config", str(directory / f"{name}.yaml")]

    return make


def test_ranks_rates_pages_and_packing(place, made, tmp_path, capsys):
    """On question-answer pairs in a parquet file; the path's brackets are no markup."""
    from datasets import Dataset

    pairs = [{"question": "What color?", "answer": "red"}] * 12
    images = [{"bytes": (place / f"data/{i}.png").read_bytes(), "path": None} for i in range(12)]
    rows = [{**pair, "image": image} for pair, image in zip(pairs, images, strict=True)]
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    run, words = made("[bold]", place / "base", str(tmp_path / "pairs.parquet"), PACKED)
    assert main([*words, "--report_to", "tensorboard", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "packed rows of tokens x patches: 96 x" in said and f"Wrote '{run}/adapter'." in said
    assert "layers are recomputed in the backward pass (dots); no gradient" in said  # one line
    adapter = json.loads((run / "adapter/adapter_config.json").read_text())
    assert adapter["use_dora"] and adapter["use_rslora"] and adapter["rank_pattern"]
    assert any((run / "tensorboard").iterdir())


def test_gemma3_in_packed_rows(place, made, tmp_path, capsys):
    """And what it writes loads in transformers."""
    from references import assert_loads_in_transformers

    base = tmp_path / "base"
    base.mkdir()
    model = vlm_jax.from_config(json.loads((gemma3_files(base) / "config.json").read_text()))
    vlm_jax.save_pretrained(model, jax.jit(model.init)(jax.random.key(0)), base)
    changes = {"data": {"packing": True, "max_seq_length": 128}}
    run, words = made("gemma3", base, str(place / "data/train.jsonl"), changes)
    assert main(["preview", "--text", *words[1:]]) == 0
    assert "<image_soft_token>" in capsys.readouterr().out
    assert main([*words, "--lora.r", "2"]) == 0
    names = " ".join(load_file(run / "adapter/adapter_model.safetensors"))
    assert "multi_modal_projector.mm_input_projection_weight" in names
    assert main(["export", "--run", str(run), "--merge"]) == 0
    assert_loads_in_transformers(run / "merged")
    image, question = str(place / "data/0.png"), "What color is it?"
    words = ["--model", str(run / "merged"), "--image", image, "--prompt", question]
    assert main(["generate", *words, "--max-new-tokens", "3"]) == 0


def test_llava_in_4_bits_from_captions(place, made, tmp_path, capsys, monkeypatch):
    base, folder = tmp_path / "llava", tmp_path / "captions"
    base.mkdir()
    model = vlm_jax.from_config(json.loads((llava_files(base) / "config.json").read_text()))
    vlm_jax.save_pretrained(model, jax.jit(model.init)(jax.random.key(0)), base)
    folder.mkdir()
    for i in range(4):
        shutil.copy(place / f"data/{i}.png", folder)
        (folder / f"{i}.txt").write_text("red")
    run, words = made("llava", base, str(folder), {"training": {"optim": "adafactor"}})
    assert main([*words, "--method", "qlora", "--lora.r", "2"]) == 0
    assert "quantized: 7 tensors" in capsys.readouterr().out
    # Answers take most of an export's time; test_cli.py asks for them.
    monkeypatch.setattr(exporting, "_answers", lambda *given: np.zeros((1, 1)))
    assert main(["export", "--run", str(run), "--merge", "--quantized"]) == 0
    assert "Quantizing the sums again" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_qlora_of_images_and_film_in_packed_rows(place, made, tmp_path, family):
    """And what it writes loads in transformers."""
    from references import assert_loads_in_transformers

    base = tmp_path / "base"
    base.mkdir()
    raw = json.loads((qwen2_vl_files(base, family=family) / "config.json").read_text())
    model = vlm_jax.from_config(raw)
    vlm_jax.save_pretrained(model, jax.jit(model.init)(jax.random.key(0)), base)
    write_video(tmp_path / "a.mp4", 6)
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "red"}]
    row = json.dumps({"video": "a.mp4", "messages": turns}) + "\n"
    (tmp_path / "films.jsonl").write_text(row * 4)
    sources = [{"path": str(place / "data/train.jsonl"), "weight": 1},
               {"path": str(tmp_path / "films.jsonl"), "weight": 1}]  # fmt: skip
    changes = {"data": {"packing": True, "max_seq_length": 160}, "method": "qlora"}
    run, words = made(family, base, sources, changes)
    page = tmp_path / "page.html"
    assert main(["preview", *words[1:], "--out", str(page)]) == 0
    assert ("video 2" in page.read_text()) == (family == "qwen3_vl")  # frames apart
    assert main([*words, "--lora.r", "2"]) == 0
    assert "model.visual.merger" in " ".join(load_file(run / "adapter/adapter_model.safetensors"))
    assert main(["export", "--run", str(run), "--merge"]) == 0
    assert_loads_in_transformers(run / "merged")
    image, question = str(place / "data/0.png"), "What color is it?"
    words = ["--model", str(run / "merged"), "--image", image, "--prompt", question]
    assert main(["generate", *words, "--max-new-tokens", "3"]) == 0


def test_full_training_of_a_mixture_with_video_keeps_the_best(place, made, tmp_path):
    write_video(tmp_path / "a.mp4", 4)
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "red"}]
    row = json.dumps({"video": "a.mp4", "messages": turns}) + "\n"
    (tmp_path / "films.jsonl").write_text(row * 6)
    sources = [{"path": str(place / "data/train.jsonl"), "weight": 2},
               {"path": str(tmp_path / "films.jsonl"), "weight": 1}]  # fmt: skip
    run, words = made("full", place / "base", sources, FULL)
    assert main(words) == 0 and (run / "model/model.safetensors").is_file()
    assert [row["step"] for row in lines(run / "evaluations.jsonl")] == [1, 2]
    assert json.loads((run / "best.json").read_text())["metric"] == "loss"


def test_bottlenecks_with_an_average_of_a_stream(place, made):
    run, words = made("bottleneck", place / "base", str(place / "data/train.jsonl"), BOTTLENECK)
    assert main([*words, "--streaming", "--lr_scheduler_type", "polynomial"]) == 0
    assert main(["export", "--run", str(run)]) == 0 and (run / "exported").is_dir()
