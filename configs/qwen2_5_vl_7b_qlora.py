"""Qwen2.5-VL-7B in QLoRA: NF4 language model, LoRA on it, projector in full."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "Qwen/Qwen2.5-VL-7B-Instruct"
    c.model.quantize = "nf4-dq"
    c.lora.r = 64
    c.lora.alpha = 16
    c.data.train_file = "data/train.json"
    c.data.max_pixels = 200704  # 1,024 patches, 256 image tokens
    c.training.output_dir = "outputs/qwen2_5_vl_7b_qlora"
    c.training.learning_rate = 1e-4
    c.training.gradient_accumulation_steps = 8
    c.training.remat_policy = "auto"  # and micro-batches: the fastest that fit
    return c
