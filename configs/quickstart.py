"""The quickstart: LoRA on easy-VQA from a tiny Qwen2-VL, minutes on two CPU cores."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "assets/qwen2_vl_tiny_scenes"
    c.lora.r = 16
    c.lora.alpha = 32
    c.lora.dropout = 0.0
    c.data.train_file = "outputs/quickstart/data/train.jsonl"
    c.data.allow_absolute_paths = True  # the images lie in the package easy-vqa
    c.data.max_seq_length = 512
    c.data.max_shapes = 3
    c.training.output_dir = "outputs/quickstart"
    c.training.num_train_epochs = 2
    c.training.per_device_train_batch_size = 16
    c.training.learning_rate = 1.5e-3
    c.training.warmup_ratio = 0.05
    c.training.logging_steps = 20
    c.training.save_steps = 500
    c.training.eval_strategy = "no"  # before and after, on all test questions
    c.training.bf16 = False  # two cores multiply float32 faster than bfloat16
    c.training.remat_policy = "products"  # no product is recomputed
    c.evaluation.max_new_tokens = 6
    c.evaluation.batch_size = 64
    return c
