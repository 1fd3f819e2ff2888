"""The model families by Hugging Face's `model_type`; docs/ADD_A_MODEL.md says how to add one.

Nothing here imports JAX: a family's Linen module is loaded by `Model.module`.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.models.family import Family
from vlm_jax.models.hf_config import Fields, entry
from vlm_jax.models.llava import Llava
from vlm_jax.models.qwen2_5_vl import Qwen25VL
from vlm_jax.models.qwen2_vl import Qwen2VL
from vlm_jax.models.qwen3_vl import Qwen3VL

MODELS: dict[str, type[Family]] = {
    "llava": Llava,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
}


def read_family(hf_config: Mapping[str, Any]) -> Family:
    """Return the family's sizes in a Hugging Face config.json.

    Raises `UserError` for an unknown family or a field whose meaning is not known.
    """
    raw = Fields(hf_config, "config.json").fields
    return entry(MODELS, raw.get("model_type"), "config.json").from_hf(raw)
