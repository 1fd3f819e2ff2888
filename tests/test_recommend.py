"""The recommendation: the usual table, what falls to a cheaper method, and a config that trains."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import llava_files, qwen2_vl_files, write_image
from runs import make_config
from tiers import fast
from transformers import AutoTokenizer

import vlm_jax.data.statistics as survey
from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.data import Encoder
from vlm_jax.data.statistics import choose_row
from vlm_jax.hardware import DEVICES, hardware
from vlm_jax.plan.recommend import METHODS, recommend
from vlm_jax.train.adapt import adapt
from vlm_jax.train.estimate import beside_masters, estimate, nbytes
from vlm_jax.train.loop import train
from vlm_jax.train.setup import load_base
from vlm_jax.trees import split


def rows(count, image=None):
    """Return so many records of very different lengths; they are read one by one."""
    more = {} if image is None else {"image": str(image)}
    return [
        {
            "id": str(i),
            "messages": [
                {"role": "user", "content": "What color is the ball?" * (1 + i % 7)},
                {"role": "assistant", "content": "red " * (1 + i % 23)},
            ],
            **more,
        }
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Measure few records: what is under test does not hang on their number."""
    monkeypatch.setattr(survey, "SAMPLE", 60)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(qwen2_vl_files(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The tiny tokenizer beside the sizes of a 7B model: 15 GB in 16 bits, were it there."""
    directory = qwen2_vl_files(tmp_path_factory.mktemp("large"))
    made = json.loads((directory / "config.json").read_text())
    text = made["text_config"]
    text |= {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    text.pop("layer_types", None)
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    made["vision_config"]["hidden_size"] = 3584
    (directory / "config.json").write_text(json.dumps(made))
    return str(directory)


@pytest.mark.parametrize(
    ("count", "rank", "vision", "held"),
    [
        (999, 4, 0.0, 0.1),
        (1_000, 8, 0.0, 0.1),
        (9_999, 16, 0.0, 0.1),
        (10_000, 16, 0.1, 0.1),
        (50_000, 32, 0.1, 0.02),
        (100_000, None, 0.1, 0.01),
    ],
)
def test_the_table(tiny, count, rank, vision, held):
    found = recommend(rows(count), tiny)
    made = found.config
    assert made["lora"].get("r") == rank and made["lora"]["enabled"] == (rank is not None)
    assert "quantize" not in made["model"] and made["data"]["eval_share"] == held
    assert made["model"]["vision_encoder_lr_scale"] == vision
    assert dict((what, value) for what, value, _ in found.reasons)["examples"] == f"{count:,}"
    assert "mesh" not in made and found.hardware is None


def test_what_does_not_fit_falls_to_a_cheaper_method(large):
    def name(hardware_name, count=120_000):
        found = recommend(rows(count), large, hardware_name)
        return found.method.name, found

    assert name(None)[0] == "full fine-tuning"
    shared, found = name("h100:8")
    assert shared == "full fine-tuning" and found.config["mesh"]["fsdp"] == 8
    one, found = name("h100")
    assert one.startswith("LoRA r=32")
    assert any("full fine-tuning suits 120,000" in why for *_, why in found.reasons)
    assert any("an estimate" in why for *_, why in found.reasons)
    small, found = name("rtx4080")
    assert small.startswith("QLoRA r=16") and found.estimate.total <= found.hardware.usable
    few, found = name("rtx4080", 120)  # a rank above what suits so few does not come with 4 bits
    assert few.startswith("QLoRA r=4") and found.config["lora"]["r"] == 4
    copies = recommend(rows(120), large, "h100:4").config["mesh"]
    assert copies == {"devices": 4, "data": 4, "fsdp": 1}


def test_as_many_rows_at_once_as_fit(tiny, large, monkeypatch):
    loaded, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda d, **k: loaded.append(d) or load(d, **k)
    )
    training = recommend(rows(200), tiny, "rtx4080").config["training"]
    assert len(loaded) == 1
    assert training["gradient_accumulation_steps"] == 1
    assert training["per_device_train_batch_size"] >= 2
    monkeypatch.setitem(DEVICES, "l4", dataclasses.replace(DEVICES["l4"], memory=9 * 10**9))
    found = recommend(rows(120_000), large, "l4")
    training, usable = found.config["training"], found.hardware.usable
    at_once, parts = (training[f"{key}_{of}"] for key, of in (
        ("per_device_train", "batch_size"), ("gradient_accumulation", "steps")))  # fmt: skip
    assert at_once > 1 and parts > 1 and found.estimate.total <= usable
    data = found.config["data"]
    twice = config.load(None, {
        **config.flatten_config(found.config), "training.per_device_train_batch_size": 2 * at_once,
        "training.gradient_accumulation_steps": parts // 2,
    })  # fmt: skip
    assert estimate(twice, (data["max_seq_length"], 0), 2 * at_once).total > usable


def test_nothing_fits(large, tmp_path):
    huge = json.loads(Path(large, "config.json").read_text())
    huge["text_config"]["num_hidden_layers"] = 280
    directory = qwen2_vl_files(tmp_path / "huge")
    (directory / "config.json").write_text(json.dumps(huge))
    with pytest.raises(UserError, match=r"No method fits v5e.*QLoRA"):
        recommend(rows(10), str(directory), "v5e-1")


def test_methods_get_cheaper_down_the_list(large):
    found = []
    for method in METHODS:
        values = {
            "model.name_or_path": large,
            "model.vision_encoder_lr_scale": method.vision,
            "model.quantize": "nf4-dq" if method.quantize else None,
            "lora.enabled": method.rank > 0,
            "lora.r": method.rank or 1,
            "training.optim": method.optim,
        }
        found.append(estimate(config.load(None, values), (1024, 1024)).total)
    assert found == sorted(found, reverse=True) and found[0] > 5 * found[-1]


def test_the_estimate_counts_what_a_run_holds(place):
    for changes in (["lora.r=4"], ["model.quantize=nf4-dq"], ["lora.enabled=false"]):
        made = make_config(place / "base", place / "data/train.jsonl", place / "no", *changes)
        model, params = load_base(made)
        _, params, table = adapt(made, model, params, 0)
        trainable, frozen = split(params, table)
        got = estimate(made, (64, 64))
        masters = 4 * sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trainable))
        assert got.weights == nbytes(frozen)
        assert got.trained == 3 * masters  # gradients, and copies in float32 here
        assert 2 * masters <= got.moments < 2 * masters + 100
        assert got.over(2).weights == got.weights // 2 and got.over(1) == got
        text = model.config.text
        head = text.vocab_size * text.hidden_size * 4  # gathered; where it trains with gradients
        learned = changes == ["lora.enabled=false"]
        assert got.head == (3 if learned else 1) * head
        assert got.over(2).activations == got.activations + got.head + got.layer
        paged = make_config(
            place / "base", place / "data/train.jsonl", place / "no", *changes,
            "training.optim=paged_adamw",
        )  # fmt: skip
        assert estimate(paged, (64, 64)).moments == 0


def test_copies_of_masters_count_where_they_are_not_what_is_computed_with():
    for masters, size, computed, copies in (
        ("float32", 4, "float32", 4),
        ("float32", 4, "bfloat16", 2),
        ("bfloat16", 2, "float32", 4),
        ("bfloat16", 2, "bfloat16", 0),
    ):
        made = config.load(None, {"training.param_dtype": masters})
        model = types.SimpleNamespace(dtype=jnp.dtype(computed))
        assert beside_masters(made, model, 10 * size) == 10 * (4 + copies)


def test_bad_records_are_told(tiny):
    good = recommend(rows(40), tiny)
    assert good.config["data"]["on_bad_example"] == "raise"
    some = rows(38) + [{"messages": []}, {"id": "x"}]
    found = recommend(some, tiny)
    assert found.config["data"]["on_bad_example"] == "skip"
    (told,) = [(value, why) for what, value, why in found.reasons if what == "left out"]
    assert told[0].startswith("2 ") and "record 38" in told[1].lower() and "repair" in told[1]


def test_rows_follow_from_the_lengths(tiny, tmp_path):
    encoder = Encoder(tiny)
    rng = np.random.default_rng(0)
    mixed = np.stack([rng.integers(20, 900, 400), 4 * rng.integers(0, 40, 400)], 1)
    row = choose_row(encoder, mixed)
    assert row.packing and row.shape[0] == 1024 and row.saved > 0.1 and row.density > 1.5
    equal = np.tile([[1500, 64]], (50, 1))
    row = choose_row(encoder, equal)
    assert not row.packing and 1500 <= row.shape[0] < 1600 and row.longer == 0
    outlier = np.concatenate([np.tile([[500, 0]], (300, 1)), [[9000, 0]]])
    assert choose_row(encoder, outlier).longer == 1
    # Pixels: what images have, within the checkpoint's own limits.
    image = write_image(tmp_path / "i.png", 24, 30)
    found = recommend(rows(20, image), tiny, allow_absolute_paths=True, image_folder=str(tmp_path))
    assert found.config["data"]["max_pixels"] == 24 * 32
    fixed = llava_files(tmp_path / "llava")
    image = str(write_image(tmp_path / "j.png", 24, 30))
    found = recommend(rows(20, image), str(fixed), allow_absolute_paths=True)
    assert "max_pixels" not in found.config["data"]


def test_text_alone_has_no_limit_of_pixels(tiny):
    assert "max_pixels" not in recommend(rows(30), tiny).config["data"]


@pytest.mark.parametrize(
    ("name", "device", "count"),
    [
        ("h100", "h100", 1),
        ("H100:8", "h100", 8),
        ("8xH100", "h100", 8),
        ("NVIDIA RTX 4090", "rtx4090", 1),
        ("rtx4090:2", "rtx4090", 2),
        ("v5e-1", "v5e", 1),
        ("tpu-v5e-4", "v5e", 4),
        ("v5e:2x2", "v5e", 4),
        ("v4-8", "v4", 4),
        ("v5p:2x2x1", "v5p", 4),
        ("a100-40gb", "a100-40gb", 1),
        ("a100-40gb:2", "a100-40gb", 2),
    ],
)
def test_hardware_by_name(name, device, count):
    found = hardware(name)
    assert (found.device, found.count) == (device, count)
    assert found.usable < found.memory == DEVICES[device].memory


@pytest.mark.parametrize("name", ["h10", "h100:0", "", "v5e:2x", "2xh100:4", "gpu"])
def test_unknown_hardware_lists_the_known(name):
    with pytest.raises(UserError, match="Known are v4, v5e|has no device"):
        hardware(name)


@pytest.mark.parametrize("suffix", fast(["yaml"], ["yaml", "py"]))
def test_the_config_trains(place, tmp_path, capsys, suffix):
    file = tmp_path / f"r.{suffix}"
    data = str(place / "data/train.jsonl")
    arguments = ["recommend", "--data", data, "--model", str(place / "base"), "--out", str(file)]
    assert main([*arguments, "--hardware", "rtx4090"]) == 0
    said = capsys.readouterr().out
    assert (
        "LoRA r=4" in said
        and "estimate" in said
        and f"train --config {file}" in said.replace("\n", "")
    )
    made = config.load(
        file,
        [
            f"training.output_dir={tmp_path / 'out'}",
            "training.max_steps=2",
            "training.gradient_accumulation_steps=1",
            "training.dataloader_num_workers=0",
            "training.report_to=none",
            "data.max_shapes=1",
            "evaluation.accuracy=false",
            "mesh.devices=1",
        ],
    )
    assert (
        made.model.quantize is None
        and made.lora.r == 4
        and made.data.eval_share == 0.1
        and made.data.packing in (0, 1)
        and made.training.remat_policy == "auto"
    )
    outcome = train(made)
    assert outcome["steps"] == 2 and not outcome["interrupted"]
    assert main(arguments) == 2
    assert "exists. Delete it" in capsys.readouterr().err


def test_bad_input_is_one_paragraph(place, tmp_path, capsys):
    base, data = str(place / "base"), str(place / "data/train.jsonl")
    for arguments, expected in (
        (["--data", data, "--model", base, "--hardware", "h10"], "did you mean"),
        (["--data", "nowhere.json", "--model", base], "nowhere.json"),
        (["--data", data, "--model", "./nowhere"], "no checkpoint directory"),
        (["--data", data, "--model", base, "--out", str(tmp_path / "c.txt")], ".yaml or .py"),
        (["--data", "[3]", "--model", base], "--data is"),
    ):
        assert main(["recommend", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and expected in said, said
