"""LoRA targets as PEFT resolves them: modules, ranks and scales."""

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.adapters.added_tokens import HEAD
from vlm_jax.errors import UserError, nearest, refuse
from vlm_jax.files.limits import PATTERNS, check_patterns
from vlm_jax.model import Model
from vlm_jax.models import MODELS
from vlm_jax.models.layers.linear import LoRAScale
from vlm_jax.models.methods import LoRA
from vlm_jax.names import layer_names, layers_of
from vlm_jax.trees import flatten

PRESETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt": ("c_attn", "c_proj"),
    "bert": ("query", "value"),
    "vit": ("qkv", "proj"),
}
# The projector by our name, by LLaVA's old one, and by what families call it.
ANY_PROJECTOR = {"projector", "mm_projector"}
PROJECTOR_NAMES = {*ANY_PROJECTOR, *(f.PROJECTOR for f in MODELS.values())}


ALPHA = 1e9  # as of a config, see RANGES


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and least <= value <= most


def is_rank(value: Any) -> bool:
    return isinstance(value, int) and is_number(value, 1)


def is_alpha(value: Any) -> bool:
    return is_number(value, 0, ALPHA)


# Fields of LoRA: what their values may be.
PATTERN_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank_pattern": (is_rank, "a whole number of 1 or more"),
    "alpha_pattern": (is_alpha, f"a number of 0 to {ALPHA:g}"),
}


class Slot(NamedTuple):
    """One module's share of a leaf: its layer (None of a leaf that is not a stack), rank and scale.

    Where rank is 0 the module has no matrices: its layer of them is zero and stays so.
    """

    module: str
    layer: int | None
    rank: int
    scale: float


def embedding_leaf(model: Model) -> str:
    """Return the path of the token embedding's weight."""
    return f"{model.config.embedding}/embedding"


def adaptable(model: Model, params: Mapping[str, Any]) -> list[str]:
    """Return the kernels that can have matrices, in the tree's order, and the embedding.

    Not those of convolutions: PEFT gives them another kind of LoRA.
    """
    return [
        path
        for path in flatten(params)
        if (path.endswith("/kernel") and path not in model.config.disk_shapes)
        or path == embedding_leaf(model)
    ]


def key_regex(key: str) -> str:
    """Return the regex over whole names that a key of rank_pattern or alpha_pattern stands for."""
    return rf"(.*\.)?({key})"


@functools.lru_cache(maxsize=PATTERNS)
def _compiled_key(key: str) -> re.Pattern[str]:
    return re.compile(key_regex(key))


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any = None) -> Any:
    """Return the value of the first key of a rank_pattern or alpha_pattern that matches a module.

    default: where none does.
    """
    hits = (value for key, value in pattern.items() if _compiled_key(key).fullmatch(module))
    return next(hits, default)


def layer_number(module: str, patterns: tuple[str, ...]) -> int | None:
    """Return the number of the layer that a module lies in, as layers_to_transform counts it."""
    rows = map(_numbered, patterns) if patterns else (r".*?\.[^.]*\.(?P<number>\d+)\..*",)
    found = filter(None, (re.fullmatch(row, module) for row in rows))
    return next((int(hit["number"]) for hit in found), None)


def _numbered(pattern: str) -> str:
    """Return the regex over whole names that a row of layers_pattern stands for."""
    return rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\..*"


def means(words: str | tuple[str, ...], module: str) -> bool:
    """Return whether a regex over whole names, or suffixes of whole parts, mean a module."""
    return (
        bool(re.fullmatch(words, module))
        if isinstance(words, str)
        else f".{module}".endswith(tuple(f".{suffix}" for suffix in words))
    )


