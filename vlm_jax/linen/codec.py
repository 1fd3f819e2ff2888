"""The adapters of foreign modules as files: LoRA in PEFT's format, bottleneck adapters in ours.

Foreign modules have names of their own. LoRA's may be renamed to those of a PyTorch model; for
bottleneck adapters adapter_config.json holds the fields of `Adapter`, and in adapter.safetensors
each leaf is a tensor under its path in the variables, float32, a stack's with its layer axis.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError, explained
from vlm_jax.files.limits import read_json
from vlm_jax.hub import adapter_files
from vlm_jax.hub.adapter_files import CONFIG, WEIGHTS
from vlm_jax.hub.peft_config import config_of, read_config
from vlm_jax.hub.peft_files import (
    Home,
    Matrices,
    another_base,
    is_same,
    no_home,
    parse_key,
    stacked,
    to_tensors,
    unstacked,
    write_adapter,
)
from vlm_jax.hub.tensors import read_tensors
from vlm_jax.hub.unread_weights import PEFT_WEIGHTS, adapter_weights
from vlm_jax.linen.adapt import adapt, check_module, check_supported
from vlm_jax.linen.adapted import ADAPTER, LORA, Adapted
from vlm_jax.linen.discover import look
from vlm_jax.linen.intercept import warn_without_dropout
from vlm_jax.linen.parts import Layer, Other, joined, unboxed
from vlm_jax.model import Model
from vlm_jax.models.methods import Adapter
from vlm_jax.trees import flatten, match, unflatten
from vlm_jax.weights import FourBit, dense

# Dotted names of the module -> those in a file: rows of (regex, replacement), of which the first
# that matches a whole name counts, or a function.
Names = Callable[[str], str] | Sequence[tuple[str, str]] | None

TIED = "embed_tokens"  # the only name under which peft gives a tied head an embedding's LoRA


def named_layers(
    layers: Sequence[Layer], names: Names, every: bool = True
) -> dict[str, tuple[Layer, int | None]]:
    """Return {name in a file: (layer, its number in a stack)}.

    every: whether each layer needs a row of `names`; otherwise those without have no name.
    """
    own = {name: (layer, i) for layer in layers for name, i in layer.names.items()}
    if names is None:
        return own
    if callable(names):
        new = {name: names(name) for name in own}
    else:
        table = [*((row[0], row) for row in names), *([] if every else [(".*", None)])]
        rows = match(table, own, "table of names", unused="allow")
        new = {name: re.sub(row[0], row[1], name, count=1) for name, row in rows.items() if row}
    named: dict[str, tuple[Layer, int | None]] = {}
    for name, given in new.items():
        if given in named:
            raise UserError(
                f"The names give '{given}' to two layers, '{name}' among them: the file could hold "
                f"only one. Make each row keep what tells layers apart, their numbers for one."
            )
        named[given] = own[name]
    return named


def save_lora(
    adapted: Adapted,
    variables: Mapping[str, Any],
    directory: str | Path,
    *,
    names: Names = None,
    base: str | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write the LoRA of a foreign module as a PEFT adapter.

    The directory appears whole or not at all.

    Args:
        adapted: the adapted module.
        variables: {"params": ..., "lora": ...}.
        directory: to write.
        names: of its layers in the model that peft shall load the adapter into: rows of (regex,
            replacement) over the whole dotted name, or a function; None: they keep their own.
        base: written as base_model_name_or_path.
        fan_in_fan_out: whether those layers hold weights [in, out], as GPT-2's do; the matrices are
            the same either way.

    Raises:
        UserError: where there is no LoRA, and for an embedding that is a head too under a name by
            which peft leaves the head alone.
    """
    lora = adapted.lora
    if lora is None:
        raise UserError("There is no LoRA to save: this module was adapted without.")
    adapted.pairs(flatten(variables["params"]), variables)  # raises where they are not its own
    named = named_layers(adapted.layers, names)
    for name, (layer, _) in named.items():
        if layer.attended and name.rsplit(".", 1)[-1] != TIED:
            raise UserError(
                f"The embedding '{layer.name}' has LoRA and is the head too (`attend`). Under the "
                f"name '{name}' peft would leave the head without it, and give other logits; it "
                f"ties the two by the name '{TIED}' alone. Name it so by `names`, or write merged "
                f"weights: vlm_jax.merge(adapted, variables)."
            )
    homes = {name: _home(*where) for name, where in named.items()}
    flat = {path: unboxed(leaf) for path, leaf in flatten(variables[LORA]).items()}
    tensors = to_tensors(unstacked(flat, homes, dict.fromkeys(homes, lora.rank)), homes)
    tied = {"ensure_weight_tying": True} if any(one.attended for one in adapted.layers) else {}
    write_adapter(
        directory,
        {key: tensor.astype(np.float32) for key, tensor in tensors.items()},
        config_of(
            lora,
            {
                "target_modules": sorted(named),
                **dict.fromkeys(("modules_to_save", "layers_to_transform", "layers_pattern")),
            },
            base_model_name_or_path=base,
            fan_in_fan_out=fan_in_fan_out,
            **tied,
        ),
    )


