"""The model families by Hugging Face's `model_type`; each is one file.

A family module holds: Config.from_hf, Module, image_tokens, layout, pixels, cell, values_per_image,
patch_unit, HAS_GRIDS, merged_patches, disk_shapes, stacks, unused_parameters, COMPONENTS, RENAMES,
UNUSED, PROJECTOR, VISION, ARCHITECTURE, AXES. docs/ADD_A_MODEL.md says what each is.
"""

from types import ModuleType

from vlm_jax.models import llava, qwen2_vl

MODELS: dict[str, ModuleType] = {
    "llava": llava,
    "qwen2_vl": qwen2_vl,
}
