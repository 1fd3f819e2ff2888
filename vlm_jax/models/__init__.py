"""The model families by Hugging Face's `model_type`; docs/ADD_A_MODEL.md says how to add one.

Nothing here imports JAX: a family's Linen module is loaded by `Model.module`.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.models.family import Family
from vlm_jax.models.gemma3 import Gemma3
from vlm_jax.models.hf_config import Fields, entry
from vlm_jax.models.llava import Llava
from vlm_jax.models.qwen2_5_vl import Qwen25VL
from vlm_jax.models.qwen2_vl import Qwen2VL
from vlm_jax.models.qwen3_vl import Qwen3VL

MODELS: dict[str, type[Family]] = {
    "gemma3": Gemma3,
    "llava": Llava,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
}


# model_types that people bring and that are not built: why, and what works instead.
_CODE = "is code in the checkpoint's own repository, which is never run here"
_EXPERTS = "has layers of experts, which are not supported yet"
NOT_BUILT = {
    "internvl_chat": _CODE,
    "llavaonevision1_5": _CODE,
    "minicpmv": _CODE,
    "minicpmo": _CODE,
    "kimi_vl": _CODE,
    "deepseek_vl_v2": _CODE,
    "molmo": _CODE,
    "qwen3_vl_moe": f"{_EXPERTS}; the dense sizes of Qwen3-VL (2B, 4B, 8B, 32B) are",
}


def read_family(hf_config: Mapping[str, Any]) -> Family:
    """Return the family's sizes in a Hugging Face config.json.

    Raises `UserError` for an unknown family or a field whose meaning is not known.
    """
    raw = Fields(hf_config, "config.json").fields
    name = raw.get("model_type")
    if isinstance(name, str) and name in NOT_BUILT:
        raise UserError(
            f"The model of the config.json, of model_type '{name}', {NOT_BUILT[name]}. "
            f"Supported: {', '.join(MODELS)}."
        )
    return entry(MODELS, raw.get("model_type"), "config.json").from_hf(raw)
