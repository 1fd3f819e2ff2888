"""Hugging Face files in and out: safetensors checkpoints and PEFT adapters."""
