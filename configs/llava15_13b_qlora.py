"""LLaVA-1.5-13B in QLoRA: NF4 language model, LoRA on it, projector in full."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "llava-hf/llava-1.5-13b-hf"
    c.model.quantize = "nf4-dq"
    c.model.projector_lr_scale = 0.1  # LLaVA's recipe: 2e-5 beside LoRA's 2e-4
    c.lora.r = 64
    c.lora.alpha = 16
    c.data.train_file = "data/train.json"
    c.training.output_dir = "outputs/llava15_13b_qlora"
    c.training.learning_rate = 2e-4
    c.training.gradient_accumulation_steps = 16
    c.training.remat_policy = "auto"  # and micro-batches: the fastest that fit
    return c