def resolve_targets(
    targets: str | tuple[str, ...],
    modules: Collection[str],
    linear: Collection[str],
    near: Collection[str],
) -> dict[str, list[str]]:
    """Return {target: the modules that it means}, [] where it means none.

    targets: one regex over whole names of modules, "all-linear", the name of a preset, or suffixes,
    of whole dotted parts. linear: what "all-linear" means. near: where suffixes look. Raises
    `UserError` for what is no regex.
    """
    if targets == "all-linear":
        return {targets: list(linear)}
    if isinstance(targets, str) and targets not in PRESETS:
        check_patterns([targets], modules, "LoRA target")
        return {targets: [module for module in modules if means(targets, module)]}
    return {one: [m for m in near if means((one,), m)] for one in suffixes_of(targets)}


def suffixes_of(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the suffixes that targets are, or a preset stands for; of a regex there are none."""
    return PRESETS.get(targets, ()) if isinstance(targets, str) else targets


def no_target(target: str, modules: Collection[str], where: str) -> UserError:
    """Return the error for a target that means none of the modules."""
    ends = list(dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules))
    return UserError(
        f"The LoRA target {target!r} matches no linear layer or embedding of {where}"
        f"{nearest(target, ends)}. Layers there: {', '.join(ends[:20]) or 'none'}. Name suffixes, "
        f"a preset ({', '.join(PRESETS)}), 'all-linear', or one regex over whole names such as "
        f"'{next(iter(modules), 'layers.0.q_proj')}'."
    )


def slots(model: Model, lora: LoRA, path: str) -> list[Slot]:
    """Return what each module of a leaf, a kernel or a matrix beside it, has of an adapter."""

    def slot(module: str, layer: int | None) -> Slot:
        if module in out:
            return Slot(module, layer, 0, 0.0)
        rank = pattern_value(lora.rank_pattern, module, lora.rank)
        alpha = pattern_value(lora.alpha_pattern, module, lora.alpha)
        return Slot(module, layer, rank, LoRAScale(float(alpha), rslora=lora.rslora).scale(rank))

    out = set(lora.left_out)
    return [slot(module, layer) for module, layer in layers_of(model, path).items()]


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
    layers = {path: layer_names(model, path) for path in adaptable(model, params)}
    homes = {module: path for path, modules in layers.items() for module in modules}
    _check_patterns(lora, homes)
    chosen = _chosen(model, homes, lora)
    # What lies outside of lora.components, as a vision tower that is never reached, may be excluded
    # too: a config that peft takes says so.
    excluded = {module for module in homes if means(lora.exclude_modules, module)}
    if lora.exclude_modules and not excluded:
        known = sorted({module.split(".")[-1] for module in homes})
        raise UserError(
            f"lora.exclude_modules, {lora.exclude_modules!r}, matches none of the layers that can "
            f"have LoRA, {', '.join(known)}. It takes suffixes of module names, or one regex "
            f"over whole names such as '{next(iter(homes))}'."
        )
    left = _in_layers(lora, chosen) - excluded
    if chosen and not left:
        raise UserError(
            f"No layer is left to adapt: lora.exclude_modules, {lora.exclude_modules!r}, and "
            f"lora.layers_to_transform, {list(lora.layers_to_transform)}, take out all that the "
            f"targets name. Take one of them back."
        )
    for name in PATTERN_VALUES:
        for key in getattr(lora, name):
            if not any(map(_compiled_key(key).fullmatch, left)):
                one = min(left or homes)
                raise UserError(
                    f"The key {key!r} of lora.{name} matches no layer that is adapted. It is a "
                    f"regex over the end of a module's name, from a dot on, such as "
                    f"'{one.split('.')[-1]}' of '{one}'."
                )
    hits = {path: [module in left for module in modules] for path, modules in layers.items()}
    return {path: flags for path, flags in hits.items() if any(flags)}


def target_kernels(model: Model, params: Mapping[str, Any], lora: LoRA) -> list[str]:
    """Return the paths of the kernels of which `lora` adapts any layer, in the tree's order."""
    return list(target_modules(model, params, lora))


def _check_patterns(lora: LoRA, modules: Collection[str]) -> None:
    """Raise `UserError` for regexes of a LoRA that are none or endless, and values that misfit."""
    for name, (fits, expected) in PATTERN_VALUES.items():
        check_patterns(list(getattr(lora, name)), modules, f"key of lora.{name}", key_regex)
        for key, value in getattr(lora, name).items():
            if not fits(value):
                raise UserError(
                    f"lora.{name} gives {key!r} the value {value!r}; expected {expected}."
                )
    if isinstance(lora.exclude_modules, str):
        check_patterns([lora.exclude_modules], modules, "value of lora.exclude_modules")
    check_patterns(lora.layers_pattern, modules, "value of lora.layers_pattern", _numbered)
    regex = isinstance(lora.targets, str) and lora.targets not in (*PRESETS, "all-linear")
    refuse(
        (
            regex and lora.layers_to_transform,
            f"lora.layers_to_transform is set and the target is a regex, {lora.targets!r}; PEFT "
            f"refuses both together. Name the layers in the regex, or name suffixes as targets.",
        ),
        (
            lora.layers_pattern and not lora.layers_to_transform,
            f"lora.layers_pattern, {list(lora.layers_pattern)}, says which numbers "
            f"lora.layers_to_transform means, which is not set. Set it, or leave both out.",
        ),
    )


def _in_layers(lora: LoRA, modules: set[str]) -> set[str]:
    """Return the modules that layers_to_transform lets be adapted.

    As in PEFT, a target that is a module's whole name, "lm_head" for one, is adapted in any case.
    """
    if not lora.layers_to_transform:
        return modules
    numbers = {module: layer_number(module, lora.layers_pattern) for module in modules}
    known = {number for number in numbers.values() if number is not None}
    unknown = sorted(set(lora.layers_to_transform) - known)
    if unknown:
        having = f"the layers 0 to {max(known)}" if known else "no numbered layer"
        raise UserError(
            f"lora.layers_to_transform names the layer {unknown[0]}, but the LoRA targets are in "
            f"{having}{f' after {list(lora.layers_pattern)}' if lora.layers_pattern else ''}."
        )
    named = suffixes_of(lora.targets)
    return {m for m in modules if numbers[m] in lora.layers_to_transform or m in named}


def _chosen(model: Model, homes: Mapping[str, str], lora: LoRA) -> set[str]:
    """Return the modules that lora.targets means; homes: {module: its kernel} of all."""
    parts = {module: model.component(path) for module, path in homes.items()}
    embeddings = [module for module, path in homes.items() if path == embedding_leaf(model)]
    inside = [m for m, part in parts.items() if part in lora.components and m not in embeddings]
    linear = [m for m in inside if parts[m] != "head"]  # PEFT's leaves the output layer alone
    meant = resolve_targets(lora.targets, homes, linear, [*inside, *embeddings])
    for target, found in meant.items():
        if target in PROJECTOR_NAMES and not isinstance(lora.targets, str):
            found += [m for m, part in parts.items() if part == "projector" and m not in found]
        if found:
            continue
        if target == "all-linear":
            holding = {part for module, part in parts.items() if module not in embeddings}
            raise UserError(
                f"The LoRA target 'all-linear' finds no linear layer in the components "
                f"{list(lora.components)}; those that hold some are "
                f"{', '.join(sorted(holding - {'head'}))}. The head is left out, as in PEFT: "
                f"name it, as 'lm_head', to adapt it."
            )
        if target.split(".")[-1] == HEAD and model.config.text.tied:
            raise UserError(
                f"The LoRA target '{target}' is tied to the embedding in this model: the head has "
                f"no weight of its own. Name 'embed_tokens', whose matrices leave the head as it "
                f"is (as in PEFT), or train both in full by modules_to_save=('embed_tokens',)."
            )
        raise no_target(target, inside or homes, f"the {' or '.join(lora.components)}")
    return {module for found in meant.values() for module in found}
