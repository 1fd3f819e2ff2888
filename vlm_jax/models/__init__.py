"""The model families by Hugging Face's `model_type`; docs/ADD_A_MODEL.md says how to add one.

Nothing here imports JAX: a family's Linen module is loaded by `Model.module`.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError, nearest
from vlm_jax.models.family import Family
from vlm_jax.models.llava import Llava
from vlm_jax.models.qwen2_vl import Qwen2VL

MODELS: dict[str, type[Family]] = {
    "llava": Llava,
    "qwen2_vl": Qwen2VL,
}


def read_family(hf_config: Mapping[str, Any]) -> Family:
    """Return the family's sizes in a Hugging Face config.json.

    Raises `UserError` for an unknown family or a field whose meaning is not known.
    """
    if not isinstance(hf_config, Mapping):
        raise UserError(
            f"The config.json is not a JSON object but {hf_config!r:.80}. Use the config.json "
            f"that belongs to the checkpoint."
        )
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise UserError(
            f"The config.json has model_type {model_type!r}, which is not supported"
            f"{nearest(str(model_type), MODELS)}. Supported: {', '.join(MODELS)}."
        )
    return MODELS[model_type].from_hf(dict(hf_config))
