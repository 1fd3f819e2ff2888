"""Checkpoint files of a wrong kind: each is a paragraph that names the field or file."""

import copy
import dataclasses
import functools
import json

import numpy as np
import pytest
from checkpoint_files import gemma3_files, llava_files, qwen2_vl_files

import vlm_jax
from vlm_jax import UserError
from vlm_jax.data import Encoder
from vlm_jax.generation import end_tokens
from vlm_jax.model import Source
from vlm_jax.models import MODELS

FILES = {
    "llava": llava_files,
    "gemma3": gemma3_files,
    **{
        family: functools.partial(qwen2_vl_files, family=family)
        for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    },
}


@pytest.fixture(scope="module", params=FILES)
def directory(request, tmp_path_factory):
    return FILES[request.param](tmp_path_factory.mktemp(request.param))


def broken(config: dict, path: tuple[str, ...], value) -> dict:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    assert path[-1] in place
    place[path[-1]] = value
    return config


@pytest.mark.parametrize("value", [[], "x", 3, None])
def test_a_config_that_is_no_object(value):
    with pytest.raises(UserError, match="not a JSON object"):
        vlm_jax.from_config(value)


def test_every_field_of_a_wrong_kind_is_named(directory):
    """No field of config.json, given a value of another kind, ends in anything but `UserError`."""
    config = json.loads((directory / "config.json").read_text())
    vlm_jax.from_config(config)
    sections = [(), ("text_config",), ("vision_config",)]
    if "rope_parameters" in config["text_config"]:
        sections.append(("text_config", "rope_parameters"))
    read, named = 0, []
    for section in sections:
        fields = config
        for key in section:
            fields = fields[key]
        for name in fields:
            for value in ("many", [1], {"a": 1}, 0, -3, 1.5, None):
                try:
                    vlm_jax.from_config(broken(config, (*section, name), value))
                except UserError as error:
                    named.append((name, str(error)))
                read += 1
    assert read > 300 and len(named) > 100
    for name in ("vision_config", "text_config", "hidden_size", "num_hidden_layers", "patch_size"):
        assert any(name == field and name in said for field, said in named), name


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vision_config",), None, "vision_config = None; expected an object"),
        (("text_config",), "x", "text_config = 'x'; expected an object"),
        (("text_config", "hidden_size"), "16", "hidden_size = '16'; expected a whole number"),
        (("text_config", "num_hidden_layers"), 0, "num_hidden_layers = 0; expected at least 1"),
        (("text_config", "num_attention_heads"), True, "= True; expected a whole number"),
        (("text_config", "rms_norm_eps"), "1e-6", "rms_norm_eps = '1e-6'; expected a number"),
        (("text_config", "num_key_value_heads"), 3, "must divide"),
        (("vision_config", "num_heads"), 3, "must divide"),
        (("tie_word_embeddings",), "false", "= 'false'; expected true or false"),
        (("text_config", "rope_parameters"), [1], "rope_parameters = .*expected an object"),
        (("text_config", "rope_parameters", "rope_theta"), "big", "rope_theta = 'big', no number"),
        (("model_type",), ["qwen2_vl"], "model_type"),
    ],
)
def test_fields_of_a_wrong_kind_say_what_was_expected(tmp_path, path, value, message):
    config = json.loads((qwen2_vl_files(tmp_path) / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        vlm_jax.from_config(broken(config, path, value))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[]", "expected an object"),
        ("config.json", "{", "line 1"),
        ("config.json", b"\xff\xfe{}", "cannot be read as JSON"),
        ("model.safetensors.index.json", "{}", "not an index of safetensors"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}', "not an index of safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "not an index of safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "incomplete"),
        ("model.safetensors", "nothing", "could not be read as safetensors"),
    ],
)
def test_broken_files_are_named_when_loading(tmp_path, name, text, message):
    qwen2_vl_files(tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        vlm_jax.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer in .* cannot be loaded"),
        ("tokenizer.json", "{}", "tokenizer in .* cannot be loaded"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"}}', "cannot be loaded"),
        ("tokenizer_config.json", "[", "tokenizer_config.json' is not valid JSON: line 1"),
        ("chat_template.jinja", b"\xff\xfe", "utf-8"),
        ("preprocessor_config.json", "[1]", "a JSON list; expected an object"),
        ("preprocessor_config.json", "{", "not valid JSON: line 1"),
    ],
)
def test_broken_files_are_named_when_encoding(directory, tmp_path, name, text, message):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        Encoder(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("size", "big"), ("size", {"shortest_edge": "x"}), ("image_mean", [0.5])),
        *(("image_std", "x"), ("do_resize", "yes"), ("rescale_factor", [1]), ("resample", 99)),
    ],
)
def test_image_settings_of_a_wrong_kind(directory, tmp_path, key, value):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"image settings have {key}=.*expected"):
        Encoder(tmp_path)


