"""Writes the LoRA of a model as a PEFT adapter: its matrices, and what it holds in full.

Modules of modules_to_save have their plain tensor names behind PEFT's prefix; a bias of an adapted
module is `.base_layer.bias`. See peft_files.py for the matrices.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.adapters.added_tokens import HEAD, fold_added, is_added
from vlm_jax.adapters.lora_init import starts_from_kernel
from vlm_jax.adapters.modules_to_save import base_places, bias_places, module_names, saved_modules
from vlm_jax.adapters.targets import adaptable, embedding_leaf, layer_number, means, slots
from vlm_jax.errors import UserError
from vlm_jax.hub.base import base_is_here, base_tensors
from vlm_jax.hub.peft_config import NO_TARGETS, config_of
from vlm_jax.hub.peft_files import PREFIX, Home, Matrices, to_tensors, unstacked, write_adapter
from vlm_jax.model import Model
from vlm_jax.models.layers.linear import less_start
from vlm_jax.models.methods import LoRA
from vlm_jax.names import Place, disk_places, embedding_name, layers_of, to_disk, to_tree
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit


def module_homes(model: Model, params: Mapping[str, Any]) -> dict[str, Home]:
    """Return {Hugging Face module name: where its matrices lie} of what can be adapted."""
    flat, embedding = flatten(params), embedding_leaf(model)
    return {
        module: Home(path[: path.rindex("/") + 1], layer, flat[path].shape, path == embedding)
        for path in adaptable(model, flat)
        for module, layer in layers_of(model, path).items()
    }


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

    def fields(
        targets: str | list[str], exclude: str | None = None, layers: set[Any] | None = None
    ) -> dict[str, Any]:
        return {
            "target_modules": targets,
            "exclude_modules": exclude,
            "layers_to_transform": layers and sorted(layers),
            "layers_pattern": None,
        }

    if not adapted:  # modules_to_save alone; an empty list is an error to peft
        return fields(NO_TARGETS)
    suffixes = sorted({_suffix(module) for module in adapted})
    regex = rf".*(?:{model.config.VISION}|{model.config.PROJECTOR}).*"
    hit = {module for module in modules if means(tuple(suffixes), module)}
    numbers = {module: layer_number(module, ()) for module in hit}
    some = {numbers[module] for module in adapted} - {None}
    for layers, exclude in itertools.product((None, some), (None, regex)):
        left = {
            module
            for module in hit
            if (exclude is None or not means(exclude, module))
            and (layers is None or numbers[module] in layers)
        }
        if left == adapted:
            return fields(suffixes, exclude, layers)
    return fields(sorted(adapted))


def _matrices(
    model: Model, lora: LoRA, flat: Mapping[str, Any], homes: Mapping[str, Home]
) -> Matrices:
    """Return the matrices of every adapted module, without the zeros that fill up its stack.

    Raises `UserError` where the leaves have another rank or scale than `lora` says.
    """
    ranks: dict[str, int] = {}
    for path in [path for path in flat if path.endswith("/lora_A")]:
        base, held = path.rsplit("/", 1)[0], slots(model, lora, path)
        if isinstance(flat.get(f"{base}/kernel"), FourBit) and starts_from_kernel(lora.init):
            raise UserError(
                f"The 4-bit kernel '{base}' was quantized again for its initialisation "
                f"(init_lora_weights={lora.init!r}), and an adapter is for the base as it "
                f"is: no file could mean these logits. Write a whole checkpoint with "
                f"save_pretrained(merge=True); 'loftq' leaves the codes as they are."
            )
        rank = flat[path].shape[-1]
        scale = np.asarray(flat.get(f"{base}/lora_scale", lora.scale.scale(rank)), np.float32)
        stated = np.asarray([slot.scale for slot in held], np.float32)
        if rank != max(slot.rank for slot in held) or not np.all(scale == stated):
            raise UserError(
                f"The LoRA factors of '{base}' are of rank {rank} and of other scales than the "
                f"model's LoRA says (rank {lora.rank}, alpha {lora.alpha}), so the "
                f"file would mean other logits. Save with the model that add_lora, load_peft or "
                f"combine_peft_adapters returned beside these parameters."
            )
        ranks |= {slot.module: slot.rank for slot in held if slot.rank}
    found = unstacked(flat, homes, ranks)
    for own in found.values():
        if "start_A" in own:  # for the base as it is in its files: see lora_init.py
            pairs = less_start(*(own.pop(n) for n in ("lora_A", "lora_B", "start_A", "start_B")))
            own["lora_A"], own["lora_B"] = map(np.asarray, pairs)
    return found


def disk_tensors(flat: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """Return {name: tensor as on disk}; each leaf is fetched once."""
    held = {
        path: np.asarray(jax.device_get(flat[path]))
        for path in {place.path for place in places.values()}
    }
    return {
        name: np.ascontiguousarray(to_disk(place, held[place.path][place.index]))
        for name, place in places.items()
    }


def check_left_out(model: Model, flat: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    """Raise where a leaf that the adapter leaves out is not what the base's files hold.

    places: the tensors left out, by name. Quantized leaves never train.
    """
    read = base_tensors(model)
    fetched = functools.lru_cache(maxsize=1)(lambda path: np.asarray(jax.device_get(flat[path])))
    for name, place in places.items():  # the layers of a leaf follow one another
        path = place.path
        if not isinstance(flat[path], jax.Array | np.ndarray):
            continue
        leaf = fetched(path)
        expected = to_tree(path, read(name)).astype(model.dtype).astype(leaf.dtype)
        if not np.array_equal(expected, leaf[place.index]):
            raise UserError(
                f"The leaf '{path}' differs from the base checkpoint's tensor '{name}', but the "
                f"adapter would leave it out: it holds the LoRA factors and the modules of "
                f"LoRA.modules_to_save. If the leaf was trained, add a module that it lies in, "
                f"such as '{path.split('/')[-2]}', to modules_to_save, or write a whole checkpoint "
                f"with save_pretrained. If an earlier adapter was merged into it, save that model "
                f"with save_pretrained first, and adapt what vlm_jax.load reads of it."
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
    flat, lora = flatten(params), model.lora
    homes = module_homes(model, flat)
    matrices = {} if lora is None else _matrices(model, lora, flat, homes)
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
        left = places.keys() - saved.places.keys() - biases.keys()
        check_left_out(model, flat, {n: place for n, place in places.items() if n in left})
    tensors = to_tensors(matrices, homes)
    flat = fold_added(flat)
    resized = disk_places(model, {path: flat[path].shape for path in saved.leaves})
    held = disk_tensors(flat, {name: resized[name] for name in saved.places})
    for name, bias in disk_tensors(flat, biases).items():
        if name not in saved.places:
            module = name.removesuffix(".bias")
            tensors[f"{PREFIX}{module}{'.base_layer' * (module in matrices)}.bias"] = bias
    held |= {name: model.unused[name] for name in saved.unused if name in model.unused}
    missing = [name for name in saved.unused if name not in held]
    if missing:
        read = base_tensors(model)
        held |= {name: read(name) for name in missing}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in held.items()}
    config = config_of(
        _doubled(lora) if any(path.endswith("/start_A") for path in flat) else lora,
        {
            **_targets(model, module_names(model, params), set(matrices)),
            "modules_to_save": list(saved.names) or None,
        },
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.source.repo if model.source else None,
        revision=model.source.revision if model.source else None,
    )
    embedding = f"{embedding_name(model)}.weight"
    if model.config.text.tied and embedding in held:
        # Or peft would replace the embedding and leave the head at the base's values.
        config["ensure_weight_tying"] = True
        tensors[f"{PREFIX}{HEAD}.weight"] = tensors[f"{PREFIX}{embedding}"]
    write_adapter(directory, tensors, config)


def _doubled(lora: LoRA) -> LoRA:
    """Return a LoRA of twice the ranks, with alphas that keep the scales."""
    by = 2**0.5 if lora.rslora else 2
    return dataclasses.replace(
        lora,
        rank=lora.rank * 2,
        alpha=lora.alpha * by,
        rank_pattern={key: rank * 2 for key, rank in lora.rank_pattern.items()},
        alpha_pattern={key: alpha * by for key, alpha in lora.alpha_pattern.items()},
    )
