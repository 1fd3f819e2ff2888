"""LoRA targets as PEFT resolves them: modules, ranks and scales."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.adapters.added_tokens import EMBEDDING, HEAD
from vlm_jax.errors import UserError, nearest
from vlm_jax.files.limits import PATTERNS, check_patterns
from vlm_jax.model import Model
from vlm_jax.models.layers.linear import LoRAScale
from vlm_jax.models.methods import LoRA
from vlm_jax.names import layer_names, stacked_layers
from vlm_jax.trees import flatten

PRESETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt": ("c_attn", "c_proj"),
    "bert": ("query", "value"),
    "vit": ("qkv", "proj"),
}
# The projector by our name, by LLaVA's old one, and by what families call it.
PROJECTOR_NAMES = ("projector", "mm_projector", "multi_modal_projector", "merger")
EMBEDDING_LEAF = f"{EMBEDDING}/embedding"


class Slot(NamedTuple):
    """One module's share of a leaf: its layer (None of a leaf that is not a stack), rank and scale.

    Where rank is 0 the module has no matrices: its layer of them is zero and stays so.
    """

    module: str
    layer: int | None
    rank: int
    alpha: float
    scale: float


def adaptable(model: Model, params: Mapping[str, Any]) -> list[str]:
    """Return the kernels that can have matrices, in the tree's order, and the embedding.

    Not those of convolutions: PEFT gives them another kind of LoRA.
    """
    convolutions = model.family.disk_shapes(model.config)
    return [
        path
        for path in flatten(params)
        if (path.endswith("/kernel") and path not in convolutions) or path == EMBEDDING_LEAF
    ]


def whole(key: str) -> str:
    """Return the regex over whole names that a key of rank_pattern or alpha_pattern stands for."""
    return rf"(.*\.)?({key})"


@functools.lru_cache(maxsize=PATTERNS)
def _compiled_key(key: str) -> re.Pattern[str]:
    return re.compile(whole(key))


def pattern_key(keys: Iterable[str], module: str) -> str | None:
    """Return the first key of a rank_pattern or alpha_pattern that matches a module, or None."""
    return next((key for key in keys if _compiled_key(key).fullmatch(module)), None)


def layer_number(module: str, patterns: tuple[str, ...]) -> int | None:
    """Return the number of the layer that a module lies in, as layers_to_transform counts it."""
    for row in map(_numbered, patterns) if patterns else (r".*?\.[^.]*\.(?P<number>\d+)\..*",):
        found = re.fullmatch(row, module)
        if found:
            return int(found["number"])
    return None


def _numbered(pattern: str) -> str:
    """Return the regex over whole names that a row of layers_pattern stands for."""
    return rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\..*"


def is_excluded(module: str, exclude: str | tuple[str, ...]) -> bool:
    """Return whether exclude_modules, a regex or suffixes, means a module."""
    if isinstance(exclude, str):
        return bool(re.fullmatch(exclude, module))
    return f".{module}".endswith(tuple(f".{name}" for name in exclude))


def slots(model: Model, lora: LoRA, path: str) -> list[Slot]:
    """Return what each module of a leaf, a kernel or a matrix beside it, has of an adapter."""
    found = []
    out = set(lora.left_out)
    stacked = stacked_layers(model, path) is not None
    for i, module in enumerate(layer_names(model, path)):
        if module in out:
            found.append(Slot(module, i if stacked else None, 0, 0, 0.0))
            continue
        rank_key = pattern_key(lora.rank_pattern, module)
        alpha_key = pattern_key(lora.alpha_pattern, module)
        rank = lora.rank if rank_key is None else lora.rank_pattern[rank_key]
        alpha = lora.alpha if alpha_key is None else lora.alpha_pattern[alpha_key]
        scale = LoRAScale(float(alpha), rslora=lora.rslora).scale(rank)
        found.append(Slot(module, i if stacked else None, rank, alpha, scale))
    return found


def is_uniform(lora: LoRA, held: list[Slot]) -> bool:
    """Return whether one scale, that of the largest rank, holds for all layers of a leaf."""
    scale = lora.scale.scale(max(slot.rank for slot in held))
    return all(slot.scale == scale for slot in held)


def scales(held: list[Slot]) -> jax.Array:
    """Return the leaf `lora_scale`, [L] of a stack and [] of what is none."""
    found = [slot.scale for slot in held]
    return jnp.asarray(found if held[0].layer is not None else found[0], jnp.float32)


def rank_mask(held: list[Slot]) -> jax.Array:
    """Return [L, R], 1 where a layer of a stack has that much rank."""
    ranks = jnp.asarray([slot.rank for slot in held])
    return (jnp.arange(max(slot.rank for slot in held))[None] < ranks[:, None]).astype(jnp.float32)


def target_modules(model: Model, params: Mapping[str, Any], lora: LoRA) -> dict[str, list[bool]]:
    """Return {path of a kernel: for each of its layers whether it is adapted}, in tree order.

    A suffix matches whole dotted parts at the end of a module's name and looks only into
    `lora.components`, so that a vision tower with submodules of the same names is left alone; a
    regex matches a module's whole name, layer number included, as PEFT does. The embedding is
    adapted where it is named. Raises `UserError` for a target, a pattern, an excluded module or a
    layer that matches nothing.
    """
    kernels = adaptable(model, params)
    _check_patterns(lora, [module for path in kernels for module in layer_names(model, path)])
    chosen = _chosen(model, kernels, lora)
    named = {path: layer_names(model, path) for path in chosen}
    excluded = {
        path: [is_excluded(module, lora.exclude_modules) for module in modules]
        for path, modules in named.items()
    }
    # What lies outside of lora.components, as a vision tower that is never reached, may be excluded
    # too: a config that peft takes says so.
    modules = [module for path in kernels for module in layer_names(model, path)]
    if lora.exclude_modules and not any(is_excluded(m, lora.exclude_modules) for m in modules):
        known = sorted({module.split(".")[-1] for module in modules})
        raise UserError(
            f"lora.exclude_modules, {lora.exclude_modules!r}, matches none of the layers that can "
            f"have LoRA, {', '.join(known)}. It takes suffixes of module names, or one regex "
            f"over whole names such as '{modules[0]}'."
        )
    inside = _in_layers(lora, named)
    hits = {
        path: [
            hit and layer and not out
            for hit, layer, out in zip(chosen[path], inside[path], excluded[path], strict=True)
        ]
        for path in chosen
    }
    hits = {path: flags for path, flags in hits.items() if any(flags)}
    if chosen and not hits:
        raise UserError(
            f"No layer is left to adapt: lora.exclude_modules, {lora.exclude_modules!r}, and "
            f"lora.layers_to_transform, {list(lora.layers_to_transform)}, take out all that the "
            f"targets name. Take one of them back."
        )
    modules = [m for p, flags in hits.items() for m, on in zip(named[p], flags, strict=True) if on]
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, name):
            if not any(pattern_key((key,), module) for module in modules):
                raise UserError(
                    f"The key {key!r} of lora.{name} matches no layer that is adapted. It is a "
                    f"regex over the end of a module's name, from a dot on, such as "
                    f"'{modules[0].split('.')[-1]}' of '{modules[0]}'."
                )
    return hits


def target_kernels(model: Model, params: Mapping[str, Any], lora: LoRA) -> list[str]:
    """Return the paths of the kernels of which `lora` adapts any layer, in the tree's order."""
    return list(target_modules(model, params, lora))


