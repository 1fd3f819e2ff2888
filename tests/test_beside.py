"""What lies beside the files that are read or written: used, written, or refused by name."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
from PIL import Image

import vlm_jax
from vlm_jax import UserError
from vlm_jax.cli import main
from vlm_jax.data import Encoder
from vlm_jax.files.atomic import whole_directory
from vlm_jax.hub.unread_weights import TRAINED


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """(model, parameters with a LoRA of rank 2, its directory)."""
    model, params = vlm_jax.load(place / "base")
    lora = vlm_jax.LoRA(rank=2, targets=("q_proj",))
    model, params = vlm_jax.add_lora(model, params, lora, key=jax.random.key(0))
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    vlm_jax.save_peft(model, params, directory)
    return model, params, directory


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained[2], tmp_path / "adapter")


@pytest.fixture
def load(place):
    return lambda adapter: vlm_jax.load_peft(*vlm_jax.load(place / "base"), adapter)


def ask(capsys, place, model, *more):
    """Return (exit code, what is said) of `vlm-jax generate`."""
    image = "--image", str(place / "data/0.png")
    code = main(["generate", "--model", str(model), *more, *image, "--prompt", "What is it?"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", [*TRAINED, "pytorch_model.bin", "model.safetensors", "more.pt"])
def test_weights_beside_an_adapter_are_refused_by_name(capsys, place, adapter, name):
    (adapter / name).write_bytes(b"weights")
    code, said = ask(capsys, place, place / "base", "--adapter", str(adapter))
    assert code == 2 and f"'{adapter}' holds '{name}' too" in said


def test_a_trainers_checkpoint_loads_without_a_word(capsys, load, adapter):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (adapter / name).write_bytes(b"state")
    for name in ("adapter_model.bin", "value_head.safetensors", "README.md", "optimizer.bin"):
        (adapter / name).write_bytes(b"more")
    (adapter / "trainer_state.json").write_text('{"log_history": [{"loss": NaN}]}')
    load(adapter)
    assert capsys.readouterr() == ("", "")


def test_the_line_that_adds_such_weights_to_an_adapter(load, adapter):
    torch = pytest.importorskip("torch")
    name = "model.visual.merger.ln_q.weight"
    torch.save(
        {f"base_model.model.{name}": torch.full((16,), 0.5)}, adapter / "non_lora_state_dict.bin"
    )
    with pytest.raises(UserError, match="2U1's trainers wrote it") as refused:
        load(adapter)
    exec(re.search(r'python -c "(.*)"', str(refused.value))[1], {})
    (adapter / "non_lora_state_dict.bin").unlink()
    model, params = load(adapter)
    np.testing.assert_array_equal(params["model"]["visual"]["merger"]["ln_q"]["scale"], 0.5)
    assert model.lora.modules_to_save == ("model.visual.merger.ln_q",)


def test_directories_that_are_mistaken_for_others(capsys, place, adapter, tmp_path):
    code, said = ask(capsys, place, adapter)
    assert code == 2 and f"'{adapter}' is an adapter, not a whole checkpoint" in said
    assert f"Give its base, '{place / 'base'}'" in said
    code, said = ask(capsys, place, place / "base", "--adapter", str(tmp_path))
    assert code == 2 and f"Give one of them, such as '{adapter}'" in said

    both = shutil.copytree(place / "base", tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    code, said = ask(capsys, place, both)
    assert code == 2 and "holds a whole checkpoint and an adapter" in said
    (both / "adapter_model.safetensors").rename(both / "mm_projector.bin")
    code, said = ask(capsys, place, both)
    assert code == 2 and "'mm_projector.bin' beside a whole checkpoint" in said


def test_an_index_and_a_file_that_it_does_not_name(place, tmp_path):
    base = shutil.copytree(place / "base", tmp_path / "base")
    header = vlm_jax.load(base)[0].source.tensors
    shutil.copy(base / "model.safetensors", base / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(header, "shard.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"holds model\.safetensors and an index of other files"):
        vlm_jax.load(base)
    (base / "model.safetensors").unlink()
    vlm_jax.load(base)


def settings(directory, **changes):
    return {**json.loads((directory / "preprocessor_config.json").read_text()), **changes}


def tokens(model):
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    messages = [{"role": "user", "content": [image, text]}]
    return model.encode(messages, images=[Image.new("RGB", (64, 64))]).tokens[0]


def test_an_adapters_settings_come_before_the_bases(capsys, load, place, adapter):
    """Its images are as large as those that it was trained on, its chat is written as then."""
    plain = tokens(load(adapter)[0])
    small = settings(place / "base", min_pixels=64, max_pixels=256)
    (adapter / "preprocessor_config.json").write_text(json.dumps(small))
    fewer = tokens(load(adapter)[0])
    assert len(plain) - len(fewer) == 6 * 6 - 2 * 2  # features of 8 x 8 pixels: 48 x 48, 16 x 16

    template = (place / "base/chat_template.jinja").read_text()
    (adapter / "chat_template.jinja").write_text(template + "more")
    assert len(tokens(load(adapter)[0])) > len(fewer)
    shutil.copy(place / "base/tokenizer_config.json", adapter)  # settings alone are no tokenizer
    assert len(tokens(load(adapter)[0])) > len(fewer)
    shutil.copy(place / "base/tokenizer.json", adapter)
    assert len(tokens(load(adapter)[0])) > len(fewer)
    (adapter / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|endoftext|>"))
    model = load(adapter)[0]
    assert model.turn_end == Encoder(place / "base", adapter=adapter).chat.turn_end != plain[-2]
    (adapter / "tokenizer.json").write_text("{")
    code, said = ask(capsys, place, place / "base", "--adapter", str(adapter))
    assert code == 2 and f"The tokenizer in '{adapter}' cannot be loaded" in said


def test_a_run_that_goes_on_from_an_adapter_hands_its_words_on(place, adapter, tmp_path):
    template = (place / "base/chat_template.jinja").read_text() + "{# another #}"
    (adapter / "chat_template.jinja").write_text(template)
    (adapter / "tokenizer_config.json").write_text("{}")
    _, directory, _ = runs.run(place, tmp_path / "run", f"model.adapter={adapter}")
    assert (directory / "adapter/chat_template.jinja").read_text() == template
    assert not (directory / "adapter/tokenizer_config.json").exists()


def test_sizes_are_kept_apart_for_other_settings_of_an_adapter(place, adapter):
    one = Encoder(place / "base", adapter=adapter).settings
    assert one != Encoder(place / "base").settings
    moved = shutil.copytree(adapter, adapter.parent / "moved")
    assert one == Encoder(place / "base", adapter=moved).settings
    (moved / "preprocessor_config.json").write_text(json.dumps(settings(place / "base")))
    assert one != Encoder(place / "base", adapter=moved).settings


def test_an_export_holds_all_that_its_reader_needs(place, adapter, tmp_path):
    base = shutil.copytree(place / "base", tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tools.jinja").write_text("tools")
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    (base / "trainer_state.json").write_text("{}")
    (base / "processor_config.json").write_text(
        json.dumps({"image_processor": settings(base), "processor_class": "Qwen2VLProcessor"})
    )
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= {"dtype": "float32", "quantization_config": {"quant_method": "bnb"}}
    (base / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    small = settings(base, min_pixels=64, max_pixels=256)
    video = {**small, "video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}
    (adapter / "preprocessor_config.json").write_text(json.dumps(small))
    (adapter / "video_preprocessor_config.json").write_text(json.dumps(video))
    (adapter / "chat_template.jinja").write_text("{# as trained #}")
    model, params = vlm_jax.load_peft(*vlm_jax.load(base), adapter)
    vlm_jax.save_pretrained(model, params, out := tmp_path / "out", dtype="bfloat16")

    def read(name):
        return json.loads((out / name).read_text())

    assert (out / "additional_chat_templates").is_dir() is False  # the adapter's stands for all
    assert (out / "chat_template.jinja").read_text() == "{# as trained #}"
    assert read("generation_config.json") == {"temperature": 0.5}
    assert read("processor_config.json")["image_processor"]["max_pixels"] == 256
    assert read("video_preprocessor_config.json")["fps"] == 3
    assert not (out / "trainer_state.json").exists() and (out / "tokenizer.json").exists()
    text = read("config.json")["text_config"]
    assert "quantization_config" not in text
    assert read("config.json")["dtype"] == text["dtype"] == "bfloat16"

    vlm_jax.save_pretrained(*vlm_jax.load(base), out := tmp_path / "plain")
    assert (out / "additional_chat_templates/tools.jinja").read_text() == "tools"


def test_a_run_s_video_settings_are_in_its_merged_export(place, straight, tmp_path):
    assert main(["export", "--run", str(straight[1]), "--merge", "--out", str(tmp_path / "m")]) == 0
    name = "video_preprocessor_config.json"
    theirs = json.loads((straight[1] / "adapter" / name).read_text())
    assert json.loads((tmp_path / "m" / name).read_text()) == theirs


KILLED = """
import os, sys
from vlm_jax.files.atomic import whole_directory
with whole_directory(sys.argv[1]) as folder:
    (folder / "half").write_text("x")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    target = tmp_path / "out"
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writer.stdout.readline() == "writing\n"
    (own,) = tmp_path.iterdir()
    with whole_directory(target) as folder:
        (folder / "a").write_text("a")
    assert own.is_dir()  # a living process writes to it

    others = [".out.original", ".other.x.part", "out.x.part"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "..out.x.part.y.part").mkdir()  # of a writer inside a writer
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    with whole_directory(target) as folder:
        held = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(held)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}
    assert {path.name for path in target.iterdir()} == {"a"}
