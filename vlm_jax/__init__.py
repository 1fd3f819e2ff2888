"""vlm_jax: fine-tune open vision-language models with JAX. Public names load on first use."""

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

# transformers advises to install PyTorch, which nothing here needs; its other words come through.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)

_HOMES = {
    "Adapter": "models.methods",
    "Batch": "batch",
    "LoRA": "models.methods",
    "NF4": "weights",
    "Model": "model",
    "TrainState": "train.step",
    "Quantization": "quantization",
    "UserError": "errors",
    "add_adapter": "adapters.bottleneck",
    "adapt": "linen.adapt",
    "add_lora": "adapters.lora",
    "add_tokens": "adapters.added_tokens",
    "average_adapters": "adapters.bottleneck",
    "combine_peft_adapters": "hub.peft_several",
    "count_parameters": "train.trainable",
    "from_config": "model",
    "generate": "generation",
    "init_state": "train.step",
    "join": "trees",
    "load": "hub.load",
    "load_adapter": "linen.codec",
    "load_peft_adapters": "hub.peft_several",
    "load_lora": "linen.codec",
    "load_peft": "hub.peft_load",
    "loss": "train.losses",
    "make_mesh": "sharding",
    "make_step": "train.step",
    "merge": "linen.adapt",
    "optimizer": "train.optimizer",
    "save_adapter": "linen.codec",
    "print_trainable_parameters": "train.trainable",
    "save_lora": "linen.codec",
    "save_peft": "hub.peft",
    "save_pretrained": "hub.save",
    "split": "trees",
    "take_adapter": "adapters.bottleneck",
    "training_table": "train.trainable",
    "with_adapter": "adapters.bottleneck",
}
_MODULES = ("data", "nf4", "plan", "sharding")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    # Lazy, so that `vlm-jax --help` does not wait for JAX.
    if name in _HOMES:
        return getattr(importlib.import_module(f"vlm_jax.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"vlm_jax.{name}")
    raise AttributeError(f"module 'vlm_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
