"""Model files that are broken, or made to stop a machine: exit 2, naming the file, within seconds.

Each goes through the command, as a user gives it.
"""

import json
import os
import shutil
import time

import jax
import numpy as np
import pytest
import yaml
from checkpoint_files import llava_files
from runs import make_config
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax import UserError, config
from vlm_jax.cli import main

SECONDS = 8  # of this process and its children; each takes a fraction of one alone


@pytest.fixture
def refused(capsys, place):
    """Return a function that runs `vlm-jax generate` on files that it must refuse."""

    def run(model, adapter=None):
        more = () if adapter is None else ("--adapter", str(adapter))
        ask = "--image", str(place / "data/0.png"), "--prompt", "What color is it?"
        start = sum(os.times()[:4])
        assert main(["generate", "--model", str(model), *more, *ask]) == 2
        assert sum(os.times()[:4]) - start < SECONDS
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said
        return said

    return run


@pytest.fixture
def base(place, tmp_path):
    return shutil.copytree(place / "base", tmp_path / "base")


@pytest.fixture
def adapter(place, tmp_path):
    """The directory of a LoRA of rank 2 on q_proj, on the base of `place`."""
    model, params = vlm_jax.load(place / "base")
    lora = vlm_jax.LoRA(rank=2, targets=("q_proj",))
    model, params = vlm_jax.add_lora(model, params, lora, key=jax.random.key(0))
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(file, *path_and_value):
    """Set a value in a JSON file, whose keys lead to it."""
    tree = json.loads(file.read_text()) if file.exists() else {}
    *path, key, value = path_and_value
    place = tree
    for name in path:
        place = place[name]
    place[key] = value
    file.write_text(json.dumps(tree))


def change_tensor(file, end, value):
    """Set the last value of the tensor whose name has this end; return the name."""
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(end))
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return name


ABSURD = [
    (("text_config", "num_hidden_layers", 10**12), "num_hidden_layers = 1,000,000,000,000"),
    (("text_config", "num_hidden_layers", 900), "asks for 900 layers (text_config.num_hidden"),
    (("vision_config", "depth", 10**9), "vision_config has depth = 1,000,000,000"),
    (("vision_config", "depth", 900), "the layers 0 to 0 of 'model.visual.blocks'"),
    (("text_config", "vocab_size", 10**12), "vocab_size = 1,000,000,000,000"),
    (("text_config", "vocab_size", 10**9), "[512, 16]; config.json asks for [1000000000, 16]"),
    (("text_config", "intermediate_size", 200_000), "(text_config.intermediate_size = 200000)"),
    (("vision_config", "patch_size", 10**6), "patch_size = 1,000,000"),
    (("vision_config", "in_channels", 10**6), "in_channels = 1,000,000"),
    (("vision_config", "mlp_ratio", 1e300), "mlp_ratio = 1e+300"),
    (("text_config", "rms_norm_eps", float("nan")), "text_config.rms_norm_eps = nan"),
    (("text_config", "rms_norm_eps", -1e-6), "rms_norm_eps = -1e-06; expected more than 0"),
    (("text_config", "rope_parameters", "rope_theta", float("inf")), "rope_theta = inf"),
    (("text_config", "rope_parameters", "rope_theta", 0), "rope_theta = 0.0; expected more"),
    (("text_config", "head_dim", 7), "must be even"),
]


@pytest.mark.parametrize(("setting", "message"), ABSURD, ids=[str(row[0]) for row in ABSURD])
def test_absurd_sizes_and_numbers_in_config_json(refused, base, setting, message):
    change(base / "config.json", *setting)
    said = refused(base)
    assert message in said and "config.json" in said


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "model.safetensors.index.json", "generation_config.json"),
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        *("tokenizer_config.json", "chat_template.json"),
    ],
)
def test_files_of_brackets(refused, base, name):
    if name == "chat_template.json":
        (base / "chat_template.jinja").unlink()  # which comes before it
    (base / name).write_text("[" * 100_000)
    assert name in refused(base)


