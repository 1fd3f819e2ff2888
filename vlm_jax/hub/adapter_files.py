"""Bottleneck adapters as files, in the layout of the `adapters` library.

adapter_config.json and adapter.safetensors, whose names are the block's with the adapter's own:
`model.language_model.layers.3.output_adapters.adapters.default.adapter_down.0.weight` [W, D]. That
library has no vision-language models, so other programs read such files only for their decoder.
What trains beside it (modules_to_save, rows of new tokens) is a PEFT adapter without matrices in
the directory `modules`.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vlm_jax.adapters.added_tokens import is_added
from vlm_jax.adapters.bottleneck import check_bare, shapes
from vlm_jax.adapters.modules_to_save import base_places
from vlm_jax.adapters.targets import is_number
from vlm_jax.errors import UserError, nearest
from vlm_jax.files.atomic import ADAPTER_PARTS, whole_directory, write_json
from vlm_jax.files.limits import read_json
from vlm_jax.hub.base import base_is_here
from vlm_jax.hub.peft import check_left_out, disk_tensors, save_peft
from vlm_jax.hub.peft_load import load_peft
from vlm_jax.hub.tensors import read_tensors
from vlm_jax.hub.unread_weights import adapter_weights
from vlm_jax.model import Model, with_adapter_files
from vlm_jax.models.layers.bottleneck import ATTENTION, KINDS, OUTPUT, is_adapter
from vlm_jax.models.methods import Adapter, LoRA
from vlm_jax.names import current_name, disk_places, to_tree
from vlm_jax.trees import flatten, unflatten

CONFIG, WEIGHTS, MODULES = "adapter_config.json", "adapter.safetensors", "modules"
# Kind -> the fields of the library's BnConfig that say which one an adapter is.
FLAGS = {
    name: {
        "mh_adapter": ATTENTION in kind.places,
        "output_adapter": OUTPUT in kind.places,
        "is_parallel": kind.reads == "input",
        "original_ln_before": kind.reads == "sum",
    }
    for name, kind in KINDS.items()
}
# Fields that change what is computed -> the values that mean what is computed here.
ONLY: dict[str, tuple[Any, ...]] = {
    "original_ln_after": (True,),
    "residual_before_ln": (True,),
    "ln_after": (False,),
    "use_gating": (False,),
    "inv_adapter": (None,),
    "cross_adapter": (False,),
    "leave_out": ([], None),
    "phm_layer": (False,),
    "stochastic_depth": (0.0, None),
}
KEY = re.compile(
    rf"(.*\.(?:{ATTENTION}|{OUTPUT}))\.adapters\.([^.]+)\."
    r"(adapter_down|adapter_up|adapter_norm_before)(?:\.(\d))?\.(weight|bias)"
)


def _on_disk(name: str, adapter: str, norm: bool) -> list[str]:
    """Return the library's names of a tensor; a norm stands before the layer down, and in it."""
    name = re.sub(rf"\.({ATTENTION}|{OUTPUT})\.", rf".\1.adapters.{adapter}.", name)
    return (
        [name, name.replace("adapter_norm_before", "adapter_down.0")]
        if ".adapter_norm_before." in name
        else [name.replace("adapter_down", f"adapter_down.{int(norm)}")]
    )


def save_adapter(
    model: Model,
    params: Mapping[str, Any],
    directory: str | Path,
    name: str = "default",
    *,
    compare_base: bool = True,
) -> None:
    """Write the bottleneck adapter of a tree, and what else of it was trained.

    name: the adapter's, as the `adapters` library calls it. compare_base: as for `save_peft`. The
    directory appears whole or not at all. `load_adapter` gives the same tree again, to the bit.
    Raises `UserError` where the tree holds no adapter, and for a leaf that was trained but would be
    left out.
    """
    adapter, flat = model.adapter, flatten(params)
    held = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
    if adapter is None or not held:
        raise UserError(
            "There is no bottleneck adapter to save. LoRA is saved by save_peft, a model that was "
            "trained in full by save_pretrained."
        )
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(
            f"The adapter's name {name!r} stands in tensors' names: take letters, _, -."
        )
    others = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    without = dataclasses.replace(
        model, adapter=None, lora=LoRA(targets=(), modules_to_save=adapter.modules_to_save)
    )
    tensors: dict[str, np.ndarray] = {}
    places = disk_places(model, {path: leaf.shape for path, leaf in held.items()})
    for tensor, value in disk_tensors(held, places).items():
        tensors |= dict.fromkeys(_on_disk(tensor, name, adapter.norm), value)
    config = {
        "config": {
            "architecture": None,
            **FLAGS[adapter.kind],
            **{field: values[0] for field, values in ONLY.items()},
            "reduction_factor": adapter.reduction_factor,
            "non_linearity": adapter.non_linearity,
            "scaling": float(adapter.scaling or 0),
            "ln_before": adapter.norm,
            "dropout": adapter.dropout,
            "init_weights": adapter.init_weights,
            "adapter_residual_before_ln": False,
        },
        "hidden_size": model.config.text.hidden_size,
        "model_class": None,
        "model_name": model.source.repo if model.source else None,
        "model_type": model.hf_config["model_type"],
        "name": name,
        "version": "adapters.1.3.0",  # the release whose layout this is
    }
    with whole_directory(directory, ADAPTER_PARTS) as folder:
        if adapter.modules_to_save or any(is_added(path) for path in flat):
            save_peft(without, others, folder / MODULES, compare_base=compare_base)
        elif compare_base and base_is_here(model):
            check_left_out(without, others, base_places(model, others))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, config)


