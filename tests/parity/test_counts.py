"""Counts of parameters, equal to peft's on models of full size that hold no numbers."""

import jax
import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import llava, quiet
from test_peft import build
from transformers import (
    AutoConfig,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

import vlm_jax
from vlm_jax.adapters.targets import PRESETS
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.train.trainable import leaf_sizes

SEVEN = "|".join(PRESETS["llama"])
LM = rf".*language_model.*({SEVEN})"
BASES = {
    "llava": ("llava-hf/llava-1.5-7b-hf", LlavaForConditionalGeneration),
    "qwen": ("Qwen/Qwen2-VL-7B-Instruct", Qwen2VLForConditionalGeneration),
}
NEWER = {
    "qwen2.5": ("Qwen/Qwen2.5-VL-3B-Instruct", Qwen2_5_VLForConditionalGeneration),
    "qwen3": ("Qwen/Qwen3-VL-8B-Instruct", Qwen3VLForConditionalGeneration),
    "gemma3": ("google/gemma-3-27b-it", Gemma3ForConditionalGeneration),
}
MERGERS = ["merger", *(f"deepstack_merger_list.{n}" for n in range(3))]
# Family, our LoRA, peft's LoraConfig.
CASES = {
    "llava 16": ("llava", dict(rank=16, targets="llama"), dict(r=16, target_modules=LM)),
    "llava 4, projector, DoRA": (
        "llava",
        dict(rank=4, targets="llama", dora=True, modules_to_save=("projector",)),
        dict(r=4, target_modules=LM, use_dora=True, modules_to_save=["multi_modal_projector"]),
    ),
    "qwen 16": ("qwen", dict(rank=16, targets="qwen"), dict(r=16, target_modules=LM)),
    "qwen 8, some layers, biases": (
        "qwen",
        dict(
            rank=8, targets=("q_proj", "v_proj"), layers_to_transform=(0, 5, 6), bias="all",
            rank_pattern={r"layers\.5\..*q_proj": 32},
        ),
        dict(
            r=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 5, 6], bias="all",
            rank_pattern={r"layers\.5\..*q_proj": 32},
        ),
    ),
    "qwen2.5 16, projector": (  # whose tower has layers of the same names
        "qwen2.5",
        dict(rank=16, targets="qwen", modules_to_save=("projector",)),
        dict(r=16, target_modules=LM, modules_to_save=["merger"]),
    ),
    "qwen3 8, projector": (
        "qwen3",
        dict(rank=8, targets="qwen", modules_to_save=("projector",)),
        dict(r=8, target_modules=LM, modules_to_save=MERGERS),
    ),
    "gemma3 8, projector": (
        "gemma3",
        dict(rank=8, targets="llama", modules_to_save=("projector",)),
        dict(r=8, target_modules=LM, modules_to_save=["multi_modal_projector"]),
    ),
}  # fmt: skip


def adapted_shapes(model, method, add=vlm_jax.add_lora):
    """Return the model with an adapter, and its parameters as shapes."""
    made = []

    def added(params):
        model_, params = add(model, params, method, jax.random.key(0))
        made.append(model_)
        return params

    params = jax.eval_shape(added, model.abstract())
    return made[0], params


@pytest.fixture(scope="module")
def ours():
    bases = {**BASES, **NEWER}
    return {family: vlm_jax.from_config(KNOWN[name]) for family, (name, _) in bases.items()}


