"""Reads PEFT adapter directories, in every naming layout of transformers."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.adapters.added_tokens import EMBEDDING, HEAD, add_tokens
from vlm_jax.adapters.modules_to_save import (
    base_places,
    module_names,
    owners,
    peft_module,
    saved_modules,
)
from vlm_jax.adapters.targets import (
    EMBEDDING_LEAF,
    PROJECTOR_NAMES,
    Slot,
    adaptable,
    is_uniform,
    pattern_key,
    scales,
    slots,
    whole,
)
from vlm_jax.distributed.processes import to_host
from vlm_jax.errors import UserError, nearest
from vlm_jax.files.limits import check_patterns
from vlm_jax.hub.peft import EMBEDDING_TENSOR, NO_TARGETS, PREFIX, layer_modules
from vlm_jax.hub.peft_config import read_config
from vlm_jax.hub.tensors import open_tensors, read_tensors
from vlm_jax.hub.unread_weights import PEFT_WEIGHTS, check_adapter
from vlm_jax.model import Model, with_adapter_files
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.models.methods import LoRA
from vlm_jax.names import Place, current_name, is_unused, to_tree
from vlm_jax.trees import flatten, unflatten

# A module, and A or B of its matrices; none of them: its norms of columns.
LORA_KEY = re.compile(
    r"(.*)\.lora_(?:(A|B)(?:\.default)?\.weight|embedding_(A|B)(?:\.default)?"
    r"|magnitude_vector(?:\.default)?(?:\.weight)?)"
)


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
    directory = Path(directory).expanduser()
    flat = flatten(params)
    if any(is_lora(path) for path in flat):
        raise UserError("These parameters hold LoRA factors already; merge them first.")
    if not directory.is_dir():
        raise UserError(f"There is no adapter directory '{directory}'.")
    inside = sorted(path.parent.name for path in directory.glob("*/adapter_config.json"))
    if inside and not (directory / "adapter_config.json").exists():
        raise UserError(
            f"'{directory}' is not an adapter, but holds some: {', '.join(inside[:6])}. "
            f"Give one of them, such as '{directory / inside[0]}'."
        )
    config = read_config(directory)
    file = directory / PEFT_WEIGHTS
    check_adapter(directory, (PEFT_WEIGHTS,))
    if not file.exists():
        raise UserError(
            f"'{directory}' holds no adapter_model.safetensors. A pickle adapter "
            f"(adapter_model.bin) is not read: load it with peft and save it again."
        )
    new_tokens = _new_tokens(model, file)
    if new_tokens:  # the adapter was trained with more tokens than the base has
        model, params = add_tokens(model, params, new_tokens)
        flat = flatten(params)
    kernels = layer_modules(model, adaptable(model, params))
    places = base_places(model, params)
    matrices: dict[str, dict[int | None, np.ndarray]] = {}
    called: dict[str, str] = {}  # adapted modules -> what the file calls them
    full: dict[str, np.ndarray] = {}  # whole tensors, by their name in the current layout
    biases: dict[str, np.ndarray] = {}
    unused: dict[str, np.ndarray] = {}
    keeps_biases = (config.get("bias") or "none") != "none"
    tying = bool(config.get("ensure_weight_tying"))
    for key, tensor in read_tensors(file):
        name = key.removeprefix(PREFIX)
        _check_kind(model, directory, key, current_name(model, name), tying)
        lora_key = LORA_KEY.fullmatch(name)
        if lora_key:
            module = current_name(model, lora_key[1])
            matrix = f"lora_{lora_key[2] or lora_key[3] or 'magnitude'}"
            if module not in kernels:
                _check_adaptable(model, directory, key, module, places)
                raise _unmatched(directory, key, module, kernels)
            path, layer = kernels[module]
            called[module] = lora_key[1]
            base = path.rsplit("/", 1)[0]
            matrices.setdefault(f"{base}/{matrix}", {})[layer] = tensor.T
            continue
        plain = current_name(model, re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", name))
        copy_of = current_name(model, re.sub(r"\.(base_layer|original_module)(?=\.)", "", name))
        if copy_of.endswith(".bias") and copy_of in places and keeps_biases:
            biases[copy_of] = tensor  # an adapted module's lies below it, as base_layer.bias
        elif copy_of != plain:  # peft writes embeddings so, where they or the head are adapted
            if copy_of not in places:
                raise _unmatched(directory, key, copy_of, places)
            if not _same(tensor, flat, places[copy_of]):
                raise UserError(
                    f"The adapter in '{directory}' holds '{key}', a copy of the base's "
                    f"'{copy_of}' whose values or shape are not those of the base loaded here: "
                    f"it was made on another base, and its logits would differ. Load the base "
                    f"that it names, {config.get('base_model_name_or_path')!r}."
                )
        elif plain in places or (plain == f"{HEAD}.weight" and model.config.text.tied):
            full[plain] = tensor
        elif is_unused(model, plain):
            unused[plain] = tensor
        else:
            raise _unmatched(directory, key, plain, places)
    _check_tied(model, flat, places, full, config, directory)
    names = _saved_names(model, params, full, config)
    held = {**saved_modules(model, params, names).places, **{n: places[n] for n in biases}}
    full |= biases
    fresh: dict[str, np.ndarray] = {}
    for name, tensor in full.items():
        if name not in places:
            continue  # the tied head, which is the embedding once more
        place = places[name]
        added = f"{place.path.rsplit('/', 1)[0]}/added"
        if added in flat:
            old = place.shape[0]
            fresh[added] = to_tree(place.path, tensor[old:])
            tensor = tensor[:old]
        if tensor.shape != place.shape:
            raise UserError(
                f"The tensor '{name}' in '{file}' has the shape {list(tensor.shape)}; the "
                f"base has {list(place.shape)}. Is it an adapter of another model?"
            )
        if name in held:
            if place.path not in fresh:
                fresh[place.path] = np.array(to_host(flat[place.path]), np.float32)
            fresh[place.path][... if place.layer is None else place.layer] = to_tree(
                place.path, tensor
            )
    new = {**flat, **{path: jnp.asarray(leaf) for path, leaf in fresh.items()}}
    targets = config.get("target_modules") or ()
    if targets == NO_TARGETS:
        targets = ()
    bases = {path.rsplit("/", 1)[0] for path in matrices}
    lora = LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        modules_to_save=names,
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        rank_pattern=_pattern(config, "rank_pattern", called),
        alpha_pattern=_pattern(config, "alpha_pattern", called),
        bias=config.get("bias") or "none",
        left_out=tuple(
            module
            for module, (path, _) in kernels.items()
            if path.rsplit("/", 1)[0] in bases and module not in called
        ),
    )
    if lora.dora:
        _check_norms(matrices, file)
    for path, layers in matrices.items():
        own = slots(model, lora, path)
        new[path] = jnp.asarray(_stacked(flat, path, layers, matrices, own, file))
        if not is_uniform(lora, own):
            new[f"{path.rsplit('/', 1)[0]}/lora_scale"] = scales(own)
    ordered = {path: new[path] for path in sorted(new)}
    unused = {**model.unused, **unused}
    model = dataclasses.replace(model, lora=lora, unused=unused)
    return with_adapter_files(model, directory), unflatten(ordered)


def _pattern(config: Mapping, name: str, called: Mapping[str, str]) -> dict[str, Any]:
    """Return a rank_pattern or alpha_pattern that means for our names what it means for the file's.

    called: adapted modules -> what the file calls them, which may be an older layout of names.
    """
    pattern = config.get(name) or {}
    texts = [name for pair in called.items() for name in pair]
    check_patterns(list(pattern), texts, f"key of {name} in adapter_config.json", whole)
    keys = {module: pattern_key(pattern, file_name) for module, file_name in called.items()}
    if all(pattern_key(pattern, module) == key for module, key in keys.items()):
        return dict(pattern)
    return {module: pattern[key] for module, key in keys.items() if key is not None}


def _saved_names(
    model: Model, params: Mapping[str, Any], full: Mapping[str, np.ndarray], config: Mapping
) -> tuple[str, ...]:
    """Return `LoRA.modules_to_save` of an adapter that holds the tensors `full`.

    Names that mean no module here hold no tensor, in PEFT neither. Embeddings that peft saved
    without naming them are named where they differ from the base's.
    """
    places = base_places(model, params)
    modules = module_names(model, params)
    names = [
        "projector" if name in PROJECTOR_NAMES else name
        for name in config.get("modules_to_save") or ()
        if peft_module(model, modules, name) is not None
    ]
    held = saved_modules(model, params, names).places
    flat = flatten(params)
    for name, tensor in full.items():
        if name not in places or name in held:
            continue
        added = f"{places[name].path.rsplit('/', 1)[0]}/added" in flat
        if not _same(tensor[: places[name].shape[0]] if added else tensor, flat, places[name]):
            names.append(owners(name)[-1])
    return tuple(dict.fromkeys(names))


def _same(tensor: np.ndarray, flat: Mapping[str, Any], place: Place) -> bool:
    """Return whether a tensor is the base's own, in the narrower dtype of the two."""
    if tensor.shape != place.shape:
        return False
    layer = ... if place.layer is None else place.layer
    leaf, other = to_host(flat[place.path][layer]), to_tree(place.path, tensor)
    kind = other.dtype if other.dtype.itemsize < leaf.dtype.itemsize else leaf.dtype
    return np.array_equal(leaf.astype(kind), other.astype(kind))


