"""Every shipped recipe builds at its full size as shapes: nothing of it is allocated."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax import config as configs
from vlm_jax.adapters.targets import target_kernels
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.sharding import make_mesh, param_shardings
from vlm_jax.train.trainable import lora_modules_to_save, training_table
from vlm_jax.trees import flatten, match

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
FULL_SIZE = [path for path in CONFIGS if path.stem != "quickstart"]

# Parameters of each base, of the tensors that are computed with.
PARAMETERS = {
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "llava-hf/llava-1.5-7b-hf": 7_063_425_024,
    "llava-hf/llava-1.5-13b-hf": 13_351_492_608,
    "Qwen/Qwen2-VL-72B-Instruct": 73_405_560_320,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
}


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_config_builds_at_full_size(path):
    config = configs.load(path)
    name = config.model.name_or_path
    expected = PARAMETERS[name]
    model = vlm_jax.from_config(KNOWN[name], "bfloat16")
    shapes = model.abstract()
    assert sum(int(np.prod(leaf.shape)) for leaf in flatten(shapes).values()) == expected
    scales = {
        "vision_encoder_lr_scale": config.model.vision_encoder_lr_scale,
        "projector_lr_scale": config.model.projector_lr_scale,
    }
    params = shapes
    if config.lora.enabled:
        lora = vlm_jax.LoRA(config.lora.r, config.lora.alpha, 0.0, "llama")
        saved = lora_modules_to_save(model, target_kernels(model, shapes, lora), **scales)
        lora = dataclasses.replace(lora, modules_to_save=saved)
        params = jax.eval_shape(
            lambda p: vlm_jax.add_lora(model, p, lora, jax.random.key(0))[1], shapes
        )
    table = training_table(model, params, lora_enabled=config.lora.enabled, **scales)
    groups = match(table, flatten(params), "training table")
    assert set(groups.values()) - {"frozen"}
    shardings = flatten(param_shardings(model, params, make_mesh(1, 4, 2)))
    spread = sum(
        int(np.prod(leaf.shape)) for path, leaf in flatten(params).items()
        if not shardings[path].is_fully_replicated
    )  # fmt: skip
    assert spread > 0.99 * expected, "a large leaf lies whole on every device"
