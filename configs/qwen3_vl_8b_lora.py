"""Qwen3-VL-8B: vision frozen, projector in full, LoRA in the language model."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "Qwen/Qwen3-VL-8B-Instruct"
    c.data.train_file = "data/train.json"
    c.data.max_pixels = 1310720  # 1280 image tokens
    c.training.output_dir = "outputs/qwen3_vl_8b_lora"
    c.training.learning_rate = 1e-4
    c.training.gradient_accumulation_steps = 8
    c.training.remat_policy = "auto"  # and micro-batches: the fastest that fit
    return c
