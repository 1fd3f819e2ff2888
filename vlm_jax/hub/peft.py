"""Writes PEFT adapter directories: adapter_config.json + adapter_model.safetensors.

A key is `base_model.model.<module>.lora_A.weight` of shape [R, in] (ours transposed), or
`.lora_magnitude_vector` of shape [out], of an embedding `.lora_embedding_A`, or for modules_to_save
the plain tensor name behind the same prefix; a bias of an adapted module is `.base_layer.bias`.
Of layers that differ in rank each has its own.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from vlm_jax.adapters.added_tokens import EMBEDDING, HEAD, fold_added, is_added
from vlm_jax.adapters.lora_init import FROM_KERNEL, kind_of
from vlm_jax.adapters.modules_to_save import base_places, bias_places, module_names, saved_modules
from vlm_jax.adapters.targets import layer_number, slots
from vlm_jax.errors import UserError
from vlm_jax.files.atomic import ADAPTER_PARTS, whole_directory, write_json
from vlm_jax.hub.base import base_is_here, base_tensors
from vlm_jax.model import Model
from vlm_jax.models.layers.linear import less_start
from vlm_jax.models.methods import LoRA
from vlm_jax.names import (
    Place,
    disk_places,
    module_name,
    stacked_layers,
    to_disk,
    to_tree,
)
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit

PREFIX = "base_model.model."
EMBEDDING_TENSOR = "model.language_model.embed_tokens.weight"
NO_TARGETS = "dummy-target-modules"  # peft's name for an adapter without matrices


def layer_modules(model: Model, paths: list[str]) -> dict[str, tuple[str, int | None]]:
    """Return {Hugging Face module name: (leaf path, layer)} of every layer of the leaves."""
    named = {}
    for path in paths:
        layers = stacked_layers(model, path)
        for layer in [None] if layers is None else range(layers):
            named[module_name(model, path, layer)] = (path, layer)
    return named


def _suffix(module: str) -> str:
    """Return the end of a module's name that says what it is; a bare number would name layers."""
    parts = module.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _targets(model: Model, modules: set[str], adapted: set[str]) -> dict[str, Any]:
    """Return the fields under which PEFT adapts exactly `adapted`.

    A list of suffixes where it can be, because that works in either layout of module names and
    in vLLM, with the vision side excluded by a regex and layers by their numbers; full module names
    otherwise. modules: all that the reference has.
    """
    fields: dict[str, Any] = {
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if not adapted:  # modules_to_save alone; an empty list is an error to peft
        return {"target_modules": NO_TARGETS, **fields}
    suffixes = sorted({_suffix(module) for module in adapted})
    regex = rf".*(?:{model.family.VISION}|{model.family.PROJECTOR}).*"
    hit = {m for m in modules if f".{m}".endswith(tuple(f".{suffix}" for suffix in suffixes))}
    numbers = {layer_number(module, ()) for module in adapted}
    some = None if None in numbers else sorted(n for n in numbers if n is not None)
    for layers in (None, some):
        for exclude in (None, regex):
            left = {module for module in hit if not (exclude and re.fullmatch(exclude, module))}
            if layers is not None:
                left = {module for module in left if layer_number(module, ()) in layers}
            if left == adapted:
                fields |= {"exclude_modules": exclude, "layers_to_transform": layers}
                return {"target_modules": suffixes, **fields}
    return {"target_modules": sorted(adapted), **fields}


# A leaf -> the end of its tensor's name in PEFT's files, of a layer and of an embedding.
MATRICES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
OF_EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}


def starts_from_kernel(lora: LoRA) -> bool:
    """Return whether matrices start with a part of their kernel, which these are left without."""
    return kind_of(lora.init)[0] in FROM_KERNEL


