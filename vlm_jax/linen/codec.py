"""The adapters of foreign modules as files: LoRA in PEFT's format, bottleneck adapters in ours.

Foreign modules have names of their own. LoRA's may be renamed to those of a PyTorch model; for
bottleneck adapters adapter_config.json holds the fields of `Adapter`, and in adapter.safetensors
each leaf is a tensor under its path in the variables, float32, a stack's with its layer axis.

A key of LoRA's is `base_model.model.<module>.lora_A.weight` of shape [R, in], or `.lora_B.weight`
[out, R], or of an embedding `.lora_embedding_A` [R, V] and `.lora_embedding_B` [D, R]: ours
transposed, whatever the order of axes in the reference's own weight.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vlm_jax.errors import UserError, nearest
from vlm_jax.files.atomic import ADAPTER_PARTS, whole_directory, write_json
from vlm_jax.files.limits import read_json
from vlm_jax.hub import adapter_files
from vlm_jax.hub.adapter_files import CONFIG, WEIGHTS
from vlm_jax.hub.peft import PREFIX
from vlm_jax.hub.peft_config import read_config
from vlm_jax.hub.tensors import read_tensors
from vlm_jax.hub.unread_weights import check_adapter
from vlm_jax.linen.adapt import adapt, check_module, check_supported
from vlm_jax.linen.adapted import ADAPTER, LORA, Adapted
from vlm_jax.linen.discover import look
from vlm_jax.linen.intercept import warn_without_dropout
from vlm_jax.linen.parts import Layer, Other, joined, unboxed
from vlm_jax.model import Model
from vlm_jax.models.methods import Adapter, LoRA
from vlm_jax.trees import flatten, match, unflatten
from vlm_jax.weights import FourBit, dense

# Dotted names of the module -> those in a file: rows of (regex, replacement), of which the first
# that matches a whole name counts, or a function.
Names = Callable[[str], str] | Sequence[tuple[str, str]] | None

KEY = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
COPY = re.compile(r"(.*)\.base_layer\.weight")
TIED = "embed_tokens"  # the only name under which peft gives a tied head an embedding's LoRA


def named_layers(
    layers: Sequence[Layer], names: Names, every: bool = True
) -> dict[str, tuple[Layer, int | None]]:
    """Return {name in a file: (layer, its number in a stack)}.

    The module's own name of a stack's layer has its number behind the stack's: layers.0.mlp.fc.
    every: whether each layer needs a row of `names`; otherwise those without have no name.
    """
    own: dict[str, tuple[Layer, int | None]] = {}
    for layer in layers:
        if layer.stack is None:
            own[layer.name] = layer, None
            continue
        head = layer.stack.root.replace("/", ".")
        for i in range(layer.stack.count):
            own[f"{head}.{i}{layer.name[len(head) :]}".strip(".")] = layer, i
    if names is None:
        return own
    if callable(names):
        new = {name: names(name) for name in own}
    else:
        table = [(pattern, (pattern, text)) for pattern, text in names]
        last = [] if every else [(".*", None)]
        rows = match([*table, *last], own, "table of names", unused="allow")
        new = {n: re.sub(row[0], row[1], n, count=1) for n, row in rows.items() if row}
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

    variables: {"params": ..., "lora": ...}. names: what its layers are called in the model that
    peft shall load the adapter into: rows of (regex, replacement) over the whole dotted name, or a
    function; without, they keep their own. base: written as base_model_name_or_path.
    fan_in_fan_out: whether those layers hold weights [in, out], as GPT-2's do; the matrices are the
    same either way. The directory appears whole or not at all.
    Raises `UserError` where there is no LoRA, and for an embedding that is a head too under a name
    by which peft leaves the head alone.
    """
    lora = adapted.lora
    if lora is None:
        raise UserError("There is no LoRA to save: this module was adapted without.")
    params = flatten(variables["params"])
    pairs = {layer: pair for layer, pair in adapted.pairs(params, variables)}
    named = named_layers(adapted.layers, names)
    tensors: dict[str, np.ndarray] = {}
    tied = False
    for name, (layer, index) in named.items():
        embedding = layer.weight == "embedding"
        if layer.attended:
            tied = True
            if name.rsplit(".", 1)[-1] != TIED:
                raise UserError(
                    f"The embedding '{layer.name}' has LoRA and is the head too (`attend`). Under "
                    f"the name '{name}' peft would leave the head without it, and give other "
                    f"logits; it ties the two by the name '{TIED}' alone. Name it so by `names`, "
                    f"or write merged weights: vlm_jax.merge(adapted, variables)."
                )
        for letter, leaf in zip("AB", pairs[layer], strict=True):
            one = np.asarray(jax.device_get(leaf), np.float32)
            end = f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight"
            matrix = one if index is None else one[index]
            tensors[f"{PREFIX}{name}.{end}"] = np.ascontiguousarray(matrix.T)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "target_modules": sorted(named),
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": lora.rslora,
        "use_dora": False,
    }
    if tied:
        config["ensure_weight_tying"] = True
    with whole_directory(directory, ADAPTER_PARTS) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)


