"""Modules that an adapter holds in full, and copies of the base's weights, to and from peft."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from draws import shaken
from peft import LoraConfig, PeftModel, get_peft_model
from references import llava, llava_inputs, our_logits, quiet, qwen2_vl, qwen2_vl_inputs
from safetensors.numpy import load_file, save_file
from test_peft import assert_equal_logits
from transformers import LlavaForConditionalGeneration, Qwen2VLForConditionalGeneration

import vlm_jax
from vlm_jax.adapters.modules_to_save import saved_leaves
from vlm_jax.trees import flatten, unflatten

TIED = dict(text=dict(tie_word_embeddings=True), tie_word_embeddings=True)


def make(tower, directory, **options):
    """Return (reference, model, params, inputs)."""
    if tower == "qwen":
        reference = qwen2_vl(directory, **options)
        return reference, *vlm_jax.load(directory), qwen2_vl_inputs("one image")
    reference = llava(directory, tower, "llama", **options)
    model, params = vlm_jax.load(directory)
    return reference, model, params, llava_inputs(model.config.image_tokens())


def peft_adapter(reference, directory, save=None, **options):
    """Write an adapter whose every trainable tensor was moved; return peft's model."""
    with quiet():
        adapted = get_peft_model(reference, LoraConfig(r=2, lora_alpha=3, **options))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(directory, **(save or {}))
    return adapted


def in_peft(tower, base, adapter):
    """Return an adapter on a fresh reference; peft raises for a tensor that it misses."""
    family = Qwen2VLForConditionalGeneration if tower == "qwen" else LlavaForConditionalGeneration
    with quiet():
        return PeftModel.from_pretrained(family.from_pretrained(base), adapter)


def adapter_tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