def is_adapter_directory(directory: str | Path) -> bool:
    """Return whether a directory holds a bottleneck adapter rather than PEFT's."""
    return (Path(directory).expanduser() / WEIGHTS).is_file()


def _adapter_of(config: Mapping[str, Any], directory: Path) -> Adapter:
    """Return what an adapter_config.json describes, or raise `UserError` naming what it is not."""
    fields = config.get("config")
    if not isinstance(fields, Mapping) or fields.get("architecture") is not None:
        raise UserError(
            f"The {CONFIG} in '{directory}' describes no bottleneck adapter. PEFT's adapters are "
            f"read by load_peft; of the `adapters` library only BnConfig is read."
        )
    for name, values in ONLY.items():
        if name in fields and fields[name] not in values:
            raise UserError(
                f"The adapter in '{directory}' sets {name}={fields[name]!r}, which is not "
                f"supported: its logits would differ. Train one without."
            )
    flags = {name: bool(fields.get(name)) for name in FLAGS["houlsby"]}
    kinds = [kind for kind in KINDS if FLAGS[kind] == flags]
    numbers: dict[str, Any] = {
        "reduction_factor": fields.get("reduction_factor"),
        "scaling": fields.get("scaling", 1.0),
    }
    if not kinds or not all(map(is_number, numbers.values())):
        raise UserError(
            f"The adapter in '{directory}' has {numbers if kinds else flags}, which is none of "
            f"the kinds {', '.join(KINDS)} with one number each for reduction_factor and scaling."
        )
    return Adapter(
        kinds[0],
        numbers["reduction_factor"],
        fields.get("non_linearity"),
        numbers["scaling"],
        bool(fields.get("ln_before")),
        float(fields.get("dropout") or 0.0),
        fields.get("init_weights") or "bert",
    )


def check_tensors(
    file: Path, held: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `UserError` where a file's tensors are not those wanted, {name: shape}."""
    for name in sorted(held.keys() - wanted.keys()) or sorted(wanted.keys() - held.keys()):
        raise UserError(
            f"In '{file}' the tensor '{name}' "
            f"{'has no place in this model' if name in held else 'is missing'}"
            f"{nearest(name, wanted.keys() - held.keys())}. It is an adapter of another base, or "
            f"not whole; nothing was loaded."
        )
    for name, shape in wanted.items():
        if held[name].shape != shape:
            raise UserError(
                f"'{file}' holds '{name}' with the shape {list(held[name].shape)}; this model and "
                f"the adapter's reduction_factor ask for {list(shape)}. It was made for another "
                f"base."
            )


def load_either(
    model: Model, params: Mapping[str, Any], directory: str | Path
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with the adapter of a directory, a bottleneck or PEFT's."""
    read = load_adapter if is_adapter_directory(directory) else load_peft
    return read(model, params, directory)


def load_adapter(
    model: Model, params: Mapping[str, Any], directory: str | Path
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with a bottleneck adapter's files in place.

    Several go onto one base each by itself: see `with_adapter`. Raises `UserError` for what is not
    supported, another base's adapter, a tensor that is missing or has no place, and for a tree that
    holds an adapter or LoRA already.
    """
    directory, file = adapter_weights(directory, WEIGHTS)
    adapter = _adapter_of(read_json(directory / CONFIG), directory)
    found: dict[str, np.ndarray] = {}
    for key, tensor in read_tensors(file):
        parts = KEY.fullmatch(key)
        if parts is None:
            raise UserError(f"'{file}' holds '{key}', which is not a bottleneck adapter's tensor.")
        module, _, part, number, leaf = parts.groups()
        if part == "adapter_down" and number == "0" and adapter.norm:
            continue  # the norm once more
        found[current_name(model, f"{module}.{part}.{leaf}")] = tensor
    components = tuple(
        model.component(f"{stack}/kernel")
        for stack in model.config.stacks
        if any(name.startswith(f"{stack.replace('/', '.')}.") for name in found)
    )
    adapter = dataclasses.replace(adapter, components=components or adapter.components)
    wanted = shapes(model, adapter)
    places = disk_places(model, wanted)
    check_tensors(file, found, {name: place.shape for name, place in places.items()})
    leaves = {path: np.zeros(shape, np.float32) for path, shape in wanted.items()}
    for name, place in places.items():
        leaves[place.path][place.index] = to_tree(place.path, found[name])
    flat = flatten(params)
    check_bare(flat)
    params = unflatten(flat | {path: jnp.asarray(leaf) for path, leaf in leaves.items()})
    if (directory / MODULES).is_dir():
        model, params = load_peft(model, params, directory / MODULES)
        adapter = dataclasses.replace(adapter, modules_to_save=model.modules_to_save)
    model = dataclasses.replace(model, adapter=adapter, lora=None)
    return with_adapter_files(model, directory), dict(params)
