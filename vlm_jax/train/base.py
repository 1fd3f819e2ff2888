"""The base checkpoint of a run: which one, in which dtype, and what of it is quantized."""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.errors import UserError
from vlm_jax.hub.load import load
from vlm_jax.model import Model
from vlm_jax.quantization import Quantization


def compute_dtype(config: ConfigDict) -> str:
    """Return the dtype of frozen weights and computation."""
    m = config.model
    if m.dtype != "auto":
        return m.dtype
    if m.load_in_4bit and m.bnb_4bit_compute_dtype is not None:
        return m.bnb_4bit_compute_dtype
    return "bfloat16" if config.training.bf16 else "float32"


def quantization_of(config: ConfigDict) -> Quantization | None:
    """Return what of the base is quantized, by model.quantize or `BitsAndBytesConfig`'s keys."""
    m = config.model
    storage = m.quantize
    if m.load_in_4bit:
        double = "-dq" if m.bnb_4bit_use_double_quant else ""
        storage = f"{m.bnb_4bit_quant_type}{double}"
    if storage is None:
        return None
    return Quantization(storage, tuple(m.quantize_components), tuple(m.llm_int8_skip_modules))


def remat_of(config: ConfigDict) -> str:
    """Return the remat policy, a key of `layers.scan.REMAT`: the one named, or a block's."""
    named = config.training.remat_policy
    return named or ("block" if config.training.gradient_checkpointing else "none")


def base_name(config: ConfigDict) -> str:
    """Return the base's directory or hub id; raise `UserError` where the config names none."""
    if config.model.name_or_path is None:
        raise UserError(
            "The config names no model: set model.name_or_path to a checkpoint directory or a hub "
            "id such as 'Qwen/Qwen2-VL-2B-Instruct'."
        )
    return config.model.name_or_path


def check_type(config: ConfigDict, model: Model) -> None:
    """Raise `UserError` where the base is not of the family that the config says."""
    wanted, found = config.model.type, model.hf_config["model_type"]
    if wanted is not None and wanted != found:
        raise UserError(f"model.type is '{wanted}', but '{base_name(config)}' is a '{found}'.")


def load_base(config: ConfigDict, mesh: Any = None) -> tuple[Model, dict[str, Any]]:
    """Return the base checkpoint of a config, in its compute dtype."""
    m, name, dtype = config.model, base_name(config), compute_dtype(config)
    model, params = load(
        name, dtype, quantization_of(config), mesh, m.revision, remat=remat_of(config)
    )
    check_type(config, model)
    return model, params
