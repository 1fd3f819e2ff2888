"""Checkpoints that are damaged, incomplete or of another kind are refused, naming what is wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import llava, qwen2_5_vl, qwen2_vl, qwen3_vl
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.distributed import processes
from vlm_jax.files.atomic import whole_directory, write_shards
from vlm_jax.hub.tensors import DTYPES, read_header, read_tensor
from vlm_jax.model import Model, _shapes


@pytest.fixture
def base(tmp_path):
    qwen2_vl(tmp_path / "base")
    return tmp_path / "base"


def change_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(directory, message):
    with pytest.raises(vlm_jax.UserError, match=message):
        vlm_jax.load(directory)


def test_a_tensor_that_the_index_names_in_vain(base):
    file = base / "model.safetensors"
    names = list(load_file(file))
    index = {"weight_map": dict.fromkeys(names, file.name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    vlm_jax.load(base)
    gone = next(name for name in names if name.endswith("q_proj.weight"))
    change_tensors(base, lambda tensors: tensors.pop(gone))
    refused(base, f"lacks the tensor '{gone}'")


def test_a_load_traces_the_model_once(base, monkeypatch):
    traced, init = [], Model.init
    monkeypatch.setattr(Model, "init", lambda model, key: traced.append(key) or init(model, key))
    _shapes.cache_clear()
    model, params = vlm_jax.load(base)
    model.abstract("bfloat16")["model"].clear()  # the caller's own
    shapes = model.abstract("bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    assert len(traced) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_and_blocks_of_them_are_what_safetensors_reads(tmp_path, dtype):
    file = tmp_path / "model.safetensors"
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 7, 8), np.uint8)
    tensors = {name: (bits * n).astype(DTYPES[dtype]) for n, name in enumerate("abc", 1)}
    tensors["none"], tensors["one"] = tensors["a"][:0], np.array(tensors["a"].reshape(-1)[3])
    save_file(tensors, file, metadata={"format": "pt"})
    theirs, header = load_file(file), read_header(file)
    assert header.keys() == theirs.keys() and {e.dtype for e in header.values()} == {dtype}
    for name, entry in header.items():
        read = read_tensor(entry)
        assert read.dtype == theirs[name].dtype and entry.shape == theirs[name].shape
        np.testing.assert_array_equal(read, theirs[name])
    whole = slice(0, 7)
    for block in (
        (slice(0, 3), slice(0, 5), whole, slice(0, 8)),
        (slice(1, 2), slice(0, 5), whole, slice(0, 8)),
        (slice(0, 3), slice(2, 4), whole, slice(3, 5)),
    ):
        read = read_tensor(header["b"], block)
        np.testing.assert_array_equal(read, theirs["b"][block])
        assert read.flags.c_contiguous and read.flags.writeable and type(read) is np.ndarray


def test_a_dtype_that_is_not_read(tmp_path):
    header = {"scales": {"dtype": "F8_E4M3", "shape": [2, 8], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(vlm_jax.UserError, match="model.safetensors.*the type F8_E4M3, .*F32"):
        read_tensor(read_header(file)["scales"])


def test_missing_directory_and_unreachable_repository(tmp_path):
    refused(tmp_path / "nowhere", "no checkpoint directory")
    refused("nobody/nothing", "could not be fetched")


def test_missing_left_over_and_misshaped_tensors(base):
    change_tensors(base, lambda t: t.pop("visual.blocks.1.attn.proj.bias"))
    refused(base, "Missing.*visual.blocks.1.attn.proj.bias")
    change_tensors(base, lambda t: t.update({"visual.blocks.1.attn.proj.bias": np.zeros(32)}))
    change_tensors(base, lambda t: t.update({"visual.extra.weight": np.zeros(3)}))
    refused(base, "Left over.*visual.extra.weight")
    change_tensors(base, lambda t: t.pop("visual.extra.weight"))
    change_tensors(base, lambda t: t.update({"lm_head.weight": np.zeros((7, 48))}))
    refused(base, r"lm_head.weight.*\[7, 48\].*\[200, 48\]")


def test_config_fields(base):
    change_config(base, unsloth_fixed=True, unsloth_version="2026.1")
    vlm_jax.load(base)
    change_config(base, mystery_gate=True)
    refused(base, "mystery_gate")
    config = json.loads((base / "config.json").read_text())
    del config["mystery_gate"]
    config["text_config"]["rope_parameters"]["rope_type"] = "longrope"
    (base / "config.json").write_text(json.dumps(config))
    refused(base, "longrope")
    change_config(base, model_type="qwen2_vlm")
    refused(base, "qwen2_vlm.*did you mean 'qwen2_vl'")
    (base / "config.json").write_text("{,")
    refused(base, "not valid JSON")


def test_pickles_are_refused_with_the_command_that_converts_them(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    refused(base, "pickle.*save_pretrained")


def test_damaged_file(base):
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(base, "damaged or incomplete")


def test_shards_round_trip(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    out = tmp_path / "sharded"
    with whole_directory(out) as folder:
        sizes = {name: array.nbytes for name, array in tensors.items()}
        write_shards(folder, sizes, tensors.__getitem__, shard_bytes=40_000)
        (folder / "config.json").write_text((base / "config.json").read_text())
    assert len(list(out.glob("*.safetensors"))) > 2
    _, one = vlm_jax.load(base)
    model, many = vlm_jax.load(out)
    vlm_jax.save_pretrained(model, many, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()
    import jax

    jax.tree.map(np.testing.assert_array_equal, one, many)
    next(iter(sorted(out.glob("*.safetensors")))).unlink()
    refused(out, "not there")


def test_a_failed_export_leaves_nothing(base, tmp_path, monkeypatch):
    model, params = vlm_jax.load(base)
    broken = {name: value for name, value in params.items() if name != "lm_head"}
    with pytest.raises(vlm_jax.UserError, match="lack.*lm_head"):
        vlm_jax.save_pretrained(model, broken, tmp_path / "out")
    monkeypatch.setattr("vlm_jax.hub.save.write_json", lambda *_: 1 / 0)  # after the weights
    with pytest.raises(ZeroDivisionError):
        vlm_jax.save_pretrained(model, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_flat_config_of_the_hub_loads_like_the_nested_one(base):
    nested = json.loads((base / "config.json").read_text())
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    flat = {**text, **nested, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    model, _ = vlm_jax.load(base)
    assert vlm_jax.from_config(flat).config == model.config
    # transformers 4.52 and later wrote the decoder's fields at the top and nested.
    both = json.loads((base / "config.json").read_text())
    both |= {k: v for k, v in both["text_config"].items() if k not in both}
    assert vlm_jax.from_config(both).config == model.config
    with pytest.raises(vlm_jax.UserError, match="hidden_size.*twice"):
        vlm_jax.from_config({**both, "hidden_size": 7})


def test_copies_in_a_config_may_differ_where_nothing_reads_them(base):
    """transformers 4.53 nulls an unused window in text_config and leaves it at the top."""
    raw = json.loads((base / "config.json").read_text())
    model = vlm_jax.from_config(raw)
    text = raw["text_config"]
    assert text["sliding_window"] is None and not text["use_sliding_window"]
    top = {"sliding_window": 32768, "use_sliding_window": False, "vocab_size": 200}
    assert vlm_jax.from_config({**raw, **top}).config == model.config
    rope = {**text["rope_parameters"], "type": "mrope"}  # spelt otherwise, the same angles
    assert vlm_jax.from_config({**raw, **top, "rope_parameters": rope}).config == model.config
    rope["rope_theta"] = 5.0
    with pytest.raises(vlm_jax.UserError, match="'rope_parameters'.*twice"):
        vlm_jax.from_config({**raw, **top, "rope_parameters": rope})
    text.pop("layer_types")
    assert vlm_jax.from_config({**raw, **top}).config == model.config
    used = dict(use_sliding_window=True, max_window_layers=1)  # now the window would count
    with pytest.raises(vlm_jax.UserError, match="'sliding_window'.*'use_sliding_window'.*twice"):
        vlm_jax.from_config({**raw, "max_window_layers": 1, **top, **used})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "to 8 bits by 'bitsandbytes'.*in 16 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "to 8 bits by 'bitsandbytes'"),
        ({"load_in_8bit": True}, "quantized by 'None'"),
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'.*in 16 bits"),
        ({"quant_method": "awq"}, "quantized by 'awq'"),
        ("gptq", "quantized by 'None'"),
    ],
)
def test_weights_quantized_otherwise_are_refused_by_name(base, settings, message):
    change_config(base, quantization_config=settings)
    refused(base, message)


def test_a_tied_config_with_a_head_of_its_own_is_refused(tmp_path):
    qwen2_vl(tmp_path, text=dict(tie_word_embeddings=True), tie_word_embeddings=True)
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    model, params = vlm_jax.load(tmp_path)  # a mere copy is fine, and is written again
    vlm_jax.save_pretrained(model, params, tmp_path / "out")
    assert (load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"] == head).all()
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": head + 1}))
    refused(tmp_path, "tie_word_embeddings")


def test_saving_over_shards_replaces_them(base):
    tensors = load_file(base / "model.safetensors")
    with whole_directory(base) as folder:
        sizes = {name: array.nbytes for name, array in tensors.items()}
        write_shards(folder, sizes, tensors.__getitem__, shard_bytes=40_000)
    assert not (base / "model.safetensors").exists()
    model, params = vlm_jax.load(base)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"] + 1
    vlm_jax.save_pretrained(model, params, base)
    assert [path.name for path in base.glob("*.safetensors*")] == ["model.safetensors"]
    _, again = vlm_jax.load(base)
    np.testing.assert_array_equal(again["lm_head"]["kernel"], params["lm_head"]["kernel"])


def test_integer_buffers_of_old_files_are_kept(tmp_path):
    llava(tmp_path, "clip", "llama")
    ids = np.arange(5, dtype=np.int64)[None]
    name = "vision_tower.vision_model.embeddings.position_ids"
    change_tensors(tmp_path, lambda t: t.update({name: ids}))
    model, params = vlm_jax.load(tmp_path)
    vlm_jax.save_pretrained(model, params, tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")[name], ids)


@pytest.mark.parametrize("make", [qwen2_5_vl, qwen3_vl])
def test_every_tensor_keeps_its_own_dtype_and_what_nothing_reads_its_bits(tmp_path, make):
    base = tmp_path / "base"
    make(base)
    unread = {
        "model.language_model.rotary_emb.inv_freq": np.float32([1, 1 / 3]),
        "model.visual.rotary_pos_emb.inv_freq": np.float16([1, 1 / 3]),
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": np.float64([1, 1 / 3]),
    }
    if make is qwen2_5_vl:  # published in the older layout
        unread = {
            name.replace("model.visual.", "visual.").replace("language_model.", ""): value
            for name, value in unread.items()
        }

    def mix(tensors):
        for name, value in tensors.items():
            if ".mlp." in name or "_proj.weight" in name:  # of the tower, of the decoder
                tensors[name] = value.astype(jnp.bfloat16)
        tensors.update(unread)

    change_tensors(base, mix)
    before = load_file(base / "model.safetensors")
    kinds = {str(value.dtype) for value in before.values()}
    assert kinds == {"float16", "float32", "float64", "bfloat16"}
    model, params = vlm_jax.load(base)
    vlm_jax.save_pretrained(model, params, tmp_path / "out")
    lora = vlm_jax.LoRA(2, 4, targets=("q_proj",))
    vlm_jax.save_pretrained(
        *vlm_jax.add_lora(model, params, lora, jax.random.key(0)), tmp_path / "merged"
    )
    for directory in ("out", "merged"):  # B is zero
        after = load_file(tmp_path / directory / "model.safetensors")
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert after[name].dtype == value.dtype, name
            np.testing.assert_array_equal(after[name], value, err_msg=name)
    for name in ("model.visual.extra.inv_freqs", "model.language_model.mystery.weight"):
        change_tensors(base, lambda t, name=name: t.update({name: np.zeros(3, np.float16)}))
        refused(base, f"Left over.*{name}")
        change_tensors(base, lambda t, name=name: t.pop(name))


def test_image_settings_go_where_readers_look_first(base, tmp_path):
    (base / "processor_config.json").write_text('{"image_processor": {"min_pixels": 1}, "a": 2}')
    model, params = vlm_jax.load(base)
    vlm_jax.save_pretrained(model, params, tmp_path / "out", processor={"min_pixels": 7})
    written = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert written == {"image_processor": {"min_pixels": 7}, "a": 2}


def test_tokens_beyond_the_vocabulary_are_refused(base):
    model, _ = vlm_jax.load(base)
    assert hash(model) and model == model
    with pytest.raises(vlm_jax.UserError, match="200 tokens"):
        model.batch([[1, 2, 200]])


def test_an_export_gathers_one_weight_at_a_time_and_other_processes_the_same(
    base, tmp_path, monkeypatch
):
    model, params = vlm_jax.load(base)
    model, params = vlm_jax.add_lora(model, params, vlm_jax.LoRA(2, 4), jax.random.key(0))
    calls: list[tuple[int, ...]] = []

    def to_host(tree, here=True):
        calls.append(tree.shape)
        return np.asarray(tree) if here else None

    monkeypatch.setattr(processes, "to_host", to_host)
    vlm_jax.save_pretrained(model, params, tmp_path / "merged")
    layers = model.config.text.num_layers
    assert all(len(shape) < 3 or shape[0] != layers for shape in calls[2:]), calls
    first, calls = calls, []
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    vlm_jax.save_pretrained(model, params, tmp_path / "other")
    assert calls == first and not (tmp_path / "other").exists()
