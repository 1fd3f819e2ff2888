"""Bottleneck adapters of foreign modules as files: adapter_config.json + adapter.safetensors.

A format of this library's own, since foreign modules have names of their own: the config holds the
fields of `Adapter`, and each leaf is a tensor under its path in the variables, float32, a stack's
with its leading layer axis.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vlm_jax.errors import UserError, nearest
from vlm_jax.hub.adapter_files import CONFIG, WEIGHTS
from vlm_jax.hub.files import ADAPTER_PARTS, whole_directory, write_json
from vlm_jax.hub.tensors import read_tensors
from vlm_jax.limits import read_json
from vlm_jax.linen.adapt import adapt
from vlm_jax.linen.adapted import ADAPTER, Adapted
from vlm_jax.methods import Adapter
from vlm_jax.trees import flatten, unflatten

FORMAT = "vlm_jax.adapt 1"


def save_adapted(adapted: Any, variables: Mapping[str, Any], directory: str | Path) -> None:
    """Write the bottleneck adapters of a foreign module; variables: with "adapter".

    The directory appears whole or not at all. Raises `UserError` where there is none to save.
    """
    if not isinstance(adapted, Adapted) or adapted.adapter is None:
        raise UserError(
            "There is no bottleneck adapter to save: save_adapter takes a model of this library "
            "and its params, or what adapt returned for an Adapter(...). LoRA is saved by "
            "save_lora."
        )
    adapted.bottlenecks(variables)  # raises where they are not this module's
    leaves = {path: jax.device_get(leaf) for path, leaf in flatten(variables[ADAPTER]).items()}
    tensors = {path: np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves.items()}
    config = {"format": FORMAT, **dataclasses.asdict(adapted.adapter)}
    with whole_directory(directory, ADAPTER_PARTS) as folder:
        save_file(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, config)


def load_adapted(
    module: nn.Module, params: Mapping[str, Any], directory: str | Path, inputs: Any
) -> tuple[Adapted, dict[str, Any]]:
    """Return the adapted module and its variables, as `adapt` does, from such files.

    Raises `UserError` for files of another format, and for a leaf that is missing, has no place, or
    has another shape than this module asks for.
    """
    directory = Path(directory).expanduser()
    file = directory / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"There is no '{file}'. A directory that save_adapter wrote has it, beside {CONFIG}; "
            f"LoRA is read by load_lora."
        )
    config = read_json(directory / CONFIG)
    names = {field.name for field in dataclasses.fields(Adapter)}
    if config.pop("format", None) != FORMAT or config.keys() != names:
        raise UserError(
            f"The {CONFIG} in '{directory}' is not that of an adapter of a foreign module, as "
            f"save_adapter writes it (format '{FORMAT}'). An adapter of this library's own models "
            f"goes onto such a model: load_adapter(model, params, directory)."
        )
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    adapted, variables = adapt(module, params, Adapter(**fields), inputs=inputs)
    wanted = flatten(variables[ADAPTER])
    held = dict(read_tensors(file))
    for path in sorted(held.keys() ^ wanted.keys()):
        what = "is missing" if path in wanted else "has no place in this module"
        raise UserError(
            f"In '{file}' the tensor '{path}' {what}{nearest(path, wanted.keys() - held.keys())}. "
            f"It is an adapter of another module, or not whole; nothing was loaded."
        )
    for path, leaf in held.items():
        if leaf.shape != wanted[path].shape:
            raise UserError(
                f"'{file}' holds '{path}' with the shape {list(leaf.shape)}; this module and the "
                f"adapter's reduction_factor ask for {list(wanted[path].shape)}. It was made for "
                f"another module."
            )
    leaves = {path: jnp.asarray(held[path]) for path in wanted}
    return adapted, {**variables, ADAPTER: unflatten(leaves)}