def _check_patterns(lora: LoRA, modules: list[str]) -> None:
    """Raise `UserError` for regexes of a LoRA that are none or endless, and values that misfit."""
    for name in ("rank_pattern", "alpha_pattern"):
        least = 1 if name == "rank_pattern" else 0
        check_patterns(list(getattr(lora, name)), modules, f"key of lora.{name}", whole)
        for key, value in getattr(lora, name).items():
            kinds = (int,) if name == "rank_pattern" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
                what = "a whole number of 1 or more" if least else "a number of 0 or more"
                raise UserError(f"lora.{name} gives {key!r} the value {value!r}; expected {what}.")
    if isinstance(lora.exclude_modules, str):
        check_patterns([lora.exclude_modules], modules, "value of lora.exclude_modules")
    check_patterns(lora.layers_pattern, modules, "value of lora.layers_pattern", _numbered)
    regex = isinstance(lora.targets, str) and lora.targets not in (*PRESETS, "all-linear")
    if regex:
        check_patterns([str(lora.targets)], modules, "LoRA target")
    if regex and lora.layers_to_transform:
        raise UserError(
            f"lora.layers_to_transform is set and the target is a regex, {lora.targets!r}; PEFT "
            f"refuses both together. Name the layers in the regex, or name suffixes as targets."
        )
    if lora.layers_pattern and not lora.layers_to_transform:
        raise UserError(
            f"lora.layers_pattern, {list(lora.layers_pattern)}, says which numbers "
            f"lora.layers_to_transform means, which is not set. Set it, or leave both out."
        )