def _check_kind(model: Model, directory: Path, key: str, name: str, tying: bool) -> None:
    """Raise for DoRA on an embedding and LoRA on a head tied to it: none is held here."""
    what = None
    embedding = EMBEDDING_TENSOR.removesuffix(".weight")
    if name.startswith(f"{embedding}.lora_magnitude"):
        what = "DoRA on an embedding"
    elif tying and name.startswith(f"{embedding}.lora_") and model.config.text.tied:
        what = "LoRA on an embedding and a head that are tied to each other (ensure_weight_tying)"
    elif re.match(rf"{HEAD}\.(lora_|base_layer\.)", name) and model.config.text.tied:
        what = "LoRA on a head that is tied to the embedding"
    if what is not None:
        raise UserError(
            f"The adapter in '{directory}' holds '{key}', that is {what}, which is not supported. "
            f"Merge it with peft into a checkpoint (untied where the head is adapted), or train "
            f"without."
        )


def _check_tied(
    model: Model, flat: Mapping[str, Any], places: Mapping[str, Place],
    full: Mapping[str, np.ndarray], config: Mapping, directory: Path,
) -> None:  # fmt: skip
    """Refuse an embedding and a head that are one here and two in the adapter."""
    if not model.config.text.tied:
        return
    embedding, head = full.get(EMBEDDING_TENSOR), full.get(f"{HEAD}.weight")
    if head is not None:
        place = places[EMBEDDING_TENSOR]
        one = np.array_equal(head, embedding) if embedding is not None else _same(head, flat, place)
        if not one:
            raise UserError(
                f"The adapter in '{directory}' holds a head, 'lm_head.weight', that differs from "
                f"the embedding; here the head is tied to the embedding. Merge it with peft into "
                f"an untied checkpoint."
            )
    elif embedding is not None and not config.get("ensure_weight_tying"):
        if not _same(embedding, flat, places[EMBEDDING_TENSOR]):
            raise UserError(
                f"The adapter in '{directory}' holds a trained embedding but not "
                f"ensure_weight_tying, so peft leaves the head at the base's values; here the head "
                f"is tied to the embedding. Merge it with peft into an untied checkpoint."
            )