@pytest.mark.parametrize("case", CASES)
def test_counts_are_pefts(ours, case):
    family, lora, config = CASES[case]
    hub, make = {**BASES, **NEWER}[family]
    made = dict(KNOWN[hub])
    kind = made.pop("model_type")
    with torch.device("meta"), quiet():
        reference = make(AutoConfig.for_model(kind, **made))
        expected = get_peft_model(reference, LoraConfig(**config)).get_nb_trainable_parameters()
    model, params = adapted_shapes(ours[family], vlm_jax.LoRA(**lora))
    assert vlm_jax.count_parameters(model, params) == expected


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_llama_2_7b(ours, rank):
    """The language model of LLaVA-1.5-7B with Llama's own vocabulary."""
    with torch.device("meta"), quiet():
        llama = LlamaForCausalLM(LlamaConfig())
        config = LoraConfig(r=rank, target_modules=list(PRESETS["llama"]))
        expected = get_peft_model(llama, config).get_nb_trainable_parameters()
    if rank == 16:
        assert expected == (39_976_960, 6_778_392_576)
    made = dict(KNOWN[BASES["llava"][0]])
    made["text_config"] = {**made["text_config"], "vocab_size": 32000}
    base = vlm_jax.from_config(made)
    model, params = adapted_shapes(base, vlm_jax.LoRA(rank, targets="llama"))
    trained, every = vlm_jax.count_parameters(model, params)
    vision = sum(
        size
        for path, size in leaf_sizes(model, params).items()
        if model.component(path) in ("vision", "projector")
    )
    vision += model.config.unused_parameters
    assert (trained, every - vision) == expected


# Of the two 7B bases: what trains by docs/METHODS.md, and its share in percent.
ADAPTERS = {
    ("houlsby", None): {"llava": (134_496_256, 1.87), "qwen": (90_128_640, 1.08)},
    ("pfeiffer", None): {"llava": (67_248_128, 0.94), "qwen": (45_064_320, 0.54)},
    ("parallel", None): {"llava": (537_067_520, 7.07), "qwen": (359_812_096, 4.16)},
    ("parallel", 4): {"llava": (268_599_296, 3.66), "qwen": (179_956_224, 2.12)},
}


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("kind", ADAPTERS, ids=str)
def test_adapters_are_small(ours, family, kind):
    """Below 5 % of the weights, but for wide parallel ones beside Llama."""
    model, params = adapted_shapes(ours[family], vlm_jax.Adapter(*kind), vlm_jax.add_adapter)
    trained, every = vlm_jax.count_parameters(model, params)
    expected, share = ADAPTERS[kind][family]
    text = model.config.text
    width = text.hidden_size // (kind[1] or {"parallel": 2}.get(kind[0], 16))
    each = 2 * text.hidden_size * width + width + text.hidden_size
    places = 2 if kind[0] == "houlsby" else 1
    assert trained == expected == text.num_layers * places * each
    assert 100 * trained / every == pytest.approx(share, abs=0.005)
    assert share < 5 or kind == ("parallel", None)


@pytest.mark.parametrize("layers", [(1,), ()])
def test_biases_of_some_layers_count(tmp_path, layers):
    """As peft's adapters may hold them, though a run here trains a stack's biases together."""
    reference, model, params, _ = build("qwen2_vl", tmp_path / "base")
    with quiet():
        config = LoraConfig(
            r=2, target_modules=["q_proj"], bias="lora_only", layers_to_transform=list(layers)
        )
        adapted = get_peft_model(reference, config)
        expected = adapted.get_nb_trainable_parameters()
        adapted.save_pretrained(tmp_path / "adapter")
    model, params = vlm_jax.load_peft(model, params, tmp_path / "adapter")
    assert vlm_jax.count_parameters(model, params) == expected


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_4_bits_count_dense_and_unused_tensors_count(tmp_path, capsys, tower):
    reference = llava(tmp_path, tower, "mistral")
    model, params = vlm_jax.load(tmp_path, quantize="nf4-dq")
    size = sum(parameter.numel() for parameter in reference.parameters())
    assert vlm_jax.count_parameters(model, params)[1] == size
    model, params = vlm_jax.add_lora(model, params, vlm_jax.LoRA(2), jax.random.key(0))
    with quiet():
        config = LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj")
        adapted = get_peft_model(reference, config)
        adapted.print_trainable_parameters()
    vlm_jax.print_trainable_parameters(model, params)
    theirs, ours = capsys.readouterr().out.strip().splitlines()
    assert ours == theirs
