"""Quantizing while loading, 4-bit checkpoints that are damaged, meshes, merging, gradients."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from draws import shaken
from references import our_logits, quiet, qwen2_vl, qwen2_vl_inputs, tensors, wide
from safetensors.numpy import load_file, save_file
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration

import vlm_jax
from vlm_jax.adapters.lora import requantization_error
from vlm_jax.names import layer_names
from vlm_jax.quantization import Quantization, abstract, storages, summary
from vlm_jax.sharding import make_mesh, shard_params
from vlm_jax.trees import flatten, unflatten
from vlm_jax.weights import FP4, NF4, FourBit, dense
from vlm_jax.weights.quantize import quantize

LAYERS = "model/language_model/layers"
QUERY, DOWN = f"{LAYERS}/self_attn/q_proj/kernel", f"{LAYERS}/mlp/down_proj/kernel"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Blocks run over the ends of most columns; down_proj's do not."""
    place = tmp_path_factory.mktemp("narrow")
    qwen2_vl(place, factor=3.0)
    return place


@pytest.fixture(scope="module")
def wide_directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("wide")
    wide("qwen2_vl", place, factor=3.0)
    return place


@pytest.fixture(scope="module")
def quantized(directory):
    return vlm_jax.load(directory, quantize="nf4-dq")


def kinds(params):
    """Return {path: storage} of the leaves in 4 bits."""
    return {
        path: leaf.NAME + ("-dq" if leaf.double else "")
        for path, leaf in flatten(params).items()
        if isinstance(leaf, FourBit)
    }


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4-dq"])
def test_a_name_quantizes_the_language_model(directory, name):
    model, plain = vlm_jax.load(directory)
    again, params = vlm_jax.load(directory, quantize=name)
    found, flat = kinds(params), flatten(plain)
    assert set(found.values()) == {name} and len(found) == 7
    assert all(path.startswith(LAYERS) and path.endswith("/kernel") for path in found)
    for path, leaf in flatten(params).items():
        if path in found:
            expected = quantize(NF4 if name[:3] == "nf4" else FP4, flat[path], 64, leaf.double)
            jax.tree.map(np.testing.assert_array_equal, leaf, expected)
        else:
            np.testing.assert_array_equal(leaf, flat[path])
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    planned = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract(model, name))
    assert shapes == planned
    assert again.config == model.config


def test_tables_components_and_skipped_modules(directory):
    table = [(r"model/visual/blocks/.*/kernel", "nf4"), (r".*/down_proj/kernel", "fp4-dq")]
    found = kinds(vlm_jax.load(directory, quantize=table)[1])
    assert {path.split("/")[-2]: kind for path, kind in found.items()} == {
        **dict.fromkeys(("qkv", "proj", "fc1", "fc2"), "nf4"),
        "down_proj": "fp4-dq",
    }
    model, _ = vlm_jax.load(directory)

    def chosen(*arguments):
        table = storages(model, Quantization(*arguments))
        return {path for path, storage in table.items() if storage is not None}

    everything = ("language_model", "vision", "projector", "head")
    all_kernels = {path for path in table_paths(model) if "patch_embed" not in path}
    assert chosen("nf4", everything) == all_kernels
    assert chosen("nf4", everything, ("lm_head", "visual", "q_proj")) == {
        path for path in all_kernels if path.startswith(LAYERS) and "q_proj" not in path
    }
    tower = {path for path in all_kernels if "visual/blocks" in path}
    assert chosen("nf4", ("vision",)) == tower and len(tower) == 4, "not the projector within"
    assert chosen("nf4", ("projector",)) == {p for p in all_kernels if "merger" in p}
    for name in ("mlp", "model.language_model.layers.mlp", "language_model.layers.mlp"):
        assert chosen("nf4", ("language_model",), (name,)) == {
            path for path in all_kernels if f"{LAYERS}/self_attn" in path
        }
    assert all(s is None for s in storages(model, None).values())
    theirs = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["q_proj"]
    )
    expected = storages(model, Quantization("nf4", skip=("q_proj",)))
    assert storages(model, theirs) == storages(model, theirs.to_dict()) == expected
    from transformers.quantizers.quantizers_utils import should_convert_module

    for patterns in (["proj"], [".*visual.*"], [".*(q_proj|k_proj)"], ["vision_tower", "lm_head"]):
        expected = {
            path
            for path in all_kernels
            if should_convert_module(layer_names(model, path)[0], patterns)
        }
        assert chosen("nf4", everything, tuple(patterns)) == expected, patterns


