"""LLaVA-1.5-7B by its own LoRA recipe: rank 128, projector in full at a tenth of the rate."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "llava-hf/llava-1.5-7b-hf"
    c.model.projector_lr_scale = 0.1  # 2e-5 beside LoRA's 2e-4
    c.lora.r = 128
    c.lora.alpha = 256.0
    c.data.train_file = "data/train.json"
    c.training.output_dir = "outputs/llava15_7b_lora"
    c.training.per_device_train_batch_size = 4
    c.training.gradient_accumulation_steps = 4
    c.training.remat_policy = "auto"  # and micro-batches: the fastest that fit
    return c