def _home(layer: Layer, index: int | None) -> Home:
    return Home(
        joined(layer.path, ""), index, (*layer.layers, *layer.size), layer.weight == "embedding"
    )


def load_lora(
    module: nn.Module,
    params: Mapping[str, Any],
    directory: str | Path,
    *,
    names: Names = None,
    inputs: Any = None,
) -> tuple[Adapted, dict[str, Any]]:
    """Return the adapted module and its variables, as `adapt` does, from a PEFT adapter.

    Layers of a stack that the file leaves out get zero matrices.

    Args:
        module: any Linen module.
        params: its "params" collection.
        directory: the PEFT adapter's.
        names: as for `save_lora`.
        inputs: as for `adapt`.

    Raises:
        UserError: for a key without a home in the module, a matrix without its partner, another
            shape or rank, and whatever of PEFT's kinds is not supported here.
    """
    check_module(module)
    directory, file = adapter_weights(directory, PEFT_WEIGHTS)
    config, lora = read_config(directory, also=("fan_in_fan_out",))
    with explained(
        UserError, lambda error: f"The adapter in '{directory}' cannot be loaded: {error}"
    ):
        check_supported(lora)  # before the tensors, some of which would have no place
    flat = flatten(params)
    found = look(module, params, flat, inputs).layers.values()
    layers = [one for one in found if isinstance(one, Layer)]
    named = named_layers(layers, names, every=False)
    homes = {name: _home(*where) for name, where in named.items()}
    matrices: Matrices = {}
    tying, of_head = bool(config.get("ensure_weight_tying")), {}
    for key, tensor in read_tensors(file):
        parsed = parse_key(key)
        name = parsed.name if parsed.leaf else parsed.name.removesuffix(".weight")
        home = homes.get(name)
        if parsed.copy and home is not None and home.embedding:
            if not is_same(tensor, _weight(named[name][0], flat)):
                raise another_base(directory, key, parsed.name, config)
        elif parsed.leaf and home is not None:
            if parsed.embedding != home.embedding:
                raise UserError(f"'{key}' in '{file}' is of another kind than '{name}'.")
            matrices.setdefault(name, {})[parsed.leaf] = tensor.T
        elif tying and (parsed.copy or (parsed.leaf and not parsed.embedding)):
            of_head[key] = parsed.leaf, tensor  # peft writes the tied head's once more
        else:
            raise _unmatched(directory, key, name, found, homes)
    if not matrices:
        raise UserError(f"'{file}' holds no LoRA factors.")
    tied = [name for name in matrices if named[name][0].attended]
    for key, (leaf, tensor) in of_head.items():
        # The head's side of an embedding: its weight, or its B and A turned.
        own = [
            matrices[name].get({"lora_A": "lora_B", "lora_B": "lora_A"}.get(leaf, ""))
            if leaf
            else _weight(named[name][0], flat)
            for name in tied
        ]
        if not any(is_same(tensor, one) for one in own if one is not None):
            raise _unmatched(directory, key, key, found, homes)
    if tied and not tying:
        raise UserError(
            f"The adapter in '{directory}' has LoRA on the embedding '{tied[0]}' but not "
            f"ensure_weight_tying, so peft leaves the head without it; here the head is the same "
            f"weight (`attend`). Merge it with peft into a checkpoint with a head of its own."
        )
    made = stacked(matrices, homes, dict.fromkeys(matrices, lora.rank), False, file)
    held = {named[name][0] for name in matrices}
    adapted = tuple(layer for layer in layers if layer in held)
    lora = dataclasses.replace(lora, targets=tuple(layer.name for layer in adapted))
    warn_without_dropout(
        "LoRA", lora.dropout, [layer.name for layer in adapted if not layer.takes_dropout]
    )
    return (
        Adapted(
            module,
            lora,
            adapted,
            tuple(layer for layer in layers if isinstance(flat[layer.leaf], FourBit)),
        ),
        {"params": unflatten(flat), LORA: jax.tree.map(jnp.asarray, unflatten(made))},
    )