def table_paths(model):
    return [path for path in flatten(model.abstract()) if path.endswith("/kernel")]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("nf5", "quantize='nf5' is not supported .did you mean 'nf4'"),
        ("int8", "Supported: nf4, nf4-dq, fp4, fp4-dq"),
        (Quantization("nf4-dp"), "did you mean 'nf4-dq'"),
        (Quantization("nf4", ("vission",)), "'vission'.*did you mean 'vision'.*Those that have"),
        (Quantization("nf4", skip=("q_prj",)), "'q_prj'.*did you mean 'q_proj'"),
        (
            Quantization("nf4", skip=("layers.0.mlp",)),
            r"layers \[0\] of.*not hold a layer's number",
        ),
        (Quantization("nf4", skip=("q_proj|k_proj",)), "no such module.*a regex from the start"),
        (Quantization("nf4", skip=("(q_proj",)), "'.q_proj' is not a regular expression"),
        (True, "quantize=True does not say how.*Give one of nf4"),
        ({"load_in_8bit": True}, "does not say load_in_4bit=True"),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "did you mean 'bnb_4bit_quant_type'"),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
            "compute_dtype bfloat16, but the model computes in float32",
        ),
        (Quantization("nf4", skip=("layers",)), "Nothing is left to quantize as nf4.*'layers'"),
        (Quantization("nf4", skip=("model",)), "Nothing is left.*'model'"),
        (Quantization("nf4", skip=("language_model",)), "Nothing is left.*add a component"),
        (Quantization("nf4", ()), r"Nothing is left.*quantize_components, \[\]"),
        ([(r".*/q_prj/kernel", "nf4")], "'.*q_prj/kernel' of the quantization table matches no"),
        ([(r".*/q_proj/kernel", "nf3")], "quantize='nf3' is not supported"),
        ([(r".*q_proj.*", "nf4")], "'.*q_proj/bias' as nf4, but only kernels"),
        ([(r".*/embedding", "nf4")], "embed_tokens/embedding' as nf4, but only kernels"),
        ([(r".*patch_embed.*", "nf4")], "patch_embed.*' as nf4, but only kernels"),
        ([(r".*(", "nf4")], "not a regular expression"),
    ],
)
def test_what_cannot_be_quantized_is_refused(directory, wanted, message):
    with pytest.raises(vlm_jax.UserError, match=message):
        vlm_jax.load(directory, quantize=wanted)


def test_inf_in_a_checkpoint_is_named(directory, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    damage(directory, tmp_path, lambda t: t[name].__setitem__((0, 3), np.inf))
    said = f"The tensor '{name}' in '.*model.safetensors' holds 1 of .* NaN or infinite"
    with pytest.raises(vlm_jax.UserError, match=said):
        vlm_jax.load(tmp_path, quantize="nf4")


def test_the_summary_says_what_is_quantized_and_why_not_the_rest(quantized, directory):
    model, params = quantized
    count = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.uint4)
    lines = summary(model, params)
    found = re.fullmatch(
        rf"quantized: 14 tensors, {count:,d} parameters, as nf4-dq, (\d\.\d+) bits each", lines[0]
    )
    assert found and 4.125 < float(found[1]) < 4.5, lines[0]
    assert {re.sub(r"\d+ tensors?", "N tensors", line) for line in lines[1:]} == {
        f"kept dense: N tensors ({reason})"
        for reason in (
            "norms, biases and convolutions, which are small",
            "embeddings, which are looked up",
            "linear layers of the vision tower, which quantize leaves dense",
            "linear layers of the projector, which quantize leaves dense",
            "linear layers of the head, which quantize leaves dense",
        )
    }
    assert "kept dense: 1 tensor (linear layers of the head, which quantize leaves dense)" in lines
    dense_tensors = sum(int(re.findall(r"\d+", line)[0]) for line in lines[1:])
    assert dense_tensors + 14 == len(load_file(directory / "model.safetensors"))
    for table in (None, [], [(".*", "dense")]):
        lines = summary(*vlm_jax.load(directory, quantize=table))
        assert lines[0] == "quantized: 0 tensors"
        assert any("linear layers of the language model" in line for line in lines[1:])


# Damaged checkpoints.


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "4bit"
    vlm_jax.save_pretrained(*quantized, place)
    return place


