"""The quickstart: LoRA on easy-VQA from a tiny Qwen2-VL, minutes on two CPU cores."""

from vlm_jax import config


def get_config():
    c = config.get_config()
    c.model.name_or_path = "models/tiny_qwen2_vl"
    c.data.train_file = "outputs/quickstart/data/train.jsonl"
    c.data.eval_file = "outputs/quickstart/data/test.jsonl"
    c.data.max_seq_length = 512
    c.training.output_dir = "outputs/quickstart"
    c.training.bf16 = False  # two cores multiply float32 faster than bfloat16
    c.training.gradient_checkpointing = False
    return c