def test_arrays_that_do_not_belong_together():
    """What `model.batch` says to arrays that no processor returns together."""
    import tempfile
    from pathlib import Path

    def model(name):
        with tempfile.TemporaryDirectory() as folder:
            file = FILES[name](Path(folder)) / "config.json"
            return vlm_jax.from_config(json.loads(file.read_text()))

    qwen, llava = model("qwen2_vl"), model("llava")
    ids = np.array([[1, qwen.config.image_token_id]])
    pixels, grid = np.zeros((4, qwen.config.vision.patch_values)), np.array([[1, 2, 2]])
    assert qwen.batch(ids, pixel_values=pixels, image_grid_thw=grid).patches.shape[1] == 4
    with pytest.raises(UserError, match="has pixel_values but no image_grid_thw"):
        qwen.batch(ids, pixel_values=pixels)
    with pytest.raises(UserError, match="has image_grid_thw but no pixel_values"):
        qwen.batch(ids, image_grid_thw=grid)
    with pytest.raises(UserError, match="has pixel_values_videos but no video_grid_thw"):
        qwen.batch(ids[:, :1], pixel_values_videos=pixels)
    with pytest.raises(UserError, match=r"image_grid_thw must be \[images, 3\]; it is \[3\]"):
        qwen.batch(ids, pixel_values=pixels, image_grid_thw=grid[0])
    with pytest.raises(UserError, match=r"must be \[patches, 96\]; they are \[4, 7\]"):
        qwen.batch(ids, pixel_values=pixels[:, :7], image_grid_thw=grid)
    ids = np.full((1, 4), llava.config.image_token_id)
    pixels = np.zeros((1, 3, 16, 16))
    assert llava.batch(ids, pixel_values=pixels).patches.shape[1] == 5
    with pytest.raises(UserError, match="it takes no image_grid_thw"):
        llava.batch(ids, pixel_values=pixels, image_grid_thw=grid)
    with pytest.raises(UserError, match=r"must be \[images, 3, 16, 16\]; it is \[1, 3, 8, 8\]"):
        llava.batch(ids, pixel_values=pixels[..., :8, :8])


def test_every_family_says_whether_its_images_have_grids():
    assert {name: family.HAS_GRIDS for name, family in MODELS.items()} == {
        "gemma3": False,
        "llava": False,
        "qwen2_vl": True,
        "qwen2_5_vl": True,
        "qwen3_vl": True,
    }


VISION = "vision_config"


