"""config.json of well-known checkpoints, for plans without a network."""

from typing import Any


def _qwen2_vl(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool = False,
) -> dict[str, Any]:
    """Return the flat config.json that the Qwen2-VL checkpoints carry."""
    vision = {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "temporal_patch_size": 2, "hidden_size": hidden,
    }  # fmt: skip
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
        "video_token_id": 151656, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": intermediate,
        "max_position_embeddings": 32768, "max_window_layers": layers, "model_type": "qwen2_vl",
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
        "use_cache": True, "use_sliding_window": False, "vocab_size": vocabulary,
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip


def _llava(**text: int) -> dict[str, Any]:
    """Return the config.json of LLaVA-1.5; text: what differs from a 7B LLaMA."""
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


KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2-VL-72B-Instruct": _qwen2_vl(8192, 29568, 80, 64, 8, 152064),
    "llava-hf/llava-1.5-7b-hf": _llava(),
    "llava-hf/llava-1.5-13b-hf": _llava(
        hidden_size=5120,
        intermediate_size=13824,
        num_attention_heads=40,
        num_hidden_layers=40,
        num_key_value_heads=40,
    ),
}

# What their preprocessor_config.json says of the size of images, where that is dynamic.
IMAGES: dict[str, dict[str, Any]] = {
    name: {"min_pixels": 3136, "max_pixels": 12845056}
    for name, config in KNOWN.items()
    if config["model_type"] == "qwen2_vl"
}
