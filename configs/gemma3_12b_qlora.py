"""Gemma 3 12B in QLoRA: NF4 language model, LoRA on it, projector in full."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "google/gemma-3-12b-it"
    c.model.quantize = "nf4-dq"
    c.lora.r = 64
    c.lora.alpha = 16
    c.data.train_file = "data/train.json"
    c.training.output_dir = "outputs/gemma3_12b_qlora"
    c.training.learning_rate = 1e-4
    c.training.gradient_accumulation_steps = 8
    c.training.remat_policy = "auto"  # and micro-batches: the fastest that fit
    return c
