"""PEFT adapter directories in and out: adapter_config.json + adapter_model.safetensors.

A key is `base_model.model.<module>.lora_A.weight` of shape [R, in] (ours transposed), or for
modules_to_save the plain tensor name behind the same prefix.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vlm_jax.errors import UserError, nearest
from vlm_jax.hub.files import whole_directory, write_json
from vlm_jax.hub.load import open_tensors, read_json
from vlm_jax.lora import PROJECTOR_NAMES, is_lora, saved_modules
from vlm_jax.model import LoRA, Model
from vlm_jax.names import current_name, disk_places, module_name, stacked_layers, to_disk, to_tree
from vlm_jax.trees import flatten, unflatten
from vlm_jax.vocabulary import HEAD, add_tokens, fold_added, is_added

PREFIX = "base_model.model."
NO_TARGETS = "dummy-target-modules"  # peft's name for an adapter without matrices

# Fields of adapter_config.json that are read, or that change nothing here.
READ = frozenset(
    """peft_type r lora_alpha lora_dropout target_modules exclude_modules modules_to_save
    use_rslora base_model_name_or_path revision ensure_weight_tying""".split()
)
HARMLESS = frozenset(
    """task_type auto_mapping peft_version inference_mode layers_to_transform
    layers_pattern megatron_core qalora_group_size runtime_config ephemeral_gpu_offload""".split()
)

# Starts that leave the base's weights alone; PiSSA, OLoRA, CorDA and LoftQ change them.
HARMLESS_VALUES: dict[str, tuple] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


def _modules(model: Model, paths: list[str]) -> dict[str, tuple[str, int | None]]:
    """Return {Hugging Face module name: (leaf path, layer)} of every layer of the leaves."""
    named = {}
    for path in paths:
        layers = stacked_layers(model, path)
        for layer in [None] if layers is None else range(layers):
            named[module_name(model, path, layer)] = (path, layer)
    return named


def _targets(model: Model, kernels: list[str], adapted: list[str]) -> dict[str, Any]:
    """Return target_modules and exclude_modules under which PEFT adapts exactly `adapted`.

    A list of suffixes where it can be, because that works in either layout of module names and
    in vLLM, with the vision side excluded by a regex; full module names otherwise.
    """
    if not adapted:  # modules_to_save alone; an empty list is an error to peft
        return {"target_modules": NO_TARGETS, "exclude_modules": None}
    suffixes = sorted({path.split("/")[-2] for path in adapted})
    exclude = rf".*(?:{model.family.VISION}|{model.family.PROJECTOR}).*"
    hit = [path for path in kernels if path.split("/")[-2] in suffixes]
    outside = [path for path in hit if not re.fullmatch(exclude, module_name(model, path, 0))]
    if hit == adapted:
        return {"target_modules": suffixes, "exclude_modules": None}
    if outside == adapted:
        return {"target_modules": suffixes, "exclude_modules": exclude}
    return {"target_modules": sorted(_modules(model, adapted)), "exclude_modules": None}


def save_peft(model: Model, params: Mapping[str, Any], directory: str | Path) -> None:
    """Write a PEFT adapter: the LoRA matrices and the modules of `LoRA.modules_to_save`.

    `peft.PeftModel.from_pretrained(base, directory)` then gives our logits. The directory appears
    whole or not at all; files of the same names in it are replaced.
    Raises `UserError` where there is nothing to save.
    """
    flat = flatten(params)
    adapted = [f"{p.rsplit('/', 1)[0]}/kernel" for p in flat if p.endswith("/lora_A")]
    lora = model.lora
    if lora is None or not (adapted or lora.modules_to_save):
        raise UserError(
            "There is no adapter to save: these parameters hold no LoRA matrices. For a model "
            "that was trained in full use save_pretrained."
        )
    kernels = [path for path in flat if path.endswith("/kernel")]
    adapted = [path for path in kernels if path in set(adapted)]
    tensors: dict[str, np.ndarray] = {}
    for name, (path, layer) in _modules(model, adapted).items():
        base = path.rsplit("/", 1)[0]
        for matrix in ("lora_A", "lora_B"):
            leaf = np.asarray(jax.device_get(flat[f"{base}/{matrix}"]))
            leaf = leaf if layer is None else leaf[layer]
            tensors[f"{PREFIX}{name}.{matrix}.weight"] = np.ascontiguousarray(leaf.T)
    saved = saved_modules(model, params, lora)
    for path in [path for path in flat if is_added(path)]:  # the whole resized matrix, as PEFT does
        base = path.rsplit("/", 1)[0]
        kept = "embedding" if f"{base}/embedding" in flat else "kernel"
        saved[base.rsplit("/", 1)[-1]] = [f"{base}/{kept}"]
    flat = fold_added(flat)
    shapes = {path: flat[path].shape for paths in saved.values() for path in paths}
    for name, place in disk_places(model, shapes).items():
        leaf = np.asarray(jax.device_get(flat[place.path]))
        leaf = leaf if place.layer is None else leaf[place.layer]
        tensors[f"{PREFIX}{name}"] = np.ascontiguousarray(to_disk(place, leaf))
    # Only long-standing fields: older releases of peft refuse those they do not know.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": model.source.repo if model.source else None,
        "revision": model.source.revision if model.source else None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **_targets(model, kernels, adapted),
        "modules_to_save": sorted(saved) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": lora.rslora,
        "use_dora": False,
    }
    if model.config.text.tied and "embed_tokens" in saved:
        # Or peft would replace the embedding and leave the head at the base's values.
        config["ensure_weight_tying"] = True
        name = "model.language_model.embed_tokens.weight"
        tensors[f"{PREFIX}{HEAD}.weight"] = tensors[f"{PREFIX}{name}"]
    with whole_directory(directory) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)


def _read_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"'{directory}' holds a PEFT adapter of type {config.get('peft_type')!r}; only LORA "
            f"is supported."
        )
    for name, value in config.items():
        if name in READ | HARMLESS or not value or value in HARMLESS_VALUES.get(name, ()):
            continue
        raise UserError(
            f"The adapter in '{directory}' sets {name}={value!r} in adapter_config.json, which is "
            f"not supported: its logits would differ. Merge it with peft first, or train without."
        )
    return config


def load_peft(
    model: Model, params: Mapping[str, Any], directory: str | Path
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with the adapter of a PEFT directory in place.

    Key names of every transformers layout are read. A key without a home in the model is an
    error, never a warning, and so is a matrix without its partner; layers of a stack that the
    adapter leaves out get zero matrices, which stay zero. Loaded leaves are float32.
    """
    directory = Path(directory).expanduser()
    flat = flatten(params)
    if any(is_lora(path) for path in flat):
        raise UserError("These parameters hold LoRA matrices already; merge them first.")
    if not directory.is_dir():
        raise UserError(f"There is no adapter directory '{directory}'.")
    config = _read_config(directory)
    file = directory / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(
            f"'{directory}' holds no adapter_model.safetensors. A pickle adapter "
            f"(adapter_model.bin) is not read: load it with peft and save it again."
        )
    new_tokens = _new_tokens(model, file)
    if new_tokens:  # the adapter was trained with more tokens than the base has
        model, params = add_tokens(model, params, new_tokens)
        flat = flatten(params)
    convolutions = model.family.disk_shapes(model.config)
    kernels = _modules(
        model, [path for path in flat if path.endswith("/kernel") and path not in convolutions]
    )
    places = disk_places(model, {path: leaf.shape for path, leaf in flat.items()})
    matrices: dict[str, dict[int | None, np.ndarray]] = {}
    fresh: dict[str, np.ndarray] = {}
    with open_tensors(file) as handle:
        for key in handle.keys():
            tensor = handle.get_tensor(key)
            name = key.removeprefix(PREFIX)
            lora_key = re.fullmatch(r"(.*)\.lora_(A|B)(?:\.default)?\.weight", name)
            if lora_key:
                module, matrix = current_name(model, lora_key[1]), lora_key[2]
                if module not in kernels:
                    raise _homeless(directory, key, module, kernels)
                path, layer = kernels[module]
                base = path.rsplit("/", 1)[0]
                matrices.setdefault(f"{base}/lora_{matrix}", {})[layer] = tensor.T
                continue
            full = current_name(model, name.replace(".modules_to_save.default", ""))
            if full == f"{HEAD}.weight" and model.config.text.tied:
                continue  # the embedding once more
            if full not in places:
                raise _homeless(directory, key, full, places)
            place = places[full]
            added = f"{place.path.rsplit('/', 1)[0]}/added"
            if added in flat:
                old = place.shape[0]
                fresh[added] = to_tree(place.path, tensor[old:])
                tensor = tensor[:old]
            if tensor.shape != place.shape:
                raise UserError(
                    f"The tensor '{key}' in '{file}' has the shape {list(tensor.shape)}; the "
                    f"base has {list(place.shape)}. Is it an adapter of another model?"
                )
            if place.path not in fresh:
                fresh[place.path] = np.array(flat[place.path], np.float32)
            fresh[place.path][... if place.layer is None else place.layer] = to_tree(
                place.path, tensor
            )
    rank = int(config["r"])
    new = {**flat, **{path: jnp.asarray(leaf) for path, leaf in fresh.items()}}
    for path, layers in matrices.items():
        new[path] = jnp.asarray(_stacked(model, flat, path, layers, matrices, rank, file))
    modules = tuple(config.get("modules_to_save") or ())
    modules = tuple("projector" if name in PROJECTOR_NAMES else name for name in modules)
    targets = config.get("target_modules") or ()
    if targets == NO_TARGETS:
        targets = ()
    _check_embedding(model, fresh, config, directory)
    lora = LoRA(
        rank=rank,
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        modules_to_save=modules,
        rslora=bool(config.get("use_rslora")),
    )
    ordered = {path: new[path] for path in sorted(new)}
    return dataclasses.replace(model, lora=lora), unflatten(ordered)


