"""Every shipped recipe builds at its full size as shapes: nothing of it is allocated."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax import config as configs
from vlm_jax.lora import target_kernels
from vlm_jax.sharding import make_mesh, param_shardings
from vlm_jax.train.recipe import lora_modules_to_save, training_table
from vlm_jax.trees import flatten, match

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
FULL_SIZE = [path for path in CONFIGS if path.stem != "quickstart"]

QWEN_VISION = {
    "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
}  # fmt: skip


def qwen2_vl(hidden, intermediate, layers, heads, kv_heads, vocabulary, tied):
    """Return the flat config.json of the hub."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
        "video_token_id": 151656, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": intermediate,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
        "use_cache": True, "use_sliding_window": False, "vocab_size": vocabulary,
        "vision_config": {**QWEN_VISION, "hidden_size": hidden},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip


def llava(**text):
    return {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
        "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
        "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": 32064,
        "text_config": {
            "_name_or_path": "lmsys/vicuna", "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
            "torch_dtype": "float16", "vocab_size": 32064, **text,
        },
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
            "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
            "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
        },
    }  # fmt: skip


# The hub's config.json of each base, and its parameters (of the tensors that are computed with).
HUB = {
    "Qwen/Qwen2-VL-7B-Instruct": (
        qwen2_vl(3584, 18944, 28, 28, 4, 152064, False), 8_291_375_616),
    "Qwen/Qwen2-VL-2B-Instruct": (
        qwen2_vl(1536, 8960, 28, 12, 2, 151936, True), 2_208_985_600),
    "llava-hf/llava-1.5-7b-hf": (llava(), 7_063_425_024),
    "llava-hf/llava-1.5-13b-hf": (
        llava(hidden_size=5120, intermediate_size=13824, num_attention_heads=40,
              num_hidden_layers=40, num_key_value_heads=40), 13_351_492_608),
}  # fmt: skip


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_config_builds_at_full_size(path):
    config = configs.load(path)
    hf_config, expected = HUB[config.model.name_or_path]
    model = vlm_jax.from_config(hf_config, "bfloat16")
    shapes = model.abstract()
    assert sum(int(np.prod(leaf.shape)) for leaf in flatten(shapes).values()) == expected
    scales = {
        "vision_encoder_lr_scale": config.model.vision_encoder_lr_scale,
        "projector_lr_scale": config.model.projector_lr_scale,
    }
    params = shapes
    if config.lora.enabled:
        lora = vlm_jax.LoRA(config.lora.r, config.lora.alpha, 0.0, "llama")
        saved = lora_modules_to_save(model, target_kernels(model, shapes, lora), **scales)
        lora = dataclasses.replace(lora, modules_to_save=saved)
        params = jax.eval_shape(
            lambda p: vlm_jax.add_lora(model, p, lora, jax.random.key(0))[1], shapes
        )
    table = training_table(model, params, lora_enabled=config.lora.enabled, **scales)
    groups = match(table, flatten(params), "training table")
    assert set(groups.values()) - {"frozen"}
    shardings = flatten(param_shardings(model, params, make_mesh(1, 4, 2)))
    spread = sum(
        int(np.prod(leaf.shape)) for path, leaf in flatten(params).items()
        if not shardings[path].is_fully_replicated
    )  # fmt: skip
    assert spread > 0.99 * expected, "a large leaf lies whole on every device"
