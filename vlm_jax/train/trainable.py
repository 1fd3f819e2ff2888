"""Trainable parameters: the recipe as a training table; counts as PEFT reports them."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlm_jax.adapters.added_tokens import is_added
from vlm_jax.adapters.modules_to_save import (
    bias_leaves,
    bias_places,
    module_names,
    peft_modules,
    saved_leaves,
    saved_modules,
)
from vlm_jax.adapters.targets import PROJECTOR_NAMES, slots
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.names import stacked_layers
from vlm_jax.trees import Group, Table, flatten, groups_of
from vlm_jax.weights import is_quantized


def training_table(
    model: Model,
    params: Mapping[str, Any],
    *,
    vision_encoder_lr_scale: float = 0.0,
    projector_lr_scale: float = 1.0,
    language_model_lr_scale: float = 1.0,
    lora_enabled: bool = True,
    loraplus_lr_ratio: float = 1.0,
    freeze_layers: int = 0,
    vision_layer_decay: float = 1.0,
    modules_to_save: Iterable[str] | None = None,
) -> list[tuple[str, str]]:
    """Return the ordered (regex, group) rows of the usual VLM recipe for these parameters.

    A component with LoRA factors or bottleneck adapters trains these, and its other leaves are
    frozen; otherwise it trains in full. But the language model, its embeddings and its head are
    frozen where `lora_enabled` or there are adapters, except for `modules_to_save`. Every row
    matches a leaf.

    Args:
        model: of `load` or `add_lora`.
        params: its tree, or shapes: arrays are not read.
        vision_encoder_lr_scale, projector_lr_scale, language_model_lr_scale: the component's share
            of the learning rate; 0.0 freezes it.
        lora_enabled: see above.
        loraplus_lr_ratio: the learning rate of B over that of A, LoRA+
            (https://arxiv.org/abs/2402.12354).
        freeze_layers, vision_layer_decay: see `layerwise_rates`.
        modules_to_save: by default the model's own.

    Raises:
        UserError: for contradictions, and where nothing is left to train.
    """
    paths = list(flatten(params))
    keys = {"vision": "vision_encoder_lr_scale", "projector": "projector_lr_scale"}
    scales = {
        **dict.fromkeys((name for _, name in model.config.COMPONENTS), language_model_lr_scale),
        "vision": vision_encoder_lr_scale,
        "projector": projector_lr_scale,
    }
    language = scales.keys() - keys.keys()
    adapted = {model.component(path) for path in paths if is_lora(path) or is_adapter(path)}
    if modules_to_save is None:
        modules_to_save = model.modules_to_save

    for component in sorted(adapted):
        if scales[component] == 0:
            key = keys.get(component, "language_model_lr_scale")
            raise UserError(
                f"LoRA targets layers of the {component}, or adapters stand in it, but model.{key} "
                f"is 0.0, which freezes it. Set the scale above 0, or remove the {component} from "
                f"lora.target_modules or adapter.components."
            )

    # What is added, then modules to save, biases, and each component as a whole.
    bottlenecks = any(map(is_adapter, paths))
    rows: list[tuple[str, Group]] = []
    for leaves, ratio in _added_leaves(paths, bottlenecks, loraplus_lr_ratio).items():
        own = {p: ratio * scales[name] for p, name in model.config.COMPONENTS if name in adapted}
        kind = "adapter" if bottlenecks else "lora"
        if len(set(own.values())) == 1:  # the usual case reads better as one row
            rows.append((rf".*/{leaves}", _group(kind, next(iter(own.values())))))
        else:
            rows += [(f"(?={p}$).*/{leaves}", _group(kind, scale)) for p, scale in own.items()]
    if any(map(is_added, paths)):
        rows.append((r".*/added", _group("full", language_model_lr_scale)))
    modules = module_names(model, params)
    for name in modules_to_save:
        owners = {model.component(path) for path in saved_leaves(model, params, (name,))}
        known = peft_modules(model, modules, name)
        if owners and all(scales[owner] == 0 for owner in owners):
            key = keys.get(min(owners), "language_model_lr_scale")
            raise UserError(
                f"lora.modules_to_save names '{known[0]}', but model.{key} is 0.0, which freezes "
                f"it. Set the scale above 0 or remove '{known[0]}'."
            )
        if owners <= keys.keys() - adapted:
            continue  # the tower and the projector have rows below
        any_of = "|".join(re.escape(one.replace(".", "/")) for one in known)
        regex = rf".*(?:{any_of})/.*"
        for pattern, component in model.config.COMPONENTS:
            if component in owners:
                row = regex if len(owners) == 1 else f"(?={pattern}$){regex}"
                rows.append((row, _group("full", scales[component])))
    partly = adapted | (language if lora_enabled else set())
    rows += _bias_rows(model, params, {name: scales[name] for name in scales if name in partly})
    if bottlenecks:
        partly |= language
    rows += [
        (pattern, Group() if component in partly else _group("full", scales[component]))
        for pattern, component in model.config.COMPONENTS
    ]

    rows = with_rates(rows, layerwise_rates(model, paths, freeze_layers, vision_layer_decay), paths)
    table = [(row, str(group)) for row, group in rows if any(re.fullmatch(row, p) for p in paths)]
    groups = groups_of(table, paths)
    for path, leaf in flatten(params).items():
        if is_quantized(leaf) and not groups[path].frozen:
            raise UserError(
                f"'{path}' is to be trained, but it is stored in 4 bits, whose codes have no "
                f"gradient. Enable lora for the {model.component(path)} or freeze it by its "
                f"learning-rate scale; or leave it out of the quantization."
            )
    if all(group.frozen for group in groups.values()):
        raise UserError(
            "Nothing is left to train: every component is frozen. Enable lora, or set one of "
            "model.vision_encoder_lr_scale, model.projector_lr_scale and "
            "model.language_model_lr_scale above 0."
        )
    return table


def layerwise_rates(
    model: Model, paths: Sequence[str], freeze_layers: int, vision_layer_decay: float
) -> dict[str, tuple[float, ...] | float]:
    """Return {regex of paths: factor of the rate, or one for each layer of a stack}.

    freeze_layers: blocks of the language model that do not train, from the lowest on.
    vision_layer_decay: what each block of the tower is slower by than the one above it, and what
    lies below the blocks than the lowest (https://arxiv.org/abs/2106.08254, appendix H).
    Raises `UserError` where no block would be left.
    """
    found: dict[str, tuple[float, ...] | float] = {}
    for prefix, count in model.config.stacks.items():
        inside = [path for path in paths if path.startswith(f"{prefix}/")]
        if not inside:
            continue
        component = model.component(inside[0])
        if component == "language_model" and freeze_layers > 0:
            if freeze_layers >= count:
                raise UserError(
                    f"model.freeze_layers is {freeze_layers}, but the language model has {count} "
                    f"layers. Freeze fewer, or set model.language_model_lr_scale=0.0 to freeze it "
                    "all."
                )
            found[f"{prefix}/.*"] = (0.0,) * freeze_layers + (1.0,) * (count - freeze_layers)
        if component == "vision" and vision_layer_decay < 1:
            found[f"{prefix}/.*"] = tuple(vision_layer_decay ** (count - i) for i in range(count))
            for path in paths:
                if model.component(path) == "vision" and path not in inside:
                    if not re.fullmatch(model.config.BEHIND, path):
                        found[re.escape(path)] = vision_layer_decay ** (count + 1)
    return found


def with_rates(
    rows: Sequence[tuple[str, Group]],
    rates: Mapping[str, tuple[float, ...] | float],
    paths: Sequence[str],
) -> list[tuple[str, Group]]:
    """Return the rows of a training table with the rates of `layerwise_rates`.

    A row that trains such leaves gets one above it for them.
    """
    made: list[tuple[str, Group]] = []
    for pattern, group in rows:
        for regex, factor in rates.items() if not group.frozen else ():
            row = f"(?={regex}$){pattern}"
            if any(re.fullmatch(row, path) for path in paths):
                changed = (
                    dataclasses.replace(group, layers=factor)
                    if isinstance(factor, tuple)
                    else dataclasses.replace(group, scale=float(f"{group.scale * factor:g}"))
                )
                made.append((row, changed))
        made.append((pattern, group))
    return made


def _group(kind: str, scale: float) -> Group:
    """Return the group of this learning-rate scale; 0 freezes it."""
    return Group(kind, scale) if scale else Group()


def _added_leaves(paths: Iterable[str], bottlenecks: bool, ratio: float) -> dict[str, float]:
    """Return {regex of what LoRA or adapters add to a layer: its share of the learning rate}."""
    if bottlenecks:
        return {r"adapter_(down|up|norm_before)/.*": 1.0}
    dora = any(path.endswith("/lora_magnitude") for path in paths)
    if ratio != 1:
        return {"lora_B": ratio, r"lora_(A|magnitude)" if dora else "lora_A": 1.0}
    return {r"lora_(A|B|magnitude)" if dora else r"lora_[AB]": 1.0}


def _bias_rows(
    model: Model, params: Mapping[str, Any], scales: Mapping[str, float]
) -> list[tuple[str, Group]]:
    """Return the rows of the biases that `LoRA.bias` trains. scales: of components not in full.

    A component whose scale is 0 stays frozen, and so do its biases.
    """
    owner = {path: model.component(path) for path in bias_leaves(model, params)}
    rows = []
    for component, scale in scales.items():
        modules = [path.rsplit("/", 1)[0] for path, name in owner.items() if name == component]
        if modules and scale != 0:
            rows.append((f"(?:{'|'.join(map(re.escape, modules))})/bias", _group("lora", scale)))
    return rows


def lora_modules_to_save(
    model: Model,
    kernels: Iterable[str],
    *,
    vision_encoder_lr_scale: float,
    projector_lr_scale: float,
    modules_to_save: Iterable[str] = (),
) -> tuple[str, ...]:
    """Return the modules an adapter must hold beside its matrices: all that trains in full.

    kernels: the paths that get LoRA factors (`lora.target_kernels`), or those of adapters;
    a component that holds one trains through these alone.
    """
    names = list(modules_to_save)
    adapted = {model.component(path) for path in kernels}
    family = model.config
    tower = vision_encoder_lr_scale > 0 and "vision" not in adapted
    if tower:
        names.append(family.VISION)
    own = set(family.projectors)
    named = own <= set(names) or bool(PROJECTOR_NAMES.intersection(names) - own)
    if projector_lr_scale > 0 and not (
        "projector" in adapted or (tower and family.projector_in_tower) or named
    ):
        names.append("projector")
    return tuple(names)


def report(
    model: Model, params: Mapping[str, Any], table: Table, learning_rate: float
) -> list[dict[str, Any]]:
    """Return a row for each component and group: component, trains, parameters, learning_rate.

    Of layers that differ it is the highest.
    """
    groups = groups_of(table, flatten(params))
    counts: collections.Counter[tuple[str, Group]] = collections.Counter()
    trains = trained_sizes(model, params, groups)
    for path, size in leaf_sizes(model, params).items():
        counts[model.component(path), groups[path]] += trains[path]
        counts[model.component(path), Group()] += size - trains[path]
    order = ["vision", "projector", "embeddings", "language_model", "head"]
    names = {
        "frozen": "nothing (frozen)",
        "full": "all weights",
        "lora": "LoRA",
        "adapter": "adapters",
    }
    return [
        {
            "component": component,
            "trains": names[group.kind],
            "parameters": count,
            "learning_rate": None
            if group.frozen
            else learning_rate * group.scale * max(group.layers or (1.0,)),
        }
        for (component, group), count in sorted(counts.items(), key=lambda i: order.index(i[0][0]))
        if count
    ]


def leaf_sizes(model: Model, params: Mapping[str, Any]) -> dict[str, int]:
    """Return {path: its parameters}; a 4-bit leaf counts as the dense one that it stands for.

    Of an adapter only what is a parameter in PEFT too: not the zeros that fill up a stack where
    layers differ, nor scales and copies of where matrices started. `params` may be shapes.
    """
    flat = flatten(params)
    return {path: sum(_sizes(model, flat, path)) for path in flat}


def trained_sizes(
    model: Model, params: Mapping[str, Any], groups: Mapping[str, Group]
) -> dict[str, int]:
    """Return {path: those of its parameters that train}. groups: of a training table, by path."""
    flat, found = flatten(params), {}
    for path in flat:
        sizes, group = _sizes(model, flat, path), groups[path]
        factors = group.layers or [float(not group.frozen)] * len(sizes)
        found[path] = sum(size for size, f in zip(sizes, factors, strict=True) if f)
    return found


def _sizes(model: Model, flat: Mapping[str, Any], path: str) -> list[int]:
    """Return the parameters of each layer of a leaf."""
    if not is_lora(path) or model.lora is None:
        layers = stacked_layers(model, path) or 1
        return [math.prod(flat[path].shape) // layers] * layers
    base, name = path.rsplit("/", 1)
    ranks = [slot.rank for slot in slots(model, model.lora, path)]
    inputs, outputs = flat[f"{base}/lora_A"].shape[-2], flat[f"{base}/lora_B"].shape[-1]
    each = {"lora_A": inputs, "lora_B": outputs}
    if name in each:
        return [each[name] * rank for rank in ranks]
    return [outputs * (rank > 0) * (name == "lora_magnitude") for rank in ranks]


def count_parameters(
    model: Model, params: Mapping[str, Any], table: Table | None = None
) -> tuple[int, int]:
    """Return (trainable, all), equal to PEFT's `get_nb_trainable_parameters()`.

    All are those of the reference's model: with tensors that nothing here reads, and with modules
    of modules_to_save twice, as PEFT keeps the base's beside the trained copy. table: a training
    table; without one what an adapter holds trains, or everything where there is no adapter.
    `params` may be shapes, as of `model.abstract()`.
    """
    sizes = leaf_sizes(model, params)
    copied = saved_modules(model, params, model.modules_to_save).leaves
    if table is not None:
        trained = trained_sizes(model, params, groups_of(table, sizes))
    elif model.lora is not None or model.adapter is not None:
        own = [path for path in sizes if is_lora(path) or is_adapter(path) or path in copied]
        trained = {path: sizes[path] for path in own}
        for name, place in bias_places(model, params).items():  # of some layers of a stack, maybe
            if place.path not in copied:
                trained[name] = math.prod(place.shape)
    else:
        trained = sizes
    twice = sum(sizes[path] for path in copied)
    return sum(trained.values()), sum(sizes.values()) + model.config.unused_parameters + twice


def trainable_line(model: Model, params: Mapping[str, Any], table: Table | None = None) -> str:
    """Return PEFT's line: trainable params: … || all params: … || trainable%: …"""
    trained, every = count_parameters(model, params, table)
    return (
        f"trainable params: {trained:,d} || all params: {every:,d} || "
        f"trainable%: {100 * trained / every:.4f}"
    )


def print_trainable_parameters(
    model: Model, params: Mapping[str, Any], table: Table | None = None
) -> None:
    """Print how many parameters train, of how many; see `count_parameters`."""
    print(trainable_line(model, params, table))
