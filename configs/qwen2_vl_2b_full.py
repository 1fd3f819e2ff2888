"""Qwen2-VL-2B in full: language model and projector at the full rate, the tower at a tenth."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "Qwen/Qwen2-VL-2B-Instruct"
    c.model.vision_encoder_lr_scale = 0.1
    c.lora.enabled = False
    c.data.train_file = "data/train.json"
    c.data.max_pixels = 1003520  # 1280 image tokens
    c.training.output_dir = "outputs/qwen2_vl_2b_full"
    c.training.learning_rate = 1e-5
    c.training.gradient_accumulation_steps = 8
    c.training.remat_policy = "auto"  # and micro-batches: the fastest that fit
    return c
