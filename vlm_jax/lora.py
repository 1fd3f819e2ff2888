"""LoRA on a parameter tree: which layers, fresh matrices, merging."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError, nearest
from vlm_jax.layers.linear import fresh_a, weight_update
from vlm_jax.model import LoRA, Model
from vlm_jax.names import (
    Place,
    current_name,
    disk_places,
    is_unused,
    layer_names,
    stacked_layers,
)
from vlm_jax.trees import flatten, unflatten
from vlm_jax.vocabulary import is_added
from vlm_jax.weights import FourBit, dense
from vlm_jax.weights.quantize import quantize

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
    """Return whether a leaf is a LoRA matrix, or DoRA's norms of columns."""
    return path.endswith(("/lora_A", "/lora_B", "/lora_magnitude"))


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
        hits = [bool(regex.fullmatch(name)) for name in layer_names(model, path)]
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
            f"module names such as '{layer_names(model, kernels[0])[0]}'; for name suffixes "
            f"pass a list, e.g. ['q_proj', 'v_proj']."
        )
    return chosen


@dataclasses.dataclass(frozen=True)
class SavedModules:
    """The modules that an adapter holds in full.

    names: those that PEFT must be told. places: the tensors in them, by their name in the current
    layout. unused: names of further tensors in them, which nothing here reads but PEFT wants.
    """

    names: tuple[str, ...]
    places: dict[str, Place]
    unused: tuple[str, ...]

    @property
    def leaves(self) -> list[str]:
        return list(dict.fromkeys(place.path for place in self.places.values()))


def owners(tensor: str) -> list[str]:
    """Return the names of the modules that a tensor lies in, the outermost first."""
    parts = tensor.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def base_places(model: Model, params: Mapping[str, Any]) -> dict[str, Place]:
    """Return {tensor name: its place} of all leaves that a base checkpoint has too."""
    flat = flatten(params)
    own = {path: x.shape for path, x in flat.items() if not is_lora(path) and not is_added(path)}
    return disk_places(model, own)


def unused_names(model: Model) -> list[str]:
    """Return the tensors of the base and of a loaded adapter that nothing here reads."""
    held = [] if model.source is None else [current_name(model, n) for n in model.source.tensors]
    return [name for name in dict.fromkeys((*held, *model.unused)) if is_unused(model, name)]


def module_names(model: Model, params: Mapping[str, Any]) -> set[str]:
    """Return the full names of the reference's modules that hold tensors."""
    tensors = (*base_places(model, params), *unused_names(model))
    return {module for tensor in tensors for module in owners(tensor)}


def peft_module(model: Model, modules: Iterable[str], name: str) -> str | None:
    """Return a name of modules_to_save as PEFT knows it, or None where it means no module.

    modules: those of `module_names`. The projector goes by several names, and full names come in
    several layouts.
    """
    if name in PROJECTOR_NAMES:
        return model.family.PROJECTOR
    for known in (name, current_name(model, f"{name}.").removesuffix(".")):
        if known and any(module.endswith(known) for module in modules):
            return known
    return None


def saved_modules(model: Model, params: Mapping[str, Any], names: Iterable[str]) -> SavedModules:
    """Return what `modules_to_save` means, exactly as PEFT reads it.

    A name means every module whose full dotted name ends with it, whole parts or not, a layer's
    number included: "norm" is also each input_layernorm, and "layers.0.mlp" one of many. Where one
    such module lies within another, which PEFT cannot save, the full names of the outer ones stand
    for all. `params` may be shapes. Raises `UserError` for a name that no module ends with.
    """
    places, unused = base_places(model, params), unused_names(model)
    modules = module_names(model, params)
    known = []
    for name in names:
        found = peft_module(model, modules, name)
        if found is None:
            parts = sorted({module.rsplit(".", 1)[-1] for module in modules})
            if name == "lm_head" and model.config.text.tied:
                raise UserError(
                    "modules_to_save names 'lm_head', but this model's head is tied to its "
                    "embedding: name 'embed_tokens' alone, which trains both."
                )
            raise UserError(
                f"modules_to_save names '{name}', but the model has no such module"
                f"{nearest(name, parts)}. Use 'projector', 'embed_tokens', 'lm_head' or another "
                f"module's name."
            )
        known.append(found)
    hits = {
        tensor: [module for module in owners(tensor) if module.endswith(tuple(known))]
        for tensor in (*places, *unused)
    }
    if any(len(found) > 1 for found in hits.values()):
        known = [found[0] for found in hits.values() if found]
    return SavedModules(
        names=tuple(sorted(set(known))),
        places={tensor: place for tensor, place in places.items() if hits[tensor]},
        unused=tuple(tensor for tensor in unused if hits[tensor]),
    )