def _matrices(model: Model, flat: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Return {module: {"lora_A": [in, R], "lora_B": [R, out], ...}} of every adapted layer.

    Each has its own rank, without the zeros that fill up its stack. Raises `UserError` where the
    leaves have another rank or scale than the model's `LoRA` says.
    """
    assert model.lora is not None
    found = {}
    for path in [path for path in flat if path.endswith("/lora_A")]:
        base, held = path.rsplit("/", 1)[0], slots(model, model.lora, path)
        leaves = {
            name: np.asarray(jax.device_get(flat[f"{base}/{name}"]))
            for name in (*MATRICES, "start_A", "start_B")
            if f"{base}/{name}" in flat
        }
        if isinstance(flat.get(f"{base}/kernel"), FourBit) and starts_from_kernel(model.lora):
            raise UserError(
                f"The 4-bit kernel '{base}' was quantized again for its initialisation "
                f"(init_lora_weights={model.lora.init!r}), and an adapter is for the base as it "
                f"is: no file could mean these logits. Write a whole checkpoint with "
                f"save_pretrained(merge=True); 'loftq' leaves the codes as they are."
            )
        rank = leaves["lora_A"].shape[-1]
        scale = np.asarray(flat.get(f"{base}/lora_scale", model.lora.scale.scale(rank)), np.float32)
        said = np.asarray([slot.scale for slot in held], np.float32)
        if rank != max(slot.rank for slot in held) or not np.all(scale == said):
            raise UserError(
                f"The LoRA factors of '{base}' are of rank {rank} and of other scales than the "
                f"model's LoRA says (rank {model.lora.rank}, alpha {model.lora.alpha}), so the "
                f"file would mean other logits. Save with the model that add_lora, load_peft or "
                f"combine_peft_adapters returned beside these parameters."
            )
        for slot in held:
            if slot.rank:
                own = {n: x if slot.layer is None else x[slot.layer] for n, x in leaves.items()}
                own["lora_A"] = own["lora_A"][:, : slot.rank]
                own["lora_B"] = own["lora_B"][: slot.rank]
                if "start_A" in own:  # for the base as it is in its files: see lora_init.py
                    start_a, start_b = own.pop("start_A"), own.pop("start_B")
                    start = start_a[:, : slot.rank], start_b[: slot.rank]
                    own["lora_A"], own["lora_B"] = map(
                        np.asarray, less_start(own["lora_A"], own["lora_B"], *start)
                    )
                found[slot.module] = own
    return found


def _tensors(flat: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """Return {name: tensor as on disk}; each leaf is fetched once."""
    leaves = {place.path: None for place in places.values()}
    held = {path: np.asarray(jax.device_get(flat[path])) for path in leaves}
    slices = {
        name: held[place.path][... if place.layer is None else place.layer]
        for name, place in places.items()
    }
    return {n: np.ascontiguousarray(to_disk(places[n], leaf)) for n, leaf in slices.items()}


def check_left_out(model: Model, flat: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    """Raise where a leaf that the adapter leaves out is not what the base's files hold.

    places: the tensors left out, by name. Quantized leaves never train.
    """
    read = base_tensors(model)
    paths = dict.fromkeys(place.path for place in places.values())
    named: dict[str, list[str]] = {path: [] for path in paths}
    for name, place in places.items():
        named[place.path].append(name)
    for path, names in named.items():
        if not isinstance(flat[path], jax.Array | np.ndarray):
            continue
        leaf = np.asarray(jax.device_get(flat[path]))
        for name in names:
            layer = places[name].layer
            expected = to_tree(path, read(name)).astype(model.dtype).astype(leaf.dtype)
            if np.array_equal(expected, leaf[... if layer is None else layer]):
                continue
            module = path.split("/")[-2]
            raise UserError(
                f"The leaf '{path}' differs from the base checkpoint's tensor '{name}', but the "
                f"adapter would leave it out. If it was trained, add its module, such as "
                f"'{module}', to modules_to_save, or write a whole checkpoint with "
                f"save_pretrained. If an adapter was merged into it, save that model with "
                f"save_pretrained first, and adapt the saved one."
            )


def save_peft(
    model: Model, params: Mapping[str, Any], directory: str | Path, *, compare_base: bool = True
) -> None:
    """Write a PEFT adapter: the LoRA factors and the modules of `LoRA.modules_to_save`.

    `peft.PeftModel.from_pretrained(base, directory)` then gives our logits. Tensors of saved
    modules that nothing here reads are copied from the base's files. The directory appears whole or
    not at all; files of the same names in it are replaced.

    Args:
        model, params: of `add_lora` or `load_peft`, trained or not.
        directory: to write.
        compare_base: whether every leaf that the adapter leaves out is compared with the files that
            the model was loaded from, where these are still there; False where a training table has
            frozen them.

    Raises:
        UserError: where there is nothing to save, and for a leaf that was trained or merged but
            would be left out.
    """
    flat = flatten(params)
    lora = model.lora
    doubled = any(path.endswith("/start_A") for path in flat)
    matrices = {} if lora is None else _matrices(model, flat)
    added = [path.split("/")[-2] for path in flat if is_added(path)]
    if lora is None or not (matrices or lora.modules_to_save or added):
        raise UserError(
            "There is no adapter to save: these parameters hold no LoRA factors. For a model "
            "that was trained in full use save_pretrained."
        )
    # Added tokens: the whole resized matrix, as PEFT does.
    saved = saved_modules(model, params, (*lora.modules_to_save, *added))
    both = [module for module in matrices if f"{module}.weight" in saved.places]
    if both:
        raise UserError(
            f"'{both[0]}' has LoRA factors and is to be saved in full as well (modules_to_save, "
            f"or rows of added tokens), which PEFT cannot hold. Merge LoRA first, or remove "
            f"the module from modules_to_save."
        )
    places, biases = base_places(model, params), bias_places(model, params)
    if compare_base and base_is_here(model):
        inside = saved.places.keys() | biases.keys()
        left = {name: place for name, place in places.items() if name not in inside}
        check_left_out(model, flat, left)
    tensors: dict[str, np.ndarray] = {}
    for module, leaves in matrices.items():
        for name, leaf in leaves.items():
            ends = OF_EMBEDDING if module == EMBEDDING.replace("/", ".") else MATRICES
            tensors[f"{PREFIX}{module}.{ends[name]}"] = np.ascontiguousarray(leaf.T)
    flat = fold_added(flat)
    whole = disk_places(model, {path: flat[path].shape for path in saved.leaves})
    held = _tensors(flat, {name: whole[name] for name in saved.places})
    for name, bias in _tensors(flat, biases).items():
        if name not in saved.places:
            module = name.removesuffix(".bias")
            tensors[f"{PREFIX}{module}{'.base_layer' * (module in matrices)}.bias"] = bias
    held |= {name: model.unused[name] for name in saved.unused if name in model.unused}
    missing = [name for name in saved.unused if name not in held]
    if missing:
        read = base_tensors(model)
        held |= {name: read(name) for name in missing}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in held.items()}
    modules = module_names(model, params)
    times = 2 if doubled else 1  # and alphas by as much as keeps the scales
    by = 2**0.5 if doubled and lora.rslora else times
    # Only long-standing fields: older releases of peft refuse those they do not know.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": model.source.repo if model.source else None,
        "revision": model.source.revision if model.source else None,
        "inference_mode": True,
        "r": lora.rank * times,
        "lora_alpha": lora.alpha * by,
        "lora_dropout": lora.dropout,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **_targets(model, modules, set(matrices)),
        "modules_to_save": list(saved.names) or None,
        "rank_pattern": {key: rank * times for key, rank in lora.rank_pattern.items()},
        "alpha_pattern": {key: alpha * by for key, alpha in lora.alpha_pattern.items()},
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
    }
    if model.config.text.tied and EMBEDDING_TENSOR in held:
        # Or peft would replace the embedding and leave the head at the base's values.
        config["ensure_weight_tying"] = True
        tensors[f"{PREFIX}{HEAD}.weight"] = tensors[f"{PREFIX}{EMBEDDING_TENSOR}"]
    with whole_directory(directory, ADAPTER_PARTS) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)
