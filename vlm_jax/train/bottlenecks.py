"""Bottleneck adapters of a run: fresh ones, or those of an adapter that it starts from."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax.adapters import add_adapter
from vlm_jax.errors import UserError
from vlm_jax.hub.adapter_files import is_adapter_directory, load_adapter
from vlm_jax.hub.peft_load import load_peft
from vlm_jax.layers.bottleneck import is_adapter
from vlm_jax.layers.linear import is_lora
from vlm_jax.methods import Adapter
from vlm_jax.model import Model
from vlm_jax.train.recipe import lora_modules_to_save, training_table
from vlm_jax.trees import flatten


def adapter_of(config: ConfigDict) -> Adapter:
    """Return what a config's adapter section asks for."""
    asked = dict(config.adapter)
    return Adapter(kind=asked.pop("type"), **asked)


def adapt_bottlenecks(
    config: ConfigDict, model: Model, params: dict[str, Any]
) -> tuple[Model, dict[str, Any], list[tuple[str, str]]]:
    """Return (model, params, training table) of a base with the config's bottleneck adapters.

    Raises `UserError` where model.adapter holds LoRA, or adapters of another kind.
    """
    m, adapter = config.model, adapter_of(config)
    scales = {
        "vision_encoder_lr_scale": m.vision_encoder_lr_scale,
        "projector_lr_scale": m.projector_lr_scale,
    }
    brought: tuple[str, ...] = ()
    if m.adapter is not None:
        read = load_adapter if is_adapter_directory(m.adapter) else load_peft
        model, params = read(model, params, m.adapter)
        brought = model.modules_to_save
        if any(map(is_lora, flatten(params))):
            raise UserError(
                f"'{m.adapter}' holds LoRA matrices, and adapter.type asks for bottleneck adapters "
                f"beside them. Merge them first (vlm-jax export --merge) and train from the result."
            )
    if model.adapter is None:  # of LLaVA's first stage there are modules alone
        key = jax.random.key(config.training.seed)
        model, params = add_adapter(model, params, adapter, key)
    else:
        _check_same(model.adapter, adapter, m.adapter)
    places = [path for path in flatten(params) if is_adapter(path)]
    saved = lora_modules_to_save(model, places, modules_to_save=adapter.modules_to_save, **scales)
    modules = tuple(dict.fromkeys((*brought, *saved)))
    adapter = dataclasses.replace(adapter, modules_to_save=modules)
    model = dataclasses.replace(model, adapter=adapter, lora=None)
    table = training_table(
        model,
        params,
        language_model_lr_scale=m.language_model_lr_scale,
        freeze_layers=m.freeze_layers,
        vision_layer_decay=m.vision_layer_decay,
        modules_to_save=saved,
        **scales,
    )
    return model, params, table


def _check_same(own: Adapter, asked: Adapter, directory: str) -> None:
    """Raise where a loaded adapter computes otherwise than the config asks."""
    for name in ("kind", "reduction_factor", "non_linearity", "scaling", "norm", "components"):
        ours, theirs = getattr(own, name), getattr(asked, name)
        if ours != theirs and (name != "components" or set(ours) != set(theirs)):
            raise UserError(
                f"The adapter '{directory}' has {name}={getattr(own, name)!r}, but the config's "
                f"adapter section says {getattr(asked, name)!r}. Set the adapter's own value."
            )