LM = r".*language_model.*q_proj"
MODULES = {
    "tower": ("clip", dict(target_modules=LM, modules_to_save=["vision_tower"])),
    "siglip": ("siglip", dict(target_modules=LM, modules_to_save=["vision_tower"])),
    "siglip's head and ours": ("siglip", dict(target_modules=LM, modules_to_save=["head"])),
    "by ending": ("clip", dict(target_modules=LM, modules_to_save=["norm"])),
    "one layer": ("clip", dict(target_modules=LM, modules_to_save=["layers.0.mlp"])),
    "one layer's matrices": (
        "qwen",
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_peft_to_us_and_back(tmp_path, case):
    tower, options = MODULES[case]
    reference, model, params, inputs = make(tower, tmp_path / "base")
    adapted = peft_adapter(reference, tmp_path / "theirs", **options)
    model, params = vlm_jax.load_peft(model, params, tmp_path / "theirs")
    assert_equal_logits(adapted, model, params, inputs)
    vlm_jax.save_peft(model, params, tmp_path / "ours")
    theirs, ours = adapter_tensors(tmp_path / "theirs"), adapter_tensors(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
    again = in_peft(tower, tmp_path / "base", tmp_path / "ours")
    assert_equal_logits(again, model, params, inputs)
    if any("post_layernorm" in key for key in theirs):  # and so is a merged export
        vlm_jax.save_pretrained(model, params, tmp_path / "merged")
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        (name,) = [name for name in merged if name.endswith("post_layernorm.weight")]
        (key,) = [key for key in theirs if key.endswith("post_layernorm.weight")]
        np.testing.assert_array_equal(merged[name], theirs[key])


OURS = {
    "tower": ("clip", dict(modules_to_save=("vision_tower",)), ["vision_tower"]),
    "siglip": ("siglip", dict(modules_to_save=("vision_tower", "projector")), None),
    "one in another": ("qwen", dict(modules_to_save=("visual", "merger")), ["model.visual"]),
    "by ending": ("qwen", dict(modules_to_save=("norm",)), ["norm"]),
    "old name": ("clip", dict(modules_to_save=("language_model.lm_head",)), ["lm_head"]),
    "projector": ("qwen", dict(targets="all-linear", components=("projector",)), None),
    "siglip's layers": ("siglip", dict(targets="all-linear", components=("vision",)), None),
    "everything": (
        "qwen",
        dict(targets="all-linear", components=("vision", "projector", "language_model")),
        None,
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft(tmp_path, case):
    tower, options, names = OURS[case]
    _, model, params, inputs = make(tower, tmp_path / "base")
    lora = vlm_jax.LoRA(**{"rank": 2, "alpha": 3, "targets": ("q_proj",), **options})
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    before = our_logits(model, params, inputs)
    trained = saved_leaves(model, params, lora.modules_to_save)
    params = shaken(params, lambda path: path in trained or path.endswith("lora_B"))
    assert np.abs(our_logits(model, params, inputs) - before).max() > 0.1
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert names is None or config["modules_to_save"] == names
    adapted = in_peft(tower, tmp_path / "base", tmp_path / "adapter")
    theirs = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(theirs) == sum("lora_A" in key for key in adapter_tensors(tmp_path / "adapter"))
    assert_equal_logits(adapted, model, params, inputs)
    _, read = vlm_jax.load_peft(*vlm_jax.load(tmp_path / "base"), tmp_path / "adapter")
    mine, theirs = flatten(params), flatten(read)
    assert mine.keys() == theirs.keys()
    for path, leaf in mine.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_a_head_with_matrices(tmp_path):
    """peft saves a copy of the base's head beside them (save_embedding_layers="auto")."""
    reference, model, params, inputs = make("qwen", tmp_path / "base")
    adapted = peft_adapter(reference, tmp_path / "theirs", target_modules=["q_proj", "lm_head"])
    copy = "base_model.model.lm_head.base_layer.weight"
    theirs = adapter_tensors(tmp_path / "theirs")
    ours, read = vlm_jax.load_peft(model, params, tmp_path / "theirs")
    assert_equal_logits(adapted, ours, read, inputs)
    vlm_jax.save_peft(ours, read, tmp_path / "ours")
    assert adapter_tensors(tmp_path / "ours").keys() == theirs.keys() - {copy}
    again = in_peft("qwen", tmp_path / "base", tmp_path / "ours")
    assert_equal_logits(again, ours, read, inputs)
    # In narrower weights the copy is the base's up to rounding, and no other base is.
    narrow = vlm_jax.load(tmp_path / "base", "bfloat16")
    vlm_jax.load_peft(*narrow, tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    save_file({**theirs, copy: theirs[copy] + 0.5}, file, metadata={"format": "pt"})
    for base in ((model, params), narrow):
        with pytest.raises(vlm_jax.UserError, match="lm_head.base_layer.weight.*another base"):
            vlm_jax.load_peft(*base, tmp_path / "theirs")


HEADS = {
    "matrices on it": (dict(target_modules=["q_proj", "lm_head"]), "tied to the embedding"),
    "trained alone": (dict(target_modules=LM, modules_to_save=["lm_head"]), "differs from the"),
    "both trained": (
        dict(target_modules=LM, modules_to_save=["lm_head", "embed_tokens"]),
        "differs from the",
    ),
    "the embedding alone": (
        dict(target_modules=LM, modules_to_save=["embed_tokens"]),
        "ensure_weight_tying",
    ),
    "matrices on both": (
        dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
        "tied to each other|tied to the embedding",
    ),
    "DoRA on the embedding": (
        dict(target_modules=["embed_tokens"], use_dora=True),
        "DoRA on an embedding",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_tied_head_that_peft_unties_is_refused(tmp_path, case):
    options, message = HEADS[case]
    reference, model, params, _ = make("qwen", tmp_path / "base", **TIED)
    peft_adapter(reference, tmp_path / "theirs", **options)
    with pytest.raises(vlm_jax.UserError, match=message):
        vlm_jax.load_peft(model, params, tmp_path / "theirs")


def test_matrices_on_the_embedding_leave_a_tied_head_alone(tmp_path):
    reference, model, params, inputs = make("qwen", tmp_path / "base", **TIED)
    adapted = peft_adapter(reference, tmp_path / "theirs", target_modules=["embed_tokens"])
    ours, read = vlm_jax.load_peft(model, params, tmp_path / "theirs")
    assert_equal_logits(adapted, ours, read, inputs)
    vlm_jax.save_peft(ours, read, tmp_path / "ours")
    assert_equal_logits(in_peft("qwen", tmp_path / "base", tmp_path / "ours"), ours, read, inputs)
    with pytest.raises(vlm_jax.UserError, match="untie"):
        vlm_jax.merge(ours, read)
    with pytest.raises(vlm_jax.UserError, match="'lm_head' is tied to the embedding"):
        vlm_jax.add_lora(model, params, vlm_jax.LoRA(targets=("lm_head",)), jax.random.key(0))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_that_peft_was_told_to_save(tmp_path, tied):
    options = TIED if tied else {}
    reference, model, params, inputs = make("qwen", tmp_path / "base", **options)
    saved = dict(save_embedding_layers=True)
    adapted = peft_adapter(reference, tmp_path / "theirs", saved, target_modules=LM)
    assert any("embed_tokens" in key for key in adapter_tensors(tmp_path / "theirs"))
    ours, read = vlm_jax.load_peft(model, params, tmp_path / "theirs")
    assert_equal_logits(adapted, ours, read, inputs)
    assert ours.lora.modules_to_save == ()
    if not tied:  # embeddings of their own are kept, though the config does not name them
        with torch.no_grad(), quiet():
            adapted.get_input_embeddings().weight.mul_(1.5)
            adapted.save_pretrained(tmp_path / "theirs", **saved)
        ours, read = vlm_jax.load_peft(model, params, tmp_path / "theirs")
        assert_equal_logits(adapted, ours, read, inputs)
        vlm_jax.save_peft(ours, read, tmp_path / "ours")
        again = in_peft("qwen", tmp_path / "base", tmp_path / "ours")
        assert_equal_logits(again, ours, read, inputs)


def test_a_leaf_that_the_adapter_would_leave_out_is_refused(tmp_path):
    _, model, params, _ = make("qwen", tmp_path / "base")
    base = params
    lora = vlm_jax.LoRA(rank=2, alpha=3, targets=("q_proj",))
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    vlm_jax.save_peft(model, params, tmp_path / "fine")
    table = [(r".*/language_model/norm/.*", "full"), (r".*/lora_[AB]", "lora"), (".*", "frozen")]
    trainable, frozen = vlm_jax.split(params, table)
    trainable = jax.tree.map(lambda leaf: leaf + 0.5, trainable)
    params = vlm_jax.join(trainable, frozen)
    with pytest.raises(vlm_jax.UserError, match="language_model/norm/scale.*modules_to_save"):
        vlm_jax.save_peft(model, params, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    named = dataclasses.replace(lora, modules_to_save=("language_model.norm",))
    vlm_jax.save_peft(dataclasses.replace(model, lora=named), params, tmp_path / "adapter")
    assert len(adapter_tensors(tmp_path / "adapter")) == 2 * 2 + 1
    # A second adapter on merged weights is not one of the base.
    merged = unflatten(dict(flatten(base)))
    kernel = merged["model"]["language_model"]["layers"]["self_attn"]["v_proj"]
    kernel["kernel"] = kernel["kernel"].at[1].add(0.25)
    plain = dataclasses.replace(model, lora=None)
    second = vlm_jax.add_lora(plain, merged, lora, jax.random.key(0))
    with pytest.raises(vlm_jax.UserError, match="layers.1.self_attn.v_proj.weight.*merged"):
        vlm_jax.save_peft(*second, tmp_path / "second")


@pytest.mark.parametrize("tower", ["clip", "qwen"])
def test_bfloat16_parameters(tmp_path, tower):
    make(tower, tmp_path / "base")
    model, params = vlm_jax.load(tmp_path / "base", "bfloat16")
    name = {"clip": "vision_tower", "qwen": "visual"}[tower]
    lora = vlm_jax.LoRA(rank=2, alpha=3, modules_to_save=(name,))
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    vlm_jax.save_peft(model, params, tmp_path / "adapter")
    again, read = vlm_jax.load_peft(
        *vlm_jax.load(tmp_path / "base", "bfloat16"), tmp_path / "adapter"
    )
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(np.float32(leaf), np.float32(flatten(read)[path]), path)
    assert again.lora.modules_to_save == (name,)
    in_peft(tower, tmp_path / "base", tmp_path / "adapter")


def test_layers_cannot_be_trained_apart(tmp_path):
    _, model, params, _ = make("qwen", tmp_path / "base")
    lora = vlm_jax.LoRA(modules_to_save=("layers.1.mlp",))
    with pytest.raises(vlm_jax.UserError, match=r"only layers \[1\].*layers/mlp"):
        vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    lora = vlm_jax.LoRA(targets=("lm_head",))
    grown = vlm_jax.add_tokens(model, params, 2)
    with pytest.raises(vlm_jax.UserError, match="lm_head/kernel.*added tokens"):
        vlm_jax.add_lora(*grown, lora, jax.random.key(0))
    adapted = vlm_jax.add_tokens(*vlm_jax.add_lora(model, params, lora, jax.random.key(0)), 2)
    with pytest.raises(vlm_jax.UserError, match="lm_head.*rows of added tokens"):
        vlm_jax.save_peft(*adapted, tmp_path / "adapter")