def saved_leaves(model: Model, params: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the leaves that `modules_to_save` trains in full.

    Raises `UserError` for a name that matches nothing or only some layers of a stack.
    """
    saved = saved_modules(model, params, names)
    for path in saved.leaves:
        count = stacked_layers(model, path)
        held = [place.layer for place in saved.places.values() if place.path == path]
        if count is not None and len(held) < count:
            raise UserError(
                f"modules_to_save, {list(names)}, means only layers {held[:8]} of '{path}'. Layers "
                f"are stacked here, so to train one in full name a module that all of them have, "
                f"without a layer's number."
            )
    return saved.leaves


def _check_overlap(model: Model, params: Mapping[str, Any], lora: LoRA, kernels: list[str]) -> None:
    in_full = set(saved_leaves(model, params, lora.modules_to_save))
    in_full |= {path.replace("/added", "/kernel") for path in flatten(params) if is_added(path)}
    codes = [path for path in in_full if isinstance(flatten(params).get(path), FourBit)]
    if codes:
        raise UserError(
            f"modules_to_save, {list(lora.modules_to_save)}, trains '{min(codes)}' in full, which "
            f"is stored in 4 bits: codes have no gradient, and an adapter cannot hold them. Take "
            f"the module out of modules_to_save, or keep it dense: leave it out of the components "
            f"that are quantized, or name it among the skipped modules."
        )
    both = [path for path in kernels if path in in_full]
    if both:
        raise UserError(
            f"'{both[0]}' is both a LoRA target and in modules_to_save, or has rows of added "
            f"tokens. A layer gets low-rank matrices or trains in full, not both: take it out of "
            f"one of the two."
        )


def check_numbers(lora: LoRA) -> None:
    """Raise `UserError` for a rank or dropout that means nothing."""
    if lora.rank < 1:
        raise UserError(f"The LoRA rank is {lora.rank}; it must be 1 or more.")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"The LoRA dropout is {lora.dropout}; it must be in [0, 1).")


def add_lora(
    model: Model, params: Mapping[str, Any], lora: LoRA, key: jax.Array
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with fresh `lora_A` [in, R] and `lora_B` [R, out] leaves.

    A is kaiming-uniform with a = sqrt(5), that is uniform within 1/sqrt(in), and B zero, as in
    PEFT: the adapted model starts equal to the base. Both are float32; scanned layers lead with
    the layer axis. lora.dora adds `lora_magnitude` [out], the norms of the kernel's columns. The
    old tree stays as it was. Raises `UserError` for a target or module that
    matches nothing, or where LoRA is there already.
    """
    flat = flatten(params)
    if any(is_lora(path) for path in flat):
        raise UserError("These parameters hold LoRA matrices already; merge them first.")
    check_numbers(lora)
    kernels = target_kernels(model, params, lora)
    _check_overlap(model, params, lora, kernels)
    for path, one in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        *layers, inputs, outputs = flat[path].shape
        base = path.rsplit("/", 1)[0]
        flat[f"{base}/lora_A"] = fresh_a(one, (*layers, inputs, lora.rank))
        flat[f"{base}/lora_B"] = jnp.zeros((*layers, lora.rank, outputs), jnp.float32)
        if lora.dora:
            flat[f"{base}/lora_magnitude"] = _norms(flat[path])
    return dataclasses.replace(model, lora=lora), unflatten(flat)


def merge(
    model: Model | Any, params: Mapping[str, Any], requantize: bool = False
) -> dict[str, Any]:
    """Return a new tree without LoRA whose logits equal the adapted ones: W + alpha/r A B.

    Of DoRA the columns of that have the learned norms.

    The sum is formed in float32 and stored in the kernel's dtype. A quantized kernel is decoded and
    becomes dense in the model's dtype; requantize: it becomes a quantized one of the same format
    again, on the same devices, which rounds most of a small update away (`requantization_error`
    measures it). The old tree is untouched. Of a foreign module that `adapt` returned, `params` are
    its variables, and the result is its own "params", all dense. Raises `UserError` for matrices
    that were made for another shape, and where requantize finds nothing in 4 bits.
    """
    if not isinstance(model, Model):
        from vlm_jax.linen.adapt import merge_adapted  # a higher level: it takes what is above

        return merge_adapted(model, params, requantize)
    flat = flatten(params)
    if requantize and not any(isinstance(leaf, FourBit) for leaf in flat.values()):
        raise UserError(
            "requantize=True makes merged kernels 4-bit again, but these parameters hold no 4-bit "
            "kernel. Load the base with quantize='nf4-dq', or merge without requantize."
        )
    return unflatten(
        {
            path: merged_leaf(model, flat, path, requantize=requantize)
            for path in flat
            if not is_lora(path)
        }
    )


def merged_leaf(
    model: Model,
    flat: Mapping[str, Any],
    path: str,
    layer: int | None = None,
    requantize: bool = False,
) -> Any:
    """Return one leaf of a flat tree as `merge` makes it, or one layer of its stack.

    A leaf without LoRA is returned as it is.
    """
    base, kernel = path.rsplit("/", 1)[0], _one(flat[path], layer)
    if not path.endswith("/kernel") or f"{base}/lora_A" not in flat:
        return kernel
    summed: Any = _merged(model, flat, base, kernel, layer)
    if not isinstance(kernel, FourBit):
        return summed.astype(kernel.dtype)
    if not requantize:
        return summed.astype(model.dtype)
    name = f"The merged kernel '{base}'"
    summed = quantize(type(kernel), summed, kernel.block, kernel.double, name)
    summed = dataclasses.replace(summed, dtype=kernel.dtype, used=kernel.used)
    if isinstance(kernel.codes, jax.Array) and not isinstance(kernel.codes, jax.core.Tracer):
        summed = jax.device_put(summed, jax.tree.map(lambda x: x.sharding, kernel))
    return summed


def _one(leaf: Any, layer: int | None) -> Any:
    """Return one layer of a stack, or what is none."""
    return leaf if layer is None else jax.tree.map(lambda array: array[layer], leaf)


def _norms(kernel: Any) -> jax.Array:
    """Return the norms of a kernel's columns, float32 [..., out], a layer of a stack at a time."""
    if len(kernel.shape) > 2:
        return jax.lax.map(_norms, kernel)
    return jnp.linalg.norm(dense(kernel, jnp.float32), axis=-2)


def _merged(
    model: Model, flat: Mapping[str, Any], base: str, kernel: Any, layer: int | None
) -> jax.Array:
    """Return a kernel with its adapter in it, in float32: their sum, or DoRA's."""
    assert model.lora is not None
    a, b = (_one(flat[f"{base}/{name}"], layer) for name in ("lora_A", "lora_B"))
    *layers, inputs, outputs = kernel.shape
    rank = a.shape[-1]
    if a.shape != (*layers, inputs, rank) or b.shape != (*layers, rank, outputs):
        raise UserError(
            f"The LoRA matrices of '{base}' are {list(a.shape)} and {list(b.shape)}, made for "
            f"another shape than its kernel's, {list(kernel.shape)}. Take the adapter that was "
            f"trained on this base."
        )
    summed = dense(kernel, jnp.float32) + weight_update(a, b, model.lora.scale.scale(rank))
    if f"{base}/lora_magnitude" not in flat:
        return summed
    magnitude = _one(flat[f"{base}/lora_magnitude"], layer)
    return summed * (magnitude / jnp.linalg.norm(summed, axis=-2))[..., None, :]


def requantization_error(model: Model, params: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far 4-bit kernels that are merged and quantized again lie from the exact sums.

    The first is the error's norm over the norm of the weights, the second over that of the
    updates: at 1 as much is lost as was learned.
    """
    flat = flatten(params)
    error = weight = update = 0.0
    for path, kernel in flat.items():
        if not isinstance(kernel, FourBit):
            continue
        base, stack = path.rsplit("/", 1)[0], len(kernel.shape) > 2
        if f"{base}/lora_A" not in flat:
            continue
        for layer in range(kernel.shape[0]) if stack else (None,):  # a stack may have no room
            before = _one(kernel, layer)
            exact = _merged(model, flat, base, before, layer)
            after = dense(merged_leaf(model, flat, path, layer, requantize=True), jnp.float32)
            error += float(jnp.sum((after - exact) ** 2))
            weight += float(jnp.sum(exact**2))
            update += float(jnp.sum((exact - dense(before, jnp.float32)) ** 2))
    root = math.sqrt
    return root(error / max(weight, 1e-30)), root(error / max(update, 1e-30))