def load_lora(
    module: nn.Module,
    params: Mapping[str, Any],
    directory: str | Path,
    *,
    names: Names = None,
    inputs: Any = None,
) -> tuple[Adapted, dict[str, Any]]:
    """Return the adapted module and its variables, as `adapt` does, from a PEFT adapter.

    names: as for `save_lora`; inputs: as for `adapt`. Layers of a stack that the file leaves out
    get zero matrices. Raises `UserError` for a key without a home in the module, a matrix without
    its partner, another shape or rank, and whatever of PEFT's kinds is not supported here.
    """
    check_module(module)
    directory = Path(directory).expanduser()
    file = directory / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(
            f"There is no '{file}'. An adapter directory has it, beside adapter_config.json; a "
            f"pickle (adapter_model.bin) is not read: load it with peft and save it again."
        )
    check_adapter(directory, (file.name,))
    config = read_config(directory, also=("fan_in_fan_out",))
    lora = LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        bias=config.get("bias") or "none",
    )
    try:
        check_supported(lora)  # before the tensors, some of which would have no place
    except UserError as error:
        raise UserError(f"The adapter in '{directory}' cannot be loaded: {error}") from error
    flat = flatten(params)
    found = look(module, params, flat, inputs).layers
    layers = [one for one in found if isinstance(one, Layer)]
    named = named_layers(layers, names, every=False)
    matrices: dict[Layer, dict[int | None, dict[str, np.ndarray]]] = {}
    tying, of_head = bool(config.get("ensure_weight_tying")), {}
    for key, tensor in read_tensors(file):
        name = key.removeprefix(PREFIX)
        copy, lora_key = COPY.fullmatch(name), KEY.fullmatch(name)
        if copy and copy[1] in named and named[copy[1]][0].weight == "embedding":
            _check_copy(named[copy[1]][0], flat, tensor, key, directory)
        elif lora_key and lora_key[1] in named:
            layer, index = named[lora_key[1]]
            if bool(lora_key[2]) != (layer.weight == "embedding"):
                raise UserError(f"'{key}' in '{file}' is of another kind than '{layer.name}'.")
            held = matrices.setdefault(layer, {}).setdefault(index, {})
            held[lora_key[3]] = tensor.T
        elif tying and lora_key and not lora_key[2]:  # peft writes the tied head's once more
            of_head[key] = lora_key[3], tensor
        elif tying and copy:
            of_head[key] = "", tensor
        else:
            raise _unmatched(directory, key, found, named)
    if not matrices:
        raise UserError(f"'{file}' holds no LoRA factors.")
    tied = [layer for layer in matrices if layer.attended]
    for key, (letter, tensor) in of_head.items():
        if not any(_is_tied(layer, flat, matrices[layer], letter, tensor) for layer in tied):
            raise _unmatched(directory, key, found, named)
    if tied and not tying:
        raise UserError(
            f"The adapter in '{directory}' has LoRA on the embedding '{tied[0].name}' but not "
            f"ensure_weight_tying, so peft leaves the head without it; here the head is the same "
            f"weight (`attend`). Merge it with peft into a checkpoint with a head of its own."
        )
    adapted_layers = tuple(layer for layer in layers if layer in matrices)
    lora = dataclasses.replace(lora, targets=tuple(layer.name for layer in adapted_layers))
    warn_without_dropout("LoRA", lora.dropout, adapted_layers)
    made = {}
    for layer in adapted_layers:
        for letter in "AB":
            made[joined(layer.path, f"lora_{letter}")] = jnp.asarray(
                _stacked(layer, letter, matrices[layer], lora.rank, file)
            )
    quantized = tuple(layer for layer in layers if isinstance(flat[layer.leaf], FourBit))
    variables = {"params": unflatten(flat), LORA: unflatten(made)}
    return Adapted(module, lora, adapted_layers, quantized), variables


def _stacked(
    layer: Layer, letter: str, held: Mapping[int | None, Mapping[str, np.ndarray]],
    rank: int, file: Path,
) -> np.ndarray:  # fmt: skip
    """Return A or B of a layer, or of its stack, checked against its weight."""
    inside, outside = layer.size
    shape = {"A": (inside, rank), "B": (rank, outside)}[letter]
    for pair in held.values():
        if len(pair) < 2:
            raise UserError(
                f"'{file}' holds lora_{next(iter(pair))} of '{layer.name}' without its partner."
            )
        if pair[letter].shape != shape:
            raise UserError(
                f"'{file}' holds lora_{letter} of '{layer.name}' with the shape "
                f"{list(pair[letter].shape[::-1])}; rank {rank} and the module's weight ask for "
                f"{list(shape[::-1])}. It was made for another base or rank."
            )
    leaf = np.zeros((*layer.layers, *shape), np.float32)
    for index, pair in held.items():
        leaf[... if index is None else index] = pair[letter]
    return leaf