def _weight(layer: Layer, flat: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(dense(unboxed(flat[layer.leaf]), jnp.float32))


def _unmatched(
    directory: Path, key: str, name: str, found: Iterable[Layer | Other], known: Mapping[str, Any]
) -> UserError:
    others = [one for one in found if isinstance(one, Other) and one.unknown][:2]
    because = "".join(f" '{one.name}' could be none: {one.why}." for one in others)
    return no_home(
        directory,
        key,
        name,
        known,
        f"It belongs to another base, or layers are called otherwise there: give `names`, rows of "
        f"(regex, replacement) from this module's names, such as '{next(iter(known), '')}', to "
        f"those in the file.{because}",
    )


FORMAT = "vlm_jax.adapt 1"


def save_adapter(
    model: Model | Adapted,
    params: Mapping[str, Any],
    directory: str | Path,
    name: str = "default",
    *,
    compare_base: bool = True,
) -> None:
    """Write the bottleneck adapter of a model, see `hub.adapter_files.save_adapter`.

    The directory appears whole or not at all. The files' format of a foreign module is our own.

    Args:
        model: a model of this library, or a foreign module that `adapt` returned.
        params: its tree, or of a foreign module its variables, with "adapter".
        directory: to write.
        name: the adapter's, for a model of this library alone.
        compare_base: as for `save_peft`, for a model of this library alone.

    Raises:
        UserError: where there is no bottleneck adapter to save.
    """
    if isinstance(model, Model):
        return adapter_files.save_adapter(model, params, directory, name, compare_base=compare_base)
    if (name, compare_base) != ("default", True):
        raise UserError("name and compare_base mean nothing for a foreign module: omit them.")
    if not isinstance(model, Adapted) or model.adapter is None:
        raise UserError(
            "There is no bottleneck adapter to save: save_adapter takes a model of this library "
            "and its params, or what adapt returned for an Adapter(...). LoRA is saved by "
            "save_lora."
        )
    model.bottlenecks(params)  # raises where they are not this module's
    tensors = {
        path: np.ascontiguousarray(leaf, np.float32)
        for path, leaf in jax.device_get(flatten(params[ADAPTER])).items()
    }
    config = {"format": FORMAT, **dataclasses.asdict(model.adapter)}
    write_adapter(directory, tensors, config, WEIGHTS)


def load_adapter(
    model: Model | nn.Module,
    params: Mapping[str, Any],
    directory: str | Path,
    *,
    inputs: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Return a model and a new tree with a bottleneck adapter's files in place.

    See `hub.adapter_files.load_adapter`. Of a foreign module, the adapted module and its variables.

    Args:
        model: a model of this library, or a foreign module as `adapt` takes it.
        params: its tree, or of a foreign module its "params" collection.
        directory: the adapter's.
        inputs: as for `adapt`, for a foreign module alone.

    Raises:
        UserError: for files of another format, and for a leaf that is missing, has no place, or has
            another shape than asked for.
    """
    if isinstance(model, Model):
        if inputs is not None:
            raise UserError("inputs is for foreign modules; this library's own models need none.")
        return adapter_files.load_adapter(model, params, directory)
    directory, file = adapter_weights(directory, WEIGHTS)
    config = read_json(directory / CONFIG)
    names = {field.name for field in dataclasses.fields(Adapter)}
    if config.pop("format", None) != FORMAT or config.keys() != names:
        raise UserError(
            f"The {CONFIG} in '{directory}' is not that of an adapter of a foreign module, as "
            f"save_adapter writes it (format '{FORMAT}'). An adapter of this library's own models "
            f"goes onto such a model: load_adapter(model, params, directory)."
        )
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    adapted, variables = adapt(model, params, Adapter(**fields), inputs=inputs)
    wanted = {path: leaf.shape for path, leaf in flatten(variables[ADAPTER]).items()}
    held = dict(read_tensors(file))
    adapter_files.check_tensors(file, held, wanted)
    return adapted, {**variables, ADAPTER: jax.tree.map(jnp.asarray, unflatten(held))}