def _new_tokens(model: Model, file: Path) -> int:
    """Return how many more tokens an adapter's embedding has than the base."""
    with open_tensors(file) as handle:
        for key in handle.keys():
            if key.endswith("embed_tokens.weight"):
                rows = int(handle.get_slice(key).get_shape()[0])
                return max(0, rows - model.config.text.vocab_size)
    return 0


def _check_adaptable(
    model: Model, directory: Path, key: str, module: str, places: Mapping[str, Place]
) -> None:
    """Raise for LoRA on a module that the base has but that no matrices are held of here."""
    place = places.get(f"{module}.weight")
    if place is None:
        return
    convolution = place.path in model.family.disk_shapes(model.config)
    what = "a convolution, the patch embedding" if convolution else "no linear layer"
    suffix = module.split(".")[-1]
    raise UserError(
        f"The adapter in '{directory}' holds '{key}', LoRA on '{module}', which is {what}: that is "
        f"not supported. Merge it with peft into a checkpoint (merge_and_unload, save_pretrained) "
        f"and give that as the model; or train with a regex as target_modules that excludes "
        f"'{suffix}' of this module."
    )


def _unmatched(directory: Path, key: str, name: str, known: Mapping[str, Any]) -> UserError:
    return UserError(
        f"The adapter in '{directory}' holds '{key}', for which this model has no place"
        f"{nearest(name, known)}. It belongs to another base model or to an unknown layout; "
        f"nothing was loaded."
    )


def _check_norms(matrices: Mapping[str, Any], file: Path) -> None:
    """Raise for DoRA without the norms of some layer."""
    for path in [path for path in matrices if path.endswith("/lora_A")]:
        base = path.removesuffix("/lora_A")
        if matrices.get(f"{base}/lora_magnitude", {}).keys() != matrices[path].keys():
            raise UserError(
                f"'{file}' is DoRA's (use_dora), but some layer of '{base}' lacks its "
                f"lora_magnitude_vector."
            )


def _stacked(
    flat: Mapping[str, Any], path: str, layers: dict[int | None, np.ndarray],
    matrices: Mapping[str, Any], held: list[Slot], file: Path,
) -> np.ndarray:  # fmt: skip
    """Return one leaf of the given layers, checked against the base's kernel."""
    base, matrix = path.rsplit("/", 1)
    partner = f"{base}/{'lora_B' if matrix == 'lora_A' else 'lora_A'}"
    if matrices.get(partner, {}).keys() != layers.keys():
        raise UserError(f"'{file}' holds {matrix} of '{base}' without its partner in some layer.")
    kernel = flat[EMBEDDING_LEAF if base == EMBEDDING else f"{base}/kernel"]
    *stack, inputs, outputs = kernel.shape

    def shape(rank: int) -> tuple[int, ...]:
        return {"lora_A": (inputs, rank), "lora_B": (rank, outputs)}.get(matrix, (outputs,))

    ranks = {slot.layer: slot.rank for slot in held}
    for layer, tensor in layers.items():
        if tensor.shape != shape(ranks[layer]):
            raise UserError(
                f"'{file}' holds {matrix} of '{base}' with the shape {list(tensor.shape[::-1])}; "
                f"rank {ranks[layer]}, by r and rank_pattern in adapter_config.json, and the "
                f"base's kernel ask for {list(shape(ranks[layer])[::-1])}. It was made for another "
                f"rank or base, or one of the two files is another adapter's."
            )
    leaf = np.zeros((*stack, *shape(max(ranks.values()))), np.float32)
    for layer, tensor in layers.items():
        own = () if layer is None else (layer,)
        leaf[(*own, *(slice(size) for size in tensor.shape))] = tensor
    return leaf