@pytest.mark.parametrize(
    ("family", "path", "value", "message"),
    [
        ("qwen2_5_vl", (VISION, "out_hidden_size"), 8, "out_hidden_size must equal the decoder's"),
        ("qwen2_5_vl", (VISION, "window_size"), 7, "window_size = 7 pixels, less than one merged"),
        ("qwen2_5_vl", (VISION, "fullatt_block_indexes"), [1.5], "whole numbers"),
        ("qwen3_vl", (VISION, "num_position_embeddings"), 8, "num_position_embeddings = 8, which"),
        ("qwen3_vl", (VISION, "deepstack_visual_indexes"), [1, 0], "numbers of its 2 blocks"),
        ("qwen3_vl", (VISION, "deepstack_visual_indexes"), [0, 1], "which has 1 layers"),
        ("gemma3", ("mm_tokens_per_image",), 9, "to which the tower's 4 x 4 patches cannot be"),
        ("gemma3", ("text_config", "final_logit_softcapping"), 30.0, "final_logit_softcapping=30"),
        ("gemma3", ("text_config", "use_bidirectional_attention"), True, "use_bidirectional"),
        ("qwen3_vl", ("model_type",), "qwen3_vl_moe", "layers of experts, which are not supported"),
        (
            "qwen3_vl",
            ("model_type",),
            "internvl_chat",
            "is code in the checkpoint's own repository",
        ),
    ],
)
def test_what_a_newer_family_cannot_be_is_said(tmp_path, family, path, value, message):
    config = json.loads((FILES[family](tmp_path) / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        vlm_jax.from_config(broken(config, path, value))


def test_rotary_positions_that_the_reference_would_not_read_are_refused(tmp_path):
    config = json.loads((FILES["qwen3_vl"](tmp_path) / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_interleaved"] = False
    with pytest.raises(UserError, match="mrope_interleaved = False; this model computes with true"):
        vlm_jax.from_config(config)
    config["text_config"]["rope_parameters"] |= {"mrope_interleaved": True}
    config["text_config"]["rope_parameters"] |= {"partial_rotary_factor": 0.5}
    with pytest.raises(UserError, match="partial_rotary_factor, which is not supported"):
        vlm_jax.from_config(config)


def test_arrays_of_another_familys_processor_are_refused(tmp_path):
    raw = json.loads((FILES["qwen2_5_vl"](tmp_path) / "config.json").read_text())
    model, ids = vlm_jax.from_config(raw), np.array([[5, 6]])
    with pytest.raises(UserError, match="takes no 'second_per_grid_t'.*second_per_grid_ts"):
        model.batch(ids, second_per_grid_t=[1.0])
    grid = np.array([[1, 2, 2]])
    film = dict(pixel_values_videos=np.zeros((4, 96)), video_grid_thw=grid)
    with pytest.raises(UserError, match=r"second_per_grid_ts must be \[videos\], 1; it is \(2,\)"):
        model.batch(ids, **film, second_per_grid_ts=[1.0, 2.0])
    with pytest.raises(UserError, match="qwen3_vl takes no 'second_per_grid_ts'"):
        raw = json.loads((FILES["qwen3_vl"](tmp_path) / "config.json").read_text())
        vlm_jax.from_config(raw).batch(ids, second_per_grid_ts=[1.0])


def test_a_processor_that_does_not_fit_the_model(tmp_path):
    for number, (make, settings) in enumerate(
        [
            (qwen2_vl_files, {"patch_size": 14}),
            (qwen2_vl_files, {"merge_size": 1}),
            (llava_files, {"crop_size": {"height": 24, "width": 24}}),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=r"image settings of .* do not fit its config\.json"):
            Encoder(make(folder, **settings))


def test_a_template_that_breaks(tmp_path):
    encoder = Encoder(qwen2_vl_files(tmp_path, template="{{ 1 / 0 }}"))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match="record 0: The chat template .* division by zero"):
        encoder.encode({"messages": turns})


def test_a_text_with_half_a_surrogate_pair(tmp_path):
    encoder = Encoder(qwen2_vl_files(tmp_path))
    turns = [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match=r"record 0: A text holds U\+D83D"):
        encoder.encode({"messages": turns})


@pytest.mark.parametrize("text", ["[1]", "{", '{"eos_token_id": "x"}'])
def test_a_broken_generation_config(tmp_path, text):
    config = json.loads((qwen2_vl_files(tmp_path) / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text(text)
    model = vlm_jax.from_config(config, source=Source(str(tmp_path), {}, "x"))
    with pytest.raises(UserError, match="generation_config.json"):
        end_tokens(model)


def test_ends_of_a_config_are_the_outer_ones_where_they_are_given(tmp_path):
    config = json.loads((qwen2_vl_files(tmp_path) / "config.json").read_text())
    config |= {"eos_token_id": None, "pad_token_id": 3}
    config["text_config"] = {**config.get("text_config", {}), "eos_token_id": 7, "pad_token_id": 8}
    model = vlm_jax.from_config(config)
    assert end_tokens(model) == ((7,), 3)
    outer = dataclasses.replace(model, hf_config={**config, "eos_token_id": [5, 6]})
    assert end_tokens(outer) == ((5, 6), 3)
    assert end_tokens(dataclasses.replace(model, hf_config={"eos_token_id": 4})) == ((4,), 4)
    assert end_tokens(dataclasses.replace(model, hf_config={})) == ((), 0)
