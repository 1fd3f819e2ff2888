"""Reads PEFT adapter directories, in every naming layout of transformers."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.adapters.added_tokens import HEAD, add_tokens
from vlm_jax.adapters.modules_to_save import (
    base_places,
    module_names,
    owners,
    peft_modules,
    saved_modules,
)
from vlm_jax.adapters.targets import (
    is_uniform,
    key_regex,
    pattern_value,
    scales,
    slots,
)
from vlm_jax.distributed.processes import to_host
from vlm_jax.errors import UserError
from vlm_jax.files.limits import check_patterns
from vlm_jax.hub.peft import module_homes
from vlm_jax.hub.peft_config import read_config
from vlm_jax.hub.peft_files import (
    Key,
    Matrices,
    another_base,
    is_same,
    no_home,
    parse_key,
    stacked,
)
from vlm_jax.hub.tensors import read_header, read_tensors
from vlm_jax.hub.unread_weights import PEFT_WEIGHTS, adapter_weights
from vlm_jax.model import Model, with_adapter_files
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.names import Place, current_name, embedding_name, is_unused, to_tree
from vlm_jax.trees import flatten, unflatten

UNKNOWN = "It belongs to another base model or to an unknown layout; nothing was loaded."


def load_peft(
    model: Model, params: Mapping[str, Any], directory: str | Path
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with the adapter of a PEFT directory in place.

    Key names of every transformers layout are read. A key without a home in the model is an
    error, never a warning, and so is a matrix without its partner, or a copy of a base's weight
    that differs from the base's; layers of a stack that the adapter leaves out get zero matrices,
    which stay zero, as what a layer's rank lacks of the largest of its stack. Loaded leaves are
    float32. `save_peft` writes the same tensors again.
    """
    flat = flatten(params)
    if any(is_lora(path) for path in flat):
        raise UserError("These parameters hold LoRA factors already; merge them first.")
    directory, file = adapter_weights(directory, PEFT_WEIGHTS)
    config, lora = read_config(directory)
    end = f"{embedding_name(model).split('.')[-1]}.weight"
    rows = (entry.shape[0] for key, entry in read_header(file).items() if key.endswith(end))
    more = max(rows, default=0) - model.config.text.vocab_size
    if more > 0:  # the adapter was trained with more tokens than the base has
        model, params = add_tokens(model, params, more)
        flat = flatten(params)
    homes, places = module_homes(model, flat), base_places(model, params)
    read = {*places, f"{HEAD}.weight"} if model.config.text.tied else places
    matrices: Matrices = {}
    called: dict[str, str] = {}  # adapted modules -> what the file calls them
    full: dict[str, np.ndarray] = {}  # whole tensors, by their name in the current layout
    biases: dict[str, np.ndarray] = {}
    unused: dict[str, np.ndarray] = {}
    for key, tensor in read_tensors(file):
        parsed = parse_key(key)
        name = current_name(model, parsed.name)
        _check_kind(model, directory, key, parsed._replace(name=name), config)
        if parsed.leaf is not None:
            if name not in homes:
                _check_adaptable(model, directory, key, name, places)
                raise no_home(directory, key, name, homes, UNKNOWN)
            called[name] = parsed.name
            matrices.setdefault(name, {})[parsed.leaf] = tensor.T
        elif name.endswith(".bias") and name in places and lora.bias != "none":
            biases[name] = tensor  # an adapted module's lies below it, as base_layer.bias
        elif parsed.copy and name in places:
            if not _is_base(tensor, flat, places[name]):
                raise another_base(directory, key, name, config)
        elif not parsed.copy and name in read:
            full[name] = tensor
        elif not parsed.copy and is_unused(model, name):
            unused[name] = tensor
        else:
            raise no_home(directory, key, name, places, UNKNOWN)
    _check_tied(model, flat, places, full, config, directory)
    full = {name: tensor for name, tensor in full.items() if name in places}  # not the tied head
    fresh: dict[str, Any] = {}
    for name, tensor in full.items():
        place = places[name]
        added, count = f"{place.path.rsplit('/', 1)[0]}/added", place.shape[0]
        if added in flat:
            fresh[added], full[name] = to_tree(place.path, tensor[count:]), tensor[:count]
    names = _saved_names(model, params, places, full, config)
    held = {**saved_modules(model, params, names).places, **{n: places[n] for n in biases}}
    for name, tensor in (full | biases).items():
        place = places[name]
        if tensor.shape != place.shape:
            raise UserError(
                f"The tensor '{name}' in '{file}' has the shape {list(tensor.shape)}; the "
                f"base has {list(place.shape)}. Is it an adapter of another model?"
            )
        if name in held:
            if place.path not in fresh:
                fresh[place.path] = np.array(to_host(flat[place.path]), np.float32)
            fresh[place.path][place.index] = to_tree(place.path, tensor)
    bases = {homes[module].prefix for module in called}
    lora = dataclasses.replace(
        lora,
        modules_to_save=names,
        rank_pattern=_pattern(lora.rank_pattern, "rank_pattern", called),
        alpha_pattern=_pattern(lora.alpha_pattern, "alpha_pattern", called),
        left_out=tuple(m for m, home in homes.items() if home.prefix in bases and m not in called),
    )
    own = {base: slots(model, lora, f"{base}lora_A") for base in sorted(bases)}
    ranks = {slot.module: slot.rank for slots_of in own.values() for slot in slots_of}
    fresh |= stacked(matrices, homes, ranks, lora.dora, file)
    fresh |= {f"{base}lora_scale": scales(s) for base, s in own.items() if not is_uniform(lora, s)}
    new = {**flat, **{path: jnp.asarray(leaf) for path, leaf in fresh.items()}}
    model = dataclasses.replace(model, lora=lora, unused={**model.unused, **unused})
    return with_adapter_files(model, directory), unflatten(dict(sorted(new.items())))


