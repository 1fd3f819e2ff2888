"""A run as shapes and shardings: what a config trains, without a weight of it being read."""

from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlm_jax import quantization
from vlm_jax.data.tokenizer import has_tokenizer, load_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.hub.sizes import read_hf_config
from vlm_jax.model import Model, from_config
from vlm_jax.sharding import check_spread, param_shardings, used_on_mesh
from vlm_jax.train.adapt import adapt
from vlm_jax.train.base import (
    base_name,
    check_type,
    compute_dtype,
    quantization_of,
    remat_of,
)
from vlm_jax.train.optim import OptimizerSettings, optimizer
from vlm_jax.train.place import abstract, abstract_state
from vlm_jax.train.run import state_options
from vlm_jax.train.step import TrainState
from vlm_jax.trees import split


def abstract_base(config: ConfigDict) -> tuple[Model, dict[str, Any]]:
    """Return the base of a config as `load_base` does, with shapes for arrays.

    Only config.json is read. A frozen leaf may be any pytree of shapes.
    """
    name, m = base_name(config), config.model
    model = from_config(read_hf_config(name, m.revision), compute_dtype(config), remat_of(config))
    check_type(config, model)
    return model, quantization.abstract(model, quantization_of(config))


def abstract_run(
    config: ConfigDict, mesh: Mesh, tokens: int | None = None
) -> tuple[Model, optax.GradientTransformation, TrainState, Any]:
    """Return (model, optimizer, state, frozen): a run's, its arrays as shapes with shardings.

    The schedule's length, which data decide, stands in as 1 where training.max_steps is not set:
    the program is the same but for that number. tokens: of the base's tokenizer; None: it is loaded
    where the base is a directory that holds one. Raises `UserError` for a config with
    model.adapter.
    """
    if config.model.adapter is not None:
        raise UserError(
            "A plan reads no weights, and model.adapter names some. Plan with model.adapter=none, "
            "with the lora.r and lora.target_modules of that adapter: the step is the same."
        )
    base, shapes = abstract_base(config)
    directory = Path(base_name(config)).expanduser()
    if tokens is None:
        tokens = len(load_tokenizer(directory)) if has_tokenizer(directory) else 0
    made: dict[str, Any] = {}

    def build(params: dict[str, Any]) -> dict[str, Any]:
        made["model"], params, made["table"] = adapt(config, base, params, tokens)
        return params

    params = jax.eval_shape(build, shapes)
    model, table = made["model"], made["table"]
    check_spread(model, params, mesh)
    shardings = param_shardings(model, params, mesh)
    trainable, frozen = split(abstract(used_on_mesh(params, shardings), shardings), table)
    training = {**config.training, "max_steps": max(1, config.training.max_steps)}
    tx = optimizer(trainable, table, OptimizerSettings.of(training))
    return model, tx, abstract_state(trainable, tx, mesh, **state_options(config)), frozen
