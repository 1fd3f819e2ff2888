"""How a run is read back: its result, or its newest checkpoint without one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax.data import Encoder
from vlm_jax.errors import UserError
from vlm_jax.hub.adapter_files import is_adapter_directory, load_adapter
from vlm_jax.hub.load import load, resolve
from vlm_jax.hub.peft_load import load_peft
from vlm_jax.hub.tensors import find_tensors
from vlm_jax.model import Model
from vlm_jax.sharding import make_mesh, shard_params
from vlm_jax.train.base import base_name, compute_dtype, load_base
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.identity import identity
from vlm_jax.train.mesh import mesh_for_reading
from vlm_jax.train.places import places_of
from vlm_jax.train.run import build, encoder_of, state_options
from vlm_jax.trees import join, split
from vlm_jax.weights import bnb


def stored_dtype(directory: Path) -> str:
    """Return the widest dtype of a checkpoint's dense tensors: in it none of them is rounded."""
    found = find_tensors(directory)
    four = {bnb.weight_of(name) for name in found}  # 4-bit weights, and None for all others
    kinds = {
        entry.dtype
        for name, entry in found.items()
        if bnb.weight_of(name) is None and name not in four
    }
    narrow = {"BF16": "bfloat16", "F16": "float16"}
    return narrow[kinds.pop()] if len(kinds) == 1 and kinds <= narrow.keys() else "float32"


def open_run(directory: str | Path) -> tuple[ConfigDict, Encoder]:
    """Return a run's config and encoder; no weights are read. Raises where it has no weights."""
    config = _config_of(directory := Path(directory).expanduser())
    full = directory / "model"
    if full.is_dir():
        with config.unlocked():
            config.model.adapter = None  # the model holds what it had
        return config, encoder_of(config, full)
    adapter = directory / "adapter"
    if not adapter.is_dir() and not places_of(config, directory).saved_steps():
        raise UserError(f"The run in '{directory}' has neither a result nor a checkpoint yet.")
    base = resolve(base_name(config), config.model.revision, weights=False)
    return config, encoder_of(config, base, adapter if adapter.is_dir() else None)


def _config_of(directory: Path) -> ConfigDict:
    if not (directory / "config.json").is_file():
        raise UserError(
            f"'{directory}' holds no run: there is no config.json. Give the training.output_dir of "
            f"a run."
        )
    try:
        return configs.load(directory / "config.json")
    except UserError as error:
        raise UserError(
            f"The run in '{directory}' cannot be read: {error} If this is a checkpoint and no run, "
            f"give it by --model."
        ) from error


def load_run(
    directory: str | Path, exact: bool = False, encoder: Encoder | None = None
) -> tuple[Model, dict[str, Any], ConfigDict]:
    """Return (model, params, config) of a run: its result, or its newest checkpoint without one.

    exact: in the dtype that the base is stored in, so that no weight is rounded; otherwise in the
    run's compute dtype. encoder: the run's, where it is open already. It is spread over this
    process's devices where one has no room for it, see `mesh_for_reading`.
    """
    directory = Path(directory).expanduser()
    config = _config_of(directory)
    full = directory / "model"
    if exact:
        base = resolve(config.model.name_or_path, config.model.revision)
        dtype = stored_dtype(full if full.is_dir() else base)
        with config.unlocked():
            config.model.dtype = dtype
    mesh = mesh_for_reading(config)
    if full.is_dir():
        model, params = load(str(full), compute_dtype(config), mesh=mesh)
        with config.unlocked():  # whose settings and tokenizer the result holds
            config.model.adapter = None
        return model, params, config
    if (directory / "adapter").is_dir():
        model, params = load_adapted(config, directory / "adapter", mesh)
        return model, params, config
    places = places_of(config, directory)
    if not places.saved_steps():
        raise UserError(f"The run in '{directory}' has neither a result nor a checkpoint yet.")
    one = mesh or make_mesh(devices=jax.local_devices()[:1])
    model, params, table, _ = build(config, one, encoder)
    trainable, frozen = split(params, table)
    options = state_options(config)
    kept, dtype = ("ema", jnp.float32) if options["ema"] else ("trainable", options["param_dtype"])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), trainable
    )
    same = identity(config, model, table, rows=0)
    same = {name: same[name] for name in ("base", "training table", "lora", "adapter")}
    checkpoints = Checkpoints(places.checkpoints, same)
    trained = checkpoints.restore_trainable(like, checkpoints.steps[-1], kept)
    checkpoints.close()
    return model, join(trained, frozen), config


def load_adapted(
    config: ConfigDict, adapter: Path, mesh: Any = None
) -> tuple[Model, dict[str, Any]]:
    """Return the base of a config with the adapter of a directory, PEFT's or a bottleneck's."""
    model, params = load_base(config, mesh)
    read = load_adapter if is_adapter_directory(adapter) else load_peft
    model, params = read(model, params, adapter)
    return model, params if mesh is None else shard_params(model, params, mesh)