def _pattern(pattern: Mapping[str, Any], name: str, called: Mapping[str, str]) -> dict[str, Any]:
    """Return a rank_pattern or alpha_pattern that means for our names what it means for the file's.

    called: adapted modules -> what the file calls them, which may be an older layout of names.
    """
    check_patterns(
        list(pattern),
        [*called, *called.values()],
        f"key of {name} in adapter_config.json",
        key_regex,
    )
    values = {module: pattern_value(pattern, file_name) for module, file_name in called.items()}
    if all(pattern_value(pattern, module) == value for module, value in values.items()):
        return dict(pattern)
    return {module: value for module, value in values.items() if value is not None}


def _saved_names(
    model: Model,
    params: Mapping[str, Any],
    places: Mapping[str, Place],
    full: Mapping[str, np.ndarray],
    config: Mapping,
) -> tuple[str, ...]:
    """Return `LoRA.modules_to_save` of an adapter that holds the tensors `full`.

    Names that mean no module here hold no tensor, in PEFT neither. Embeddings that peft saved
    without naming them are named where they differ from the base's.
    """
    modules = module_names(model, params)
    given = config.get("modules_to_save") or ()
    found = {name: peft_modules(model, modules, name) for name in given}
    projector = set(model.config.projectors)
    whole = projector <= set(itertools.chain(*found.values()))
    names = [
        "projector" if whole and projector & set(meant) else name
        for name, meant in found.items()
        if meant
    ]
    held, flat = saved_modules(model, params, names).places, flatten(params)
    differing = [
        owners(name)[-1]
        for name, tensor in full.items()
        if name not in held and not _is_base(tensor, flat, places[name])
    ]
    return tuple(dict.fromkeys((*names, *differing)))


def _is_base(tensor: np.ndarray, flat: Mapping[str, Any], place: Place) -> bool:
    """Return whether a tensor is the base's own."""
    return tensor.shape == place.shape and is_same(
        to_tree(place.path, tensor), to_host(flat[place.path][place.index])
    )


def _check_kind(
    model: Model, directory: Path, key: str, parsed: Key, config: Mapping[str, Any]
) -> None:
    """Raise for DoRA on an embedding and LoRA on a head tied to it: none is held here."""
    tied, tying = model.config.text.tied, config.get("ensure_weight_tying")
    embedding = parsed.leaf and parsed.name == embedding_name(model)
    head = (parsed.leaf or parsed.copy) and parsed.name.startswith(HEAD)
    for holds, what in (
        (embedding and parsed.leaf == "lora_magnitude", "DoRA on an embedding"),
        (
            embedding and tied and tying,
            "LoRA on an embedding and a head that are tied to each other (ensure_weight_tying)",
        ),
        (head and tied, "LoRA on a head that is tied to the embedding"),
    ):
        if holds:
            raise UserError(
                f"The adapter in '{directory}' holds '{key}', that is {what}, which is not "
                f"supported. Merge it with peft into a checkpoint (untied where the head is "
                f"adapted), or train without."
            )


def _check_tied(
    model: Model, flat: Mapping[str, Any], places: Mapping[str, Place],
    full: Mapping[str, np.ndarray], config: Mapping, directory: Path,
) -> None:  # fmt: skip
    """Refuse an embedding and a head that are one here and two in the adapter."""
    if not model.config.text.tied:
        return
    name = f"{embedding_name(model)}.weight"
    embedding, head = full.get(name), full.get(f"{HEAD}.weight")
    what = f"a head, '{HEAD}.weight', that differs from the embedding"
    if head is not None and embedding is not None:
        tied = np.array_equal(head, embedding)
    elif head is not None:
        tied = _is_base(head, flat, places[name])
    else:
        what = "a trained embedding but not ensure_weight_tying, so peft leaves the head as it is"
        tied = (
            embedding is None
            or bool(config.get("ensure_weight_tying"))
            or _is_base(embedding, flat, places[name])
        )
    if not tied:
        raise UserError(
            f"The adapter in '{directory}' holds {what}; here the head is tied to the embedding. "
            f"Merge it with peft into an untied checkpoint."
        )


def _check_adaptable(
    model: Model, directory: Path, key: str, module: str, places: Mapping[str, Place]
) -> None:
    """Raise for LoRA on a module that the base has but that no matrices are held of here."""
    place = places.get(f"{module}.weight")
    if place is not None:
        convolution = place.path in model.config.disk_shapes
        what = "a convolution, the patch embedding" if convolution else "no linear layer"
        raise UserError(
            f"The adapter in '{directory}' holds '{key}', LoRA on '{module}', which is {what}: "
            f"that is not supported. Merge it with peft into a checkpoint (merge_and_unload, "
            f"save_pretrained) and give that as the model; or train with a regex as "
            f"target_modules that excludes '{module.split('.')[-1]}' of this module."
        )