def _in_layers(lora: LoRA, named: Mapping[str, list[str]]) -> dict[str, list[bool]]:
    """Return for each layer whether layers_to_transform lets it be adapted.

    As in PEFT, a target that is a module's whole name, "lm_head" for one, is adapted in any case.
    """
    if not lora.layers_to_transform:
        return {path: [True] * len(modules) for path, modules in named.items()}
    numbers = {
        path: [layer_number(module, lora.layers_pattern) for module in modules]
        for path, modules in named.items()
    }
    known = {number for found in numbers.values() for number in found if number is not None}
    unknown = sorted(set(lora.layers_to_transform) - known)
    if unknown:
        having = f"the layers 0 to {max(known)}" if known else "no numbered layer"
        raise UserError(
            f"lora.layers_to_transform names the layer {unknown[0]}, but the LoRA targets are in "
            f"{having}{f' after {list(lora.layers_pattern)}' if lora.layers_pattern else ''}."
        )
    wanted, whole = set(lora.layers_to_transform), set(_names(lora.targets))
    return {
        path: [
            number in wanted or module in whole
            for number, module in zip(found, named[path], strict=True)
        ]
        for path, found in numbers.items()
    }


def _names(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the suffixes that targets are, or a preset stands for; of a regex there are none."""
    return PRESETS.get(targets, ()) if isinstance(targets, str) else targets


def _chosen(model: Model, kernels: list[str], lora: LoRA) -> dict[str, list[bool]]:
    """Return {kernel: for each layer whether lora.targets means it}, of those that it means."""
    inside = [
        path
        for path in kernels
        if model.component(path) in lora.components and path != EMBEDDING_LEAF
    ]
    targets = lora.targets
    if isinstance(targets, str):
        if targets == "all-linear":  # PEFT's leaves the output layer alone
            inner = [path for path in inside if model.component(path) != "head"]
            if not inner:
                holding = {model.component(path) for path in kernels if path != EMBEDDING_LEAF}
                raise UserError(
                    f"The LoRA target 'all-linear' finds no linear layer in the components "
                    f"{list(lora.components)}; those that hold some are "
                    f"{', '.join(sorted(holding - {'head'}))}. The head is left out, as in PEFT: "
                    f"name it, as 'lm_head', to adapt it."
                )
            return _whole(model, inner)
        if targets not in PRESETS:
            return _regex_kernels(model, kernels, targets)
        targets = PRESETS[targets]
    named = [*inside, *(path for path in kernels if path == EMBEDDING_LEAF)]
    chosen: dict[str, list[bool]] = {}
    for target in targets:
        if target in PROJECTOR_NAMES:
            found = _whole(model, [p for p in kernels if model.component(p) == "projector"])
        else:
            found = {
                path: [f".{module}".endswith(f".{target}") for module in layer_names(model, path)]
                for path in named
            }
            found = {path: flags for path, flags in found.items() if any(flags)}
        if not found:
            raise _no_target(model, inside, target, lora)
        for path, flags in found.items():
            both = zip(chosen.get(path, flags), flags, strict=True)
            chosen[path] = [before or now for before, now in both]
    return {path: chosen[path] for path in kernels if path in chosen}


def _whole(model: Model, kernels: Iterable[str]) -> dict[str, list[bool]]:
    return {path: [True] * len(layer_names(model, path)) for path in kernels}


def _no_target(model: Model, inside: list[str], target: str, lora: LoRA) -> UserError:
    if target.split(".")[-1] == HEAD and model.config.text.tied:
        return UserError(
            f"The LoRA target '{target}' is tied to the embedding in this model: the head has no "
            f"weight of its own. Name 'embed_tokens', whose LoRA leaves the head as it is (as "
            f"in PEFT), or train both in full by modules_to_save=('embed_tokens',)."
        )
    known = sorted({path.split("/")[-2] for path in inside})
    return UserError(
        f"The LoRA target '{target}' matches no linear layer of the "
        f"{' or '.join(lora.components)}{nearest(target, known)}. Layers there: "
        f"{', '.join(known)}. Name suffixes, a preset ({', '.join(PRESETS)}), "
        f"'all-linear', or one regex over whole module names."
    )


def _regex_kernels(model: Model, kernels: list[str], pattern: str) -> dict[str, list[bool]]:
    found = {
        path: [bool(re.fullmatch(pattern, module)) for module in layer_names(model, path)]
        for path in kernels
    }
    chosen = {path: flags for path, flags in found.items() if any(flags)}
    if not chosen:
        raise UserError(
            f"The LoRA target {pattern!r} matches no linear layer. A string is a regex over whole "
            f"module names such as '{layer_names(model, kernels[0])[0]}'; for name suffixes "
            f"pass a list, e.g. ['q_proj', 'v_proj']."
        )
    return chosen
