"""Gemma 3 4B: vision frozen, projector in full, LoRA in the language model."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "google/gemma-3-4b-it"
    c.data.train_file = "data/train.json"
    c.training.output_dir = "outputs/gemma3_4b_lora"
    c.training.learning_rate = 1e-4
    c.training.gradient_accumulation_steps = 8
    c.training.remat_policy = "auto"  # and micro-batches: the fastest that fit
    return c