def _same(layer: Layer, flat: Mapping[str, Any], tensor: np.ndarray) -> bool:
    """Return whether a tensor is the layer's own weight."""
    own = np.asarray(dense(unboxed(flat[layer.leaf]), jnp.float32))
    return own.shape == tensor.shape and np.allclose(own, tensor, atol=1e-6)


def _check_copy(
    layer: Layer, flat: Mapping[str, Any], tensor: np.ndarray, key: str, directory: Path
) -> None:
    """Raise where a copy of the embedding, as peft writes it, is not the base's own."""
    if not _same(layer, flat, tensor):
        raise UserError(
            f"The adapter in '{directory}' holds '{key}', a copy of the base's weight that is not "
            f"that of '{layer.name}' here: it was made for another base."
        )


def _is_tied(
    layer: Layer, flat: Mapping[str, Any], held: Mapping[int | None, Mapping[str, np.ndarray]],
    letter: str, tensor: np.ndarray,
) -> bool:  # fmt: skip
    """Return whether a tensor is the head's side of an embedding: its weight, or B and A turned."""
    if not letter:
        return _same(layer, flat, tensor)
    partner = {"A": "B", "B": "A"}[letter]
    return np.array_equal(held.get(None, {}).get(partner, np.empty(0)), tensor)


def _unmatched(
    directory: Path, key: str, found: Sequence[Layer | Other], named: Mapping[str, Any]
) -> UserError:
    others = [one for one in found if isinstance(one, Other) and one.unknown][:2]
    because = "".join(f" '{one.name}' could be none: {one.why}." for one in others)
    return UserError(
        f"The adapter in '{directory}' holds '{key}', for which the module has no place"
        f"{nearest(key.removeprefix(PREFIX), named)}. It belongs to another base, or layers are "
        f"called otherwise there: give `names`, rows of (regex, replacement) from this module's "
        f"names, such as '{next(iter(named), '')}', to those in the file.{because}"
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

    Of a foreign module that `adapt` returned, `params` are its variables, with "adapter", and the
    files' format is our own, which has no name. The directory appears whole or not at all. Raises
    `UserError` where there is none to save.
    """
    if isinstance(model, Model):
        return adapter_files.save_adapter(model, params, directory, name, compare_base=compare_base)
    if (name, compare_base) != ("default", True):
        raise UserError("name and compare_base mean nothing for a foreign module: omit them.")
    adapted, variables = model, params
    if not isinstance(adapted, Adapted) or adapted.adapter is None:
        raise UserError(
            "There is no bottleneck adapter to save: save_adapter takes a model of this library "
            "and its params, or what adapt returned for an Adapter(...). LoRA is saved by "
            "save_lora."
        )
    adapted.bottlenecks(variables)  # raises where they are not this module's
    leaves = {path: jax.device_get(leaf) for path, leaf in flatten(variables[ADAPTER]).items()}
    tensors = {path: np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves.items()}
    config = {"format": FORMAT, **dataclasses.asdict(adapted.adapter)}
    with whole_directory(directory, ADAPTER_PARTS) as folder:
        save_file(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, config)


def load_adapter(
    model: Model | nn.Module,
    params: Mapping[str, Any],
    directory: str | Path,
    *,
    inputs: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Return a model and a new tree with a bottleneck adapter's files in place.

    See `hub.adapter_files.load_adapter`. Of a foreign module, as `adapt` takes it, the adapted
    module and its variables; inputs: as for `adapt`. Raises `UserError` for files of another
    format, and for a leaf that is missing, has no place, or has another shape than asked for.
    """
    if isinstance(model, Model):
        if inputs is not None:
            raise UserError("inputs is for foreign modules; this library's own models need none.")
        return adapter_files.load_adapter(model, params, directory)
    directory = Path(directory).expanduser()
    file = directory / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"There is no '{file}'. A directory that save_adapter wrote has it, beside {CONFIG}; "
            f"LoRA is read by load_lora."
        )
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
    wanted = flatten(variables[ADAPTER])
    held = dict(read_tensors(file))
    for path in sorted(held.keys() ^ wanted.keys()):
        what = "is missing" if path in wanted else "has no place in this module"
        raise UserError(
            f"In '{file}' the tensor '{path}' {what}{nearest(path, wanted.keys() - held.keys())}. "
            f"It is an adapter of another module, or incomplete; nothing was loaded."
        )
    for path, leaf in held.items():
        if leaf.shape != wanted[path].shape:
            raise UserError(
                f"'{file}' holds '{path}' with the shape {list(leaf.shape)}; this module and the "
                f"adapter's reduction_factor ask for {list(wanted[path].shape)}. It was made for "
                f"another module."
            )
    leaves = {path: jnp.asarray(held[path]) for path in wanted}
    return adapted, {**variables, ADAPTER: unflatten(leaves)}