def test_files_of_gigabytes(refused, base):
    with open(base / "config.json", "wb") as file:
        file.truncate(10**11)  # takes no room on the disk
    assert "config.json' has 100,000,000,000 bytes" in refused(base)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "end",
    [
        *("embed_tokens.weight", "q_proj.weight", "q_proj.bias", "input_layernorm.weight"),
        *("patch_embed.proj.weight", "merger.ln_q.bias"),
    ],
)
def test_weights_that_are_not_finite(refused, base, end, value):
    name = change_tensor(base / "model.safetensors", end, value)
    said = refused(base)
    assert f"'{name}' in '{base / 'model.safetensors'}' holds 1 of" in said


def test_weights_beyond_the_dtype_are_no_fault_of_the_file(base):
    change_tensor(base / "model.safetensors", "q_proj.weight", 1e5)
    with pytest.raises(UserError, match="values that float16 cannot hold: .* bfloat16 or float32"):
        vlm_jax.load(base, "float16")
    vlm_jax.load(base, "bfloat16")


def test_scales_of_4_bit_weights_that_are_not_finite(refused, place, tmp_path):
    model, params = vlm_jax.load(place / "base", quantize="nf4")
    vlm_jax.save_pretrained(model, params, tmp_path / "four")
    name = change_tensor(tmp_path / "four/model.safetensors", "q_proj.weight.absmax", np.nan)
    assert f"'{name}' holds NaN or infinity" in refused(tmp_path / "four")


ADAPTERS = [
    ("r", 10**12, "rank 1000000000000, by r and rank_pattern in adapter_config.json"),
    ("r", float("nan"), "adapter_config.json' has r = nan"),
    ("lora_alpha", float("nan"), "lora_alpha = nan"),
    ("lora_alpha", 1e300, "lora_alpha=1e+300; expected a number of 0 to 1e+09"),
    ("alpha_pattern", {"q_proj": float("inf")}, "alpha_pattern.q_proj = inf"),
    ("rank_pattern", {"q_proj": 10**12}, "rank 1000000000000, by r and rank_pattern"),
    ("rank_pattern", {"((a|b|.)+)+\\.q!": 4}, "key of rank_pattern in adapter_config.json '((a|b"),
]


@pytest.mark.parametrize(("key", "value", "message"), ADAPTERS)
def test_adapters_that_ask_for_too_much(refused, place, adapter, key, value, message):
    change(adapter / "adapter_config.json", key, value)
    assert message in refused(place / "base", adapter)


def test_adapters_that_are_not_finite(refused, place, adapter):
    file = adapter / "adapter_model.safetensors"
    name = change_tensor(file, "lora_B.weight", np.nan)
    assert f"'{name}' in '{file}' holds 1 of" in refused(place / "base", adapter)


def test_bottleneck_adapters_that_are_not_finite(place, tmp_path):
    model, params = vlm_jax.load(place / "base")
    adapter, key = vlm_jax.Adapter("pfeiffer", reduction_factor=4), jax.random.key(0)
    vlm_jax.save_adapter(*vlm_jax.add_adapter(model, params, adapter, key=key), tmp_path)
    change_tensor(tmp_path / "adapter.safetensors", "adapter_up.weight", np.inf)
    with pytest.raises(UserError, match="adapter_up.weight' in .* holds 1 of"):
        vlm_jax.load_adapter(model, params, tmp_path)


