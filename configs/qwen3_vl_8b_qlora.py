"""Qwen3-VL-8B in QLoRA: NF4 language model, LoRA on it, projector in full."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "Qwen/Qwen3-VL-8B-Instruct"
    c.model.quantize = "nf4-dq"
    c.lora.r = 64
    c.lora.alpha = 16
    c.data.train_file = "data/train.json"
    c.data.max_pixels = 262144  # 1,024 patches, 256 image tokens
    c.training.output_dir = "outputs/qwen3_vl_8b_qlora"
    c.training.learning_rate = 1e-4
    c.training.gradient_accumulation_steps = 8
    c.training.remat_policy = "auto"  # and micro-batches: the fastest that fit
    return c
