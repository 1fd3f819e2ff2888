"""LoRA on a parameter tree: which layers, fresh matrices, merging."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError, nearest
from vlm_jax.model import LoRA, Model
from vlm_jax.names import module_name, stacked_layers
from vlm_jax.trees import flatten, unflatten

PRESETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt": ("c_attn", "c_proj"),
    "bert": ("query", "value"),
    "vit": ("qkv", "proj"),
}
# The projector by our name, by LLaVA's old one, and by what families call it.
PROJECTOR_NAMES = ("projector", "mm_projector", "multi_modal_projector", "merger")


def is_lora(path: str) -> bool:
    """Return whether a leaf is a LoRA matrix."""
    return path.endswith(("/lora_A", "/lora_B"))


def _layer_names(model: Model, path: str) -> list[str]:
    """Return the module names of each layer that a leaf stacks (one for a plain leaf)."""
    layers = stacked_layers(model, path)
    return [module_name(model, path, i) for i in ([None] if layers is None else range(layers))]


def target_kernels(model: Model, params: Mapping[str, Any], lora: LoRA) -> list[str]:
    """Return the paths of the kernels that `lora.targets` names, in the tree's order.

    A suffix matches whole dotted parts at the end of a module's name and looks only into
    `lora.components`, so that a vision tower with submodules of the same names is left alone; a
    regex matches a module's whole name, layer number included, as PEFT does.
    Raises `UserError` for a target that matches nothing or only some layers of a stack.
    """
    convolutions = model.family.disk_shapes(model.config)  # PEFT gives those another kind of LoRA
    kernels = [
        path for path in flatten(params) if path.endswith("/kernel") and path not in convolutions
    ]
    inside = [path for path in kernels if model.component(path) in lora.components]
    targets = lora.targets
    if isinstance(targets, str):
        if targets == "all-linear":  # PEFT's leaves the output layer alone
            inner = [path for path in inside if model.component(path) != "head"]
            if not inner:
                holding = sorted({model.component(path) for path in kernels} - {"head"})
                raise UserError(
                    f"The LoRA target 'all-linear' finds no linear layer in the components "
                    f"{list(lora.components)}; those that hold some are {', '.join(holding)}. The "
                    f"head is left out, as in PEFT: name it, as 'lm_head', to adapt it."
                )
            return inner
        if targets in PRESETS:
            targets = PRESETS[targets]
        else:
            return _regex_kernels(model, kernels, targets)
    chosen: set[str] = set()
    for target in targets:
        if target in PROJECTOR_NAMES:
            hits = [path for path in kernels if model.component(path) == "projector"]
        else:
            suffix = "/" + target.replace(".", "/") + "/kernel"
            hits = [path for path in inside if f"/{path}".endswith(suffix)]
        if not hits:
            known = sorted({path.split("/")[-2] for path in inside})
            raise UserError(
                f"The LoRA target '{target}' matches no linear layer of the "
                f"{' or '.join(lora.components)}{nearest(target, known)}. Layers there: "
                f"{', '.join(known)}. Name suffixes, a preset ({', '.join(PRESETS)}), "
                f"'all-linear', or one regex over whole module names."
            )
        chosen.update(hits)
    return [path for path in kernels if path in chosen]


def _regex_kernels(model: Model, kernels: list[str], pattern: str) -> list[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"The LoRA target {pattern!r} is no regular expression: {error}."
        ) from error
    chosen = []
    for path in kernels:
        hits = [bool(regex.fullmatch(name)) for name in _layer_names(model, path)]
        if any(hits) and not all(hits):
            raise UserError(
                f"The LoRA target {pattern!r} matches only layers "
                f"{[i for i, hit in enumerate(hits) if hit][:8]} of '{path}'. Layers are stacked "
                f"here, so a target must match all of them or none."
            )
        if hits[0]:
            chosen.append(path)
    if not chosen:
        raise UserError(
            f"The LoRA target {pattern!r} matches no linear layer. A string is a regex over whole "
            f"module names such as '{_layer_names(model, kernels[0])[0]}'; for name suffixes "
            f"pass a list, e.g. ['q_proj', 'v_proj']."
        )
    return chosen


def saved_modules(model: Model, params: Mapping[str, Any], lora: LoRA) -> dict[str, list[str]]:
    """Return {Hugging Face's module name: its leaves} of `lora.modules_to_save`."""
    flat = flatten(params)
    saved: dict[str, list[str]] = {}
    for name in lora.modules_to_save:
        if name in PROJECTOR_NAMES:
            name = model.family.PROJECTOR
        part = f"/{name.replace('.', '/')}/"
        hits = [path for path in flat if part in f"/{path}" and not is_lora(path)]
        if not hits:
            known = sorted({part for path in flat for part in path.split("/")[:-1]})
            raise UserError(
                f"modules_to_save names '{name}', but the model has no such module"
                f"{nearest(name, known)}. Use 'projector', 'embed_tokens', 'lm_head' or another "
                f"module's name."
            )
        saved[name] = hits
    return saved


def _check_overlap(model: Model, params: Mapping[str, Any], lora: LoRA, kernels: list[str]) -> None:
    in_full = {p for paths in saved_modules(model, params, lora).values() for p in paths}
    both = [path for path in kernels if path in in_full]
    if both:
        raise UserError(
            f"'{both[0]}' is both a LoRA target and in modules_to_save. A layer gets low-rank "
            f"matrices or trains in full, not both: take it out of one of the two."
        )


def add_lora(
    model: Model, params: Mapping[str, Any], lora: LoRA, key: jax.Array
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with fresh `lora_A` [in, R] and `lora_B` [R, out] leaves.

    A is kaiming-uniform with a = sqrt(5), that is uniform within 1/sqrt(in), and B zero, as in
    PEFT: the adapted model starts equal to the base. Both are float32; scanned layers lead with
    the layer axis. The old tree stays as it was. Raises `UserError` for a target or module that
    matches nothing, or where LoRA is there already.
    """
    flat = flatten(params)
    if any(is_lora(path) for path in flat):
        raise UserError("These parameters hold LoRA matrices already; merge them first.")
    if lora.rank < 1:
        raise UserError(f"The LoRA rank is {lora.rank}; it must be 1 or more.")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"The LoRA dropout is {lora.dropout}; it must be in [0, 1).")
    kernels = target_kernels(model, params, lora)
    _check_overlap(model, params, lora, kernels)
    for path, one in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        *layers, inputs, outputs = flat[path].shape
        bound = 1 / math.sqrt(inputs)
        base = path.rsplit("/", 1)[0]
        shape = (*layers, inputs, lora.rank)
        flat[f"{base}/lora_A"] = jax.random.uniform(one, shape, jnp.float32, -bound, bound)
        flat[f"{base}/lora_B"] = jnp.zeros((*layers, lora.rank, outputs), jnp.float32)
    return dataclasses.replace(model, lora=lora), unflatten(flat)


def merge(model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new tree without LoRA whose logits equal the adapted ones: W + alpha/r A B.

    The sum is formed in float32 and stored in the kernel's dtype. The old tree is untouched.
    """
    flat = flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_lora(path)}
    for path in flat:
        if not path.endswith("/lora_A"):
            continue
        base = path.rsplit("/", 1)[0]
        a, b, kernel = flat[path], flat[f"{base}/lora_B"], flat[f"{base}/kernel"]
        assert model.lora is not None
        scale = model.lora.scale.scale(a.shape[-1])
        update = jnp.matmul(
            a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        merged[f"{base}/kernel"] = (kernel.astype(jnp.float32) + scale * update).astype(
            kernel.dtype
        )
    return unflatten(merged)