def test_lora_on_a_convolution_is_named(refused, place, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    module = "base_model.model.model.visual.patch_embed.proj"
    tensors[f"{module}.lora_A.weight"] = np.zeros((2, 3, 2, 4, 4), np.float32)
    tensors[f"{module}.lora_B.weight"] = np.zeros((16, 2, 1, 1, 1), np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    said = refused(place / "base", adapter)
    assert "LoRA on 'model.visual.patch_embed.proj', which is a convolution" in said
    assert "Merge it with peft" in said and "another base" not in said


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "base/../../outside.safetensors"]
)
def test_an_index_names_files_of_its_own_directory(refused, base, name):
    weights = base / "model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(weights), name)}
    weights.rename(base.parent / "outside.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(base)
    assert f"index.json' names the file '{name}', which is not in its own directory" in said


def test_links_as_in_the_hub_s_cache_are_read(base, tmp_path):
    (tmp_path / "blobs").mkdir()
    weights = base / "model.safetensors"
    weights.rename(tmp_path / "blobs/abc")
    weights.symlink_to("../blobs/abc")
    vlm_jax.load(base)


def test_one_tensor_in_two_files(refused, base):
    shutil.copy(base / "model.safetensors", base / "other.safetensors")
    assert "Both" in (said := refused(base)) and "other.safetensors' hold the tensor" in said


IMAGES = [
    ({"min_pixels": 10**12, "max_pixels": 10**13}, "min_pixels=1000000000000; expected a whole"),
    (
        {"min_pixels": 10**8, "max_pixels": 10**9},
        "at least 100,000,000 pixels, by the image settings",
    ),
    ({"patch_size": 10**6}, "patch_size=1000000; expected a whole number of 1 to 256"),
    ({"temporal_patch_size": 10**6}, "temporal_patch_size=1000000"),
    ({"image_std": [0.5, 0, 0.5]}, "image_std=[0.5, 0, 0.5]; expected three numbers that are not"),
    ({"rescale_factor": float("nan")}, "rescale_factor = nan"),
]


@pytest.mark.parametrize(("settings", "message"), IMAGES)
def test_images_of_absurd_sizes(refused, base, settings, message):
    file = base / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    said = refused(base)
    assert message in said and "preprocessor_config.json" in said


def test_videos_of_absurd_sizes(refused, base):
    settings = json.loads((base / "preprocessor_config.json").read_text())
    settings |= {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 10**12}
    (base / "video_preprocessor_config.json").write_text(json.dumps(settings))
    assert "video settings has max_frames = 1,000,000,000,000" in refused(base)


@pytest.mark.parametrize(
    "settings", [{"size": {"shortest_edge": 10**6}}, {"crop_size": {"height": 10**6, "width": 9}}]
)
def test_images_of_one_absurd_size(refused, tmp_path, settings):
    folder = llava_files(tmp_path, **settings)
    model = vlm_jax.from_config(json.loads((folder / "config.json").read_text()))
    vlm_jax.save_pretrained(model, jax.jit(model.init)(jax.random.key(0)), folder)
    assert "a side may have 4,096 pixels at most" in refused(folder)


def test_a_tokenizer_names_files_of_its_own_directory_and_runs_no_code(refused, base):
    file = base / "tokenizer_config.json"
    change(file, "auto_map", {"AutoTokenizer": ["evil.Tokenizer", None]})
    (base / "evil.py").write_text("raise SystemExit('code was run')")
    vlm_jax.data.Encoder(base)  # and nobody is asked
    change(file, "fast_tokenizer_files", ["../../tokenizer.json"])
    assert "fast_tokenizer_files = ['../../tokenizer.json']" in refused(base)


def test_the_first_step_without_an_update_blames_no_learning_rate(capsys, place, tmp_path):
    """Weights that are finite, and whose products are not in float32."""
    base = shutil.copytree(place / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if name.endswith(("embed_tokens.weight", "layernorm.weight")):
            tensors[name] = np.full_like(tensors[name], 3e38)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    made = make_config(base, place / "data/train.jsonl", tmp_path / "out")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict(made)))
    assert main(["train", "--config", str(recipe)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "Step 1 gave loss nan" in said and "no learning rate is at fault" in said


BOMBS = {
    "aliases.yaml": "a: &a {x: 1}\nb: &b {k: *a, l: *a}\nc: {k: *b, l: *b}\n",
    "itself.yaml": "data: &d {train_file: *d}",
    "deep.yaml": "a: " + "[" * 10_000,
    "deep.json": "[" * 100_000,
    "large.yaml": "a: [" + "1, " * 200_000 + "1]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_configs_that_stop_a_machine(capsys, tmp_path, name):
    file = tmp_path / name
    file.write_text(BOMBS[name])
    start = time.process_time()
    assert main(["preview", "--config", str(file)]) == 2
    assert time.process_time() - start < SECONDS
    said = capsys.readouterr().err
    assert str(file) in said and ("is not a config" in said or "a config has at most" in said)


def test_a_target_of_one_s_own_that_never_ends(capsys, place, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    made = make_config(place / "base", place / "data/train.jsonl", tmp_path / "out")
    recipe.write_text(yaml.safe_dump(config.to_dict(made)))
    endless = "--config.lora.exclude_modules=((a|b|.)+)+!"
    assert main(["train", "--config", str(recipe), endless]) == 2
    assert "value of lora.exclude_modules '((a|b|.)+)+!' takes more" in capsys.readouterr().err