def _check_embedding(model: Model, fresh: Mapping[str, Any], config: Any, directory: Path) -> None:
    """Refuse an embedding trained apart from the head that is tied to it here."""
    embedding = any(path.endswith("embed_tokens/embedding") for path in fresh)
    if model.config.text.tied and embedding and not config.get("ensure_weight_tying"):
        raise UserError(
            f"The adapter in '{directory}' holds a trained embedding but not "
            f"ensure_weight_tying, so peft leaves the head at the base's values; here the head is "
            f"tied to the embedding. Merge it with peft into an untied checkpoint."
        )


def _new_tokens(model: Model, file: Path) -> int:
    """Return how many more tokens an adapter's embedding has than the base."""
    with open_tensors(file) as handle:
        for key in handle.keys():
            if key.endswith("embed_tokens.weight"):
                rows = int(handle.get_slice(key).get_shape()[0])
                return max(0, rows - model.config.text.vocab_size)
    return 0


def _homeless(directory: Path, key: str, name: str, known: Mapping[str, Any]) -> UserError:
    return UserError(
        f"The adapter in '{directory}' holds '{key}', for which this model has no place"
        f"{nearest(name, known)}. It belongs to another base model or to an unknown layout; "
        f"nothing was loaded."
    )


def _stacked(
    model: Model, flat: Mapping[str, Any], path: str, layers: dict[int | None, np.ndarray],
    matrices: Mapping[str, Any], rank: int, file: Path,
) -> np.ndarray:  # fmt: skip
    """Return one lora_A or lora_B leaf of the given layers, checked against the base's kernel."""
    base, matrix = path.rsplit("/", 1)
    partner = f"{base}/{'lora_B' if matrix == 'lora_A' else 'lora_A'}"
    if matrices.get(partner, {}).keys() != layers.keys():
        raise UserError(f"'{file}' holds {matrix} of '{base}' without its partner in some layer.")
    *stack, inputs, outputs = flat[f"{base}/kernel"].shape
    shape = (inputs, rank) if matrix == "lora_A" else (rank, outputs)
    leaf = np.zeros((*stack, *shape), np.float32)
    for layer, tensor in layers.items():
        if tensor.shape != shape:
            raise UserError(
                f"'{file}' holds {matrix} of '{base}' with the shape {list(tensor.shape[::-1])}; "
                f"rank {rank} and the base's kernel ask for {list(shape[::-1])}."
            )
        leaf[... if layer is None else layer] = tensor
    return leaf
