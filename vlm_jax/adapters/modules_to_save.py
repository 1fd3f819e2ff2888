"""PEFT's `modules_to_save` and `bias`: modules and biases that an adapter holds in full."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from vlm_jax.adapters.added_tokens import is_added
from vlm_jax.adapters.targets import ANY_PROJECTOR, PROJECTOR_NAMES
from vlm_jax.errors import UserError, nearest
from vlm_jax.model import Model
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.names import Place, current_name, disk_places, is_unused, stacked_layers
from vlm_jax.trees import flatten


@dataclasses.dataclass(frozen=True)
class SavedModules:
    """The modules that an adapter holds in full.

    names: those that PEFT needs. places: the tensors in them, by their name in the current
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
    return disk_places(
        model,
        {
            path: leaf.shape
            for path, leaf in flatten(params).items()
            if not (is_lora(path) or is_added(path) or is_adapter(path))
        },
    )


def unused_names(model: Model) -> list[str]:
    """Return the tensors of the base and of a loaded adapter that nothing here reads."""
    held = [] if model.source is None else [current_name(model, n) for n in model.source.tensors]
    return [name for name in dict.fromkeys((*held, *model.unused)) if is_unused(model, name)]


def module_names(model: Model, params: Mapping[str, Any]) -> set[str]:
    """Return the full names of the reference's modules that hold tensors."""
    return {
        module
        for tensor in (*base_places(model, params), *unused_names(model))
        for module in owners(tensor)
    }


def peft_modules(model: Model, modules: Iterable[str], name: str) -> tuple[str, ...]:
    """Return what a name of modules_to_save means as PEFT knows it; () where it means no module.

    modules: those of `module_names`. The projector goes by several names and may be several
    modules, and full names come in several layouts.
    """
    known = filter(None, (name, current_name(model, f"{name}.").removesuffix(".")))
    own = next((one for one in known if any(m.endswith(one) for m in modules)), None)
    if name in PROJECTOR_NAMES and (own is None or name in ANY_PROJECTOR):
        return model.config.projectors
    # A list of modules, which PEFT cannot hold, stands for its members.
    lists = {one: one.rpartition(".")[0] for one in model.config.projectors if "." in one}
    members = tuple(one for one, outer in lists.items() if own and own.endswith(outer))
    return members or (() if own is None else (own,))


def saved_modules(model: Model, params: Mapping[str, Any], names: Iterable[str]) -> SavedModules:
    """Return what `modules_to_save` means, exactly as PEFT reads it.

    A name means every module whose full dotted name ends with it, whole parts or not, a layer's
    number included: "norm" is also each input_layernorm, and "layers.0.mlp" one of many. Where one
    such module lies within another, which PEFT cannot save, the full names of the outer ones stand
    for all. `params` may be shapes. Raises `UserError` for a name that no module ends with.
    """
    places, unused = base_places(model, params), unused_names(model)
    modules = module_names(model, params)
    known: list[str] = []
    for name in names:
        found = peft_modules(model, modules, name)
        if not found:
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
        known += found
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
        held = [place.layer for place in saved.places.values() if place.path == path]
        if len(held) < (stacked_layers(model, path) or 1):
            raise UserError(
                f"modules_to_save, {list(names)}, means only layers {held[:8]} of '{path}'. Layers "
                f"are stacked here, so to train one in full name a module that all of them have, "
                f"without a layer's number."
            )
    return saved.leaves


def bias_places(model: Model, params: Mapping[str, Any]) -> dict[str, Place]:
    """Return {tensor name: its place} of the biases that `LoRA.bias` says an adapter holds."""
    if model.lora is None or model.lora.bias == "none":
        return {}
    flat, out = flatten(params), {f"{module}.bias" for module in model.lora.left_out}
    return {
        name: place
        for name, place in base_places(model, params).items()
        if place.path.endswith("/bias")
        and (model.lora.bias == "all" or place.path.replace("/bias", "/lora_A") in flat)
        and (model.lora.bias == "all" or name not in out)
    }


def bias_leaves(model: Model, params: Mapping[str, Any]) -> list[str]:
    """Return the leaves of `bias_places`, which train whole.

    Raises `UserError` where some layers of a stack are not adapted, whose biases "lora_only" would
    leave frozen.
    """
    held = collections.Counter(place.path for place in bias_places(model, params).values())
    for path, count in held.items():
        if count < (stacked_layers(model, path) or 1):
            raise UserError(
                f"bias='lora_only' would train {count} of the {stacked_layers(model, path)} layers "
                f"of '{path}', those with LoRA. Layers are stacked here, so a bias trains "
                f"in all of them or in none: adapt all layers, or set bias to 'all' or 'none'."
            )
    return list(held)
