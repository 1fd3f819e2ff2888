"""Trainable parameters: the recipe as a training table; counts as PEFT reports them."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlm_jax.adapters.added_tokens import is_added
from vlm_jax.adapters.modules_to_save import (
    bias_leaves,
    bias_places,
    module_names,
    peft_module,
    saved_leaves,
    saved_modules,
)
from vlm_jax.adapters.targets import PROJECTOR_NAMES, slots
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.names import stacked_layers
from vlm_jax.train.optimizer import layerwise_rates, with_rates
from vlm_jax.trees import FROZEN, Table, flatten, layer_factors, match, parse_group
from vlm_jax.weights import is_quantized


def _group(method: str, scale: float) -> str:
    if scale == 0:
        return FROZEN
    return method if scale == 1 else f"{method}({scale!r})"


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
    scales = {"vision": vision_encoder_lr_scale, "projector": projector_lr_scale}
    keys = {"vision": "vision_encoder_lr_scale", "projector": "projector_lr_scale"}
    adapted = {model.component(path) for path in paths if is_lora(path) or is_adapter(path)}
    if modules_to_save is None:
        modules_to_save = model.modules_to_save

    def scale_of(component: str) -> float:
        return scales.get(component, language_model_lr_scale)

    for component in sorted(adapted):
        if scale_of(component) == 0:
            key = keys.get(component, "language_model_lr_scale")
            raise UserError(
                f"LoRA targets layers of the {component}, or adapters stand in it, but model.{key} "
                f"is 0.0, which freezes it. Set the scale above 0, or remove the {component} from "
                f"lora.target_modules or adapter.components."
            )

    dora = any(path.endswith("/lora_magnitude") for path in paths)
    kinds = {r"lora_(A|B|magnitude)" if dora else r"lora_[AB]": 1.0}
    if loraplus_lr_ratio != 1:
        kinds = {"lora_B": loraplus_lr_ratio, r"lora_(A|magnitude)" if dora else "lora_A": 1.0}
    method = "lora"
    if any(map(is_adapter, paths)):
        method, kinds = "adapter", {r"adapter_(down|up|norm_before)/.*": 1.0}
    rows: list[tuple[str, str]] = []
    for leaves, ratio in kinds.items():
        own = {p: ratio * scale_of(name) for p, name in model.config.COMPONENTS if name in adapted}
        if len(set(own.values())) == 1:  # the usual case reads better as one row
            rows.append((rf".*/{leaves}", _group(method, next(iter(own.values())))))
        else:
            rows += [(f"(?={p}$).*/{leaves}", _group(method, scale)) for p, scale in own.items()]
    if any(is_added(path) for path in paths):
        rows.append((r".*/added", _group("full", language_model_lr_scale)))
    modules = module_names(model, params)
    for name in modules_to_save:
        owners = {model.component(path) for path in saved_leaves(model, params, (name,))}
        known = peft_module(model, modules, name)
        assert known is not None
        if owners and all(scale_of(owner) == 0 for owner in owners):
            key = keys.get(min(owners), "language_model_lr_scale")
            raise UserError(
                f"lora.modules_to_save names '{known}', but model.{key} is 0.0, which freezes it. "
                f"Set the scale above 0 or remove '{known}'."
            )
        if owners <= scales.keys() - adapted:
            continue  # the tower and the projector have rows below
        regex = rf".*{re.escape(known.replace('.', '/'))}/.*"
        for pattern, component in model.config.COMPONENTS:
            if component in owners:
                row = regex if len(owners) == 1 else f"(?={pattern}$){regex}"
                rows.append((row, _group("full", scale_of(component))))
    rows += _bias_rows(
        model,
        params,
        {
            component: scale_of(component)
            for _, component in model.config.COMPONENTS
            if component in adapted or (component not in scales and lora_enabled)
        },
    )
    for pattern, component in model.config.COMPONENTS:
        language = component not in scales
        if component in adapted or (language and (lora_enabled or method == "adapter")):
            rows.append((pattern, FROZEN))
        else:
            rows.append((pattern, _group("full", scale_of(component))))

    rates = layerwise_rates(model, paths, freeze_layers, vision_layer_decay)
    rows = with_rates(rows, rates, paths)
    rows = [row for row in rows if any(re.fullmatch(row[0], path) for path in paths)]
    groups = match(rows, paths, "training table")
    for path, leaf in flatten(params).items():
        if is_quantized(leaf) and groups[path] != FROZEN:
            raise UserError(
                f"'{path}' is to be trained, but it is stored in 4 bits, whose codes have no "
                f"gradient. Enable lora for the {model.component(path)} or freeze it by its "
                f"learning-rate scale; or leave it out of the quantization."
            )
    if all(group == FROZEN for group in groups.values()):
        raise UserError(
            "Nothing is left to train: every component is frozen. Enable lora, or set one of "
            "model.vision_encoder_lr_scale, model.projector_lr_scale and "
            "model.language_model_lr_scale above 0."
        )
    return rows


def _bias_rows(
    model: Model, params: Mapping[str, Any], scales: Mapping[str, float]
) -> list[tuple[str, str]]:
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
    # The projector may lie inside the tower, as Qwen2-VL's, or beside it.
    inside = any(
        component == "projector" and re.split(r"[^\w]", pattern).count(family.VISION)
        for pattern, component in family.COMPONENTS
    )
    tower = vision_encoder_lr_scale > 0 and "vision" not in adapted
    if tower:
        names.append(family.VISION)
    named = any(name in (*PROJECTOR_NAMES, family.PROJECTOR) for name in names)
    if projector_lr_scale > 0 and not ("projector" in adapted or (tower and inside) or named):
        names.append("projector")
    return tuple(names)


def report(
    model: Model, params: Mapping[str, Any], table: Table, learning_rate: float
) -> list[dict[str, Any]]:
    """Return a row for each component and group: component, trains, parameters, learning_rate.

    Of layers that differ it is the highest.
    """
    flat = flatten(params)
    groups = match(table, flat, "training table")
    counts: dict[tuple[str, str], int] = {}
    trains = trained_sizes(model, params, groups)
    for path, size in leaf_sizes(model, params).items():
        for group, count in ((groups[path], trains[path]), (FROZEN, size - trains[path])):
            key = (model.component(path), group)
            counts[key] = counts.get(key, 0) + count
    counts = {key: count for key, count in counts.items() if count}
    order = ["vision", "projector", "embeddings", "language_model", "head"]
    rows = []
    for (component, group), count in sorted(counts.items(), key=lambda i: order.index(i[0][0])):
        method, scale = parse_group(group)
        names = {"frozen": "nothing (frozen)", "full": "all weights", "lora": "LoRA"}
        names["adapter"] = "adapters"
        fastest = max(layer_factors(group) or (1.0,))
        rate = None if method == FROZEN else learning_rate * scale * fastest
        rows.append(
            {
                "component": component,
                "trains": names[method],
                "parameters": count,
                "learning_rate": rate,
            }
        )
    return rows


def leaf_sizes(model: Model, params: Mapping[str, Any]) -> dict[str, int]:
    """Return {path: its parameters}; a 4-bit leaf counts as the dense one that it stands for.

    Of an adapter only what is a parameter in PEFT too: not the zeros that fill up a stack where
    layers differ, nor scales and copies of where matrices started. `params` may be shapes.
    """
    flat = flatten(params)
    return {path: sum(_sizes(model, flat, path)) for path in flat}


def trained_sizes(
    model: Model, params: Mapping[str, Any], groups: Mapping[str, str]
) -> dict[str, int]:
    """Return {path: those of its parameters that train}. groups: of a training table, by path."""
    flat, found = flatten(params), {}
    for path in flat:
        sizes, factors = _sizes(model, flat, path), layer_factors(groups[path])
        if parse_group(groups[path])[0] == FROZEN:
            found[path] = 0
        else:
            moves = [1.0] * len(sizes) if factors is None else factors
            found[path] = sum(size for size, f in zip(sizes, moves, strict=True) if f)
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
        trained = trained_sizes(model, params, match(table, sizes, "training table"))
    elif model.lora is not None or model.adapter is not None:
        own = [path for path in sizes if is_lora(path) or is_adapter(path) or path in copied]
        trained = {path: sizes[path] for path in own}
        for name, place in bias_places(model, params).items():  # of some layers of a stack, maybe
            if place.path not in copied:
                trained[name] = math.prod(place.shape)
    else:
        trained = sizes
    every = sum(sizes.values()) + model.config.unused_parameters
    every += sum(sizes[path] for path in copied)
    return sum(trained.values()), every


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