def damage(source, target, change):
    """Write a checkpoint's files with other tensors."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())


WEIGHT = "model.layers.0.self_attn.k_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def state_of(**fields):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE])) | fields
        state = {key: value for key, value in state.items() if value is not None}
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def replaced(suffix, function):
    return lambda t: t.update({WEIGHT + suffix: function(t[WEIGHT + suffix])})


DAMAGE = {
    "absmax of another length": (
        replaced(".absmax", lambda x: x[:-1]),
        r"absmax' holds 11 values of uint8; a weight of \[16, 48\] in blocks of 64 needs 12",
    ),
    "absmax of another type": (
        replaced(".absmax", lambda x: x.astype(np.float32)),
        "holds 12 values of float32.*needs 12 of uint8",
    ),
    "absmax missing": (lambda t: t.pop(f"{WEIGHT}.absmax"), "absmax' is missing"),
    "codes cut off": (replaced("", lambda x: x[:-2]), "holds 382 values of uint8"),
    "nested map": (replaced(".nested_quant_map", lambda x: x * 2), "is not the map of nf4"),
    "map": (replaced(".quant_map", lambda x: x[::-1].copy()), "quant_map' is not the map of nf4"),
    "no state": (lambda t: t.pop(STATE), "it has 0 tensors"),
    "state without settings": (
        lambda t: t.update({STATE: np.zeros(4, np.uint8)}),
        "holds no settings",
    ),
    "state without a shape": (state_of(shape=None), "holds no settings"),
    "unknown type": (state_of(quant_type="int4"), "its quant_type is 'int4'; known are nf4, fp4"),
    "unknown block": (state_of(blocksize=48), "its blocksize is 48; known are 32, 64"),
    "another block": (state_of(blocksize=32), "needs 24"),
    "unknown dtype": (state_of(dtype="float8"), "its dtype is 'float8'"),
    "another shape": (state_of(shape=[48, 16]), r"stands for \[48, 16\] values.*\[16, 48\]"),
    "nested block": (state_of(nested_blocksize=128), "nested_blocksize is 128, not 256"),
    "no offset": (state_of(nested_offset=None), "nested_offset is None, not a number"),
    "broken offset": (state_of(nested_offset=float("nan")), "nested_offset is nan, not a number"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_4_bit_tensors_are_refused_by_name(saved, tmp_path, what):
    change, message = DAMAGE[what]
    damage(saved, tmp_path, change)
    with pytest.raises(vlm_jax.UserError, match=f"(?s){WEIGHT}.*{message}"):
        vlm_jax.load(tmp_path)


def test_codes_stand_for_the_dtype_that_is_asked_for(quantized, tmp_path):
    vlm_jax.save_pretrained(*quantized, tmp_path / "out", dtype="bfloat16")
    leaves = flatten(vlm_jax.load(tmp_path / "out")[1]).values()
    assert {leaf.dtype for leaf in leaves if isinstance(leaf, FourBit)} == {"bfloat16"}


def test_codes_in_another_storage_are_the_same_bytes(saved, quantized, tmp_path):
    """bnb_4bit_quant_storage=bfloat16, which FSDP needs, and what a checkpoint keeps dense."""

    def store(tensors):
        for name in [n for n in tensors if f"{n}.absmax" in tensors]:
            tensors[name] = tensors[name].reshape(-1).view(jnp.bfloat16)[:, None]

    damage(saved, tmp_path, store)
    model, params = vlm_jax.load(tmp_path)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(quantized[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any("the head, which the checkpoint leaves dense" in x for x in summary(model, params))


def test_layers_that_are_stored_differently_are_refused(saved, directory, tmp_path):
    def mix(tensors):
        for name in [name for name in tensors if name.startswith(WEIGHT)]:
            del tensors[name]
        tensors[WEIGHT] = load_file(directory / "model.safetensors")[WEIGHT]

    damage(saved, tmp_path, mix)
    with pytest.raises(vlm_jax.UserError, match=r"as 4-bit and '.*layers.0.*' as dense"):
        vlm_jax.load(tmp_path)
    damage(saved, tmp_path, state_of(dtype="bfloat16"))
    with pytest.raises(vlm_jax.UserError, match="must be stored alike"):
        vlm_jax.load(tmp_path)


def test_a_4_bit_checkpoint_is_not_quantized_again(saved, tmp_path):
    with pytest.raises(vlm_jax.UserError, match="holds 4-bit weights already.*quantize='nf4'"):
        vlm_jax.load(saved, quantize="nf4")
    with pytest.raises(vlm_jax.UserError, match="quantize='nf4-dq' asks to quantize again"):
        vlm_jax.load(saved, quantize=Quantization("nf4-dq"))
    damage(saved, tmp_path, lambda tensors: None)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["quantization_config"]["quant_method"]  # as older files
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert len(kinds(vlm_jax.load(tmp_path)[1])) == 7
    del settings["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(vlm_jax.UserError, match=r"already, such as 'model\.layers"):
        vlm_jax.load(tmp_path, quantize="nf4")


# Meshes.


@pytest.mark.parametrize(
    ("which", "sizes"), [("directory", (1, 4, 2)), ("wide_directory", (2, 2, 2))]
)
def test_a_mesh_gives_the_same_logits(request, which, sizes):
    place = request.getfixturevalue(which)
    inputs = qwen2_vl_inputs("mixed")
    model, params = vlm_jax.load(place, quantize="nf4-dq")
    plain = our_logits(model, params, inputs)
    mesh = make_mesh(*sizes)
    _, placed = vlm_jax.load(place, quantize="nf4-dq", mesh=mesh)
    dropped = jax.tree.leaves(jax.device_get(placed))
    for one, other in zip(jax.tree.leaves(params), dropped, strict=True):
        np.testing.assert_array_equal(one, other)
    moved = shard_params(model, params, mesh)
    for path, leaf in flatten(placed).items():
        assert isinstance(leaf, FourBit) == (path in kinds(params))
        for one, other in zip(
            jax.tree.leaves(leaf), jax.tree.leaves(flatten(moved)[path]), strict=True
        ):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim), path
    np.testing.assert_allclose(our_logits(model, placed, inputs), plain, atol=1e-5, rtol=0)


def test_scales_lie_as_their_codes_where_they_divide(directory, wide_directory):
    mesh = make_mesh(1, 4, 2)
    narrow = flatten(vlm_jax.load(directory, quantize="nf4-dq", mesh=mesh)[1])
    broad = flatten(vlm_jax.load(wide_directory, quantize="nf4", mesh=mesh)[1])

    def specs(leaf):
        return tuple(leaf.codes.sharding.spec), tuple(leaf.absmax.sharding.spec)

    assert specs(narrow[QUERY])[0] == (None, "fsdp", "tensor")
    assert not any(specs(narrow[QUERY])[1]) and not narrow[QUERY].aligned
    # [64, 48] has one row of scales, [128, 64] has two.
    assert specs(narrow[DOWN]) == ((None, "tensor", "fsdp"), (None, None, "fsdp"))
    assert specs(broad[DOWN]) == ((None, "tensor", "fsdp"), (None, "tensor", "fsdp"))
    for leaf in (narrow[QUERY], narrow[DOWN]):
        assert leaf.nested.sharding.is_fully_replicated
        assert leaf.offset.sharding.is_fully_replicated
    assert len({str(shard.index) for shard in broad[DOWN].codes.addressable_shards}) == 8


# LoRA on a quantized base.


def adapt(model, params, dropout=0.0):
    lora = vlm_jax.LoRA(rank=3, alpha=5, targets="llama", dropout=dropout)
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    return model, shaken(params, lambda path: path.endswith("lora_B"))


def decoded(params):
    """Return the tree with dense kernels of the same values."""
    flat = flatten(params)
    return unflatten(
        {p: dense(x, "float32") if isinstance(x, FourBit) else x for p, x in flat.items()}
    )


def test_merging_makes_dense_kernels_or_quantizes_again(quantized, tmp_path):
    model, params = adapt(*quantized)
    inputs = qwen2_vl_inputs("mixed")
    logits = our_logits(model, params, inputs)
    assert np.abs(logits - our_logits(*quantized, inputs)).max() > 0.1
    merged = vlm_jax.merge(model, params)
    assert not kinds(merged) and len(kinds(params)) == 7
    np.testing.assert_allclose(our_logits(model, merged, inputs), logits, atol=1e-4, rtol=0)

    again = vlm_jax.merge(model, params, requantize=True)
    assert kinds(again) == kinds(params)
    for path in kinds(again):
        exact = quantize(NF4, flatten(merged)[path], 64, True)
        jax.tree.map(np.testing.assert_array_equal, flatten(again)[path], exact)
    of_weights, of_updates = requantization_error(model, params)
    exact = np.concatenate([np.ravel(flatten(merged)[path]) for path in kinds(again)])
    rounded = np.concatenate([np.ravel(flatten(decoded(again))[path]) for path in kinds(again)])
    start = np.concatenate([np.ravel(flatten(decoded(params))[path]) for path in kinds(again)])
    error = np.linalg.norm(rounded - exact)
    assert of_weights == pytest.approx(error / np.linalg.norm(exact), rel=1e-3)
    assert of_updates == pytest.approx(error / np.linalg.norm(exact - start), rel=1e-3)
    assert 0.05 < of_weights < 0.15 and of_updates > of_weights

    vlm_jax.save_pretrained(model, params, tmp_path / "merged", merge=True)
    with quiet():
        loaded, info = Qwen2VLForConditionalGeneration.from_pretrained(
            tmp_path / "merged", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            theirs = loaded.eval()(**tensors(inputs)).logits.numpy()
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(theirs[real], logits[real], atol=1e-4, rtol=0)

    vlm_jax.save_pretrained(model, params, tmp_path / "again", quantized=True)
    _, read = vlm_jax.load(tmp_path / "again")
    for path in kinds(again):
        jax.tree.map(np.testing.assert_array_equal, flatten(read)[path], flatten(again)[path])
    with pytest.raises(vlm_jax.UserError, match="hold none"):
        vlm_jax.save_pretrained(model, merged, tmp_path / "none", quantized=True)


def test_kernels_quantized_again_stay_on_their_mesh(wide_directory):
    _, params = adapt(*vlm_jax.load(wide_directory, quantize="nf4-dq"))
    model, placed = adapt(*vlm_jax.load(wide_directory, quantize="nf4-dq", mesh=make_mesh(2, 2, 2)))
    again = flatten(vlm_jax.merge(model, placed, requantize=True))
    expected = flatten(vlm_jax.merge(model, params, requantize=True))
    for path in kinds(placed):
        old, new = flatten(placed)[path], again[path]
        assert new.used == old.used and new.used is not None
        for one, other in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim), path
        # The update is summed in another order: a code in a thousand may round otherwise.
        assert np.mean(np.asarray(new.codes) != np.asarray(expected[path].codes)) < 1e-3


def test_what_lora_cannot_do_with_codes_is_refused(directory):
    everything = Quantization("nf4", ("projector", "language_model"))
    model, params = vlm_jax.load(directory, quantize=everything)
    lora = vlm_jax.LoRA(rank=2, modules_to_save=("projector",))
    with pytest.raises(vlm_jax.UserError, match="merger.*in full, which is stored in 4 bits"):
        vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    with pytest.raises(vlm_jax.UserError, match="requantize=True.*no 4-bit kernel"):
        vlm_jax.merge(*adapt(*vlm_jax.load(directory)), requantize=True)


def test_matrices_of_another_shape_are_named(quantized):
    model, params = adapt(*quantized)
    for path, shape in ((QUERY, (2, 40, 3)), (DOWN, (2, 64, 4))):
        flat = flatten(params)
        base = path.removesuffix("/kernel")
        flat[f"{base}/lora_A"] = jnp.zeros(shape)
        with pytest.raises(vlm_jax.UserError, match=f"of '{base}' are .*another shape"):
            vlm_jax.merge(model, unflatten(flat))


@pytest.mark.parametrize(("remat", "dropout"), [("none", 0.3), ("block", 0.0), ("block", 0.3)])
def test_gradients_are_those_of_the_decoded_kernels(directory, quantized, remat, dropout):
    base = dataclasses.replace(quantized[0], remat=remat)
    model, params = adapt(base, quantized[1], dropout)
    rows = [(r".*/lora_[AB]", "lora"), (".*", "frozen")]
    batch = model.batch(**qwen2_vl_inputs("mixed"))

    @jax.jit
    def gradient(trainable, frozen):
        def mean(trainable):
            rngs = {"dropout": jax.random.key(3)} if dropout else None
            total, tokens = vlm_jax.loss(model, trainable, frozen, batch, rngs)
            return total / tokens

        return jax.value_and_grad(mean)(trainable)

    trainable, frozen = vlm_jax.split(params, rows)
    value, grads = gradient(trainable, frozen)
    expected, plain = gradient(trainable, decoded(frozen))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for path, leaf in flatten(grads).items():
        other = np.asarray(flatten(plain)[path])
        assert np.abs(other).max() > 1e-5, path
        np.testing.assert_allclose(leaf, other, atol=1e-5 * np.abs(other).max(), rtol=1e-5)


def test_training_4_bit_leaves_is_refused(quantized):
    model, params = quantized
    with pytest.raises(vlm_jax.UserError, match=rf"'{LAYERS}.*' is to be trained.*in 4 bits"):
        vlm_jax.training_table(model, params, lora_enabled=False)
    table = [(r".*/q_proj/kernel", "full"), (".*", "frozen")]
    trainable, _ = vlm_jax.split(params, table)
    with pytest.raises(vlm_jax.UserError, match=f"trains '{QUERY}', which is stored in 4 bits"):
        vlm_jax.optimizer(trainable, table, dict(learning_rate=1e-3))
