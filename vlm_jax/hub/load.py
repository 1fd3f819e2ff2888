"""Loads a Hugging Face checkpoint directory into (model, params), tensor by tensor."""

import copy
import functools
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError, explained
from vlm_jax.files.limits import read_json
from vlm_jax.hub.base import CheckpointFiles, named_base
from vlm_jax.hub.leaves import Tensor, read_leaf
from vlm_jax.hub.tensors import SAFETENSORS, Entry, find_tensors, read_tensor
from vlm_jax.hub.unread_weights import check_base
from vlm_jax.model import Model, Source, from_config
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.names import Place, current_name, disk_places, embedding_name, is_unused
from vlm_jax.quantization import Quantize, described, storages
from vlm_jax.sharding import laid_out, param_shardings
from vlm_jax.trees import flatten, unflatten
from vlm_jax.weights import bnb

# What a run needs of a hub repository; never its pickles or other frameworks' weights.
NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
SETTINGS = [pattern for pattern in NEEDED if pattern != "*.safetensors"]
HEAD = "lm_head.weight"
THREADS = min(4, os.cpu_count() or 1)  # each holds one tensor as it is on disk


def resolve(
    path_or_repo_id: str,
    revision: str | None = None,
    token: str | None = None,
    weights: bool = True,
    files: Sequence[str] = (),
) -> Path:
    """Return the local directory of a checkpoint, downloading a hub repository if it is one.

    weights: False fetches only the small files: config, tokenizer, image settings. files: these
    alone.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and (path / "adapter_config.json").is_file():
            raise UserError(
                f"'{path}' is an adapter, not a whole checkpoint. Give its base, "
                f"{named_base(path)!r} by its own account, as the model, and this directory as "
                f"the adapter."
            )
        return path
    looks_local = path.is_absolute() or str(path_or_repo_id).startswith((".", "~"))
    if looks_local or path.exists() or str(path_or_repo_id).count("/") != 1:
        raise UserError(
            f"There is no checkpoint directory '{path_or_repo_id}'. Expected a directory with "
            f"config.json and *.safetensors, or a Hugging Face hub id such as "
            f"'Qwen/Qwen2-VL-2B-Instruct'."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    with explained(
        (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError),
        lambda error: (
            f"'{path_or_repo_id}' is not a local directory, and it could not be fetched from the "
            f"Hugging Face hub (revision {revision or 'main'}): {str(error).splitlines()[0]} "
            f"Check the spelling, the network, and for gated models your token."
        ),
    ):
        found = snapshot_download(
            path_or_repo_id,
            revision=revision,
            token=token,
            allow_patterns=list(files) or (NEEDED if weights else SETTINGS),
        )
    return Path(found)


def read_hf_config(path_or_repo_id: str, revision: str | None) -> dict[str, Any]:
    """Return the config.json of a checkpoint directory or hub id; no other file is fetched.

    The hub ids of `models.reference_configs`, at their default revision, need no network. Raises
    `UserError` where there is neither a directory nor such a repository.
    """
    is_known = path_or_repo_id in KNOWN and revision is None
    if is_known and not Path(path_or_repo_id).expanduser().is_dir():
        return copy.deepcopy(KNOWN[path_or_repo_id])
    with explained(
        UserError, lambda error: f"{error} Known without a network: {', '.join(KNOWN)}."
    ):
        directory = resolve(path_or_repo_id, revision, files=("config.json",))
    return read_json(directory / "config.json")


def _check_names(
    model: Model, named: Mapping[str, str], places: Mapping[str, Place], directory: Path
) -> None:
    """Raise for missing and left-over tensors; named: {current name: name on disk}."""
    missing = [name for name in places if name not in named]
    # A tied head is the embedding; a copy of it on disk is not read.
    read = {*places, HEAD} if model.config.text.tied else places
    left = [
        on_disk
        for name, on_disk in named.items()
        if name not in read and not is_unused(model, name)
    ]
    if missing or left:
        raise UserError(
            f"The tensors in '{directory}' do not fit its config.json. "
            + (f"Missing ({len(missing)}): {', '.join(missing[:4])}. " if missing else "")
            + (f"Left over ({len(left)}): {', '.join(left[:4])}. " if left else "")
            + "Every tensor must have its place: check that config.json belongs to these weights."
        )


def _check_sizes(
    model: Model, entries: dict[str, Entry], places: dict[str, Place], named: Mapping[str, str]
) -> None:
    """Raise where a dense tensor has another shape than config.json says, before room is made."""
    stored = {bnb.weight_of(name) for name in entries}
    for name, place in places.items():
        entry = entries[named[name]]
        if entry.shape == place.shape or named[name] in stored:
            continue
        wrong = set(place.shape) - set(entry.shape)
        keys = ", ".join(f"{key} = {n}" for key, n in _numbers(model.hf_config) if n in wrong)
        raise UserError(
            f"The tensor '{named[name]}' in '{entry.path}' has the shape {list(entry.shape)}; "
            f"config.json asks for {list(place.shape)}{f' ({keys})' if keys else ''}. Use the "
            f"config.json that belongs to these weights."
        )


def _numbers(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the whole numbers of a config.json with the keys that lead to each."""
    return [
        (path.replace("/", "."), value)
        for path, value in flatten(config).items()
        if isinstance(value, int)
    ]


def _check_layers(model: Model, named: Iterable[str], directory: Path) -> None:
    """Raise where the files hold another number of layers than config.json says."""
    for stack, layers in model.config.stacks.items():
        layer = re.compile(rf"{re.escape(stack.replace('/', '.'))}\.(\d{{1,9}})\.")
        found = {int(hit[1]) for name in named if (hit := layer.match(name))}
        if found and max(found) + 1 != layers:
            keys = [
                key
                for key, n in _numbers(model.hf_config)
                if n == layers > 1 and key.endswith(("layers", "depth"))
            ]
            raise UserError(
                f"The weights in '{directory}' have the layers 0 to {max(found)} of "
                f"'{stack.replace('/', '.')}', but config.json asks for {layers} layers "
                f"({', '.join(keys) or 'config.json'}). Use the config.json that belongs to these "
                f"weights."
            )


def check_headers(directory: Path) -> None:
    """Raise `UserError` for a checkpoint that cannot be loaded, as far as its headers tell."""
    model = from_config(read_json(directory / "config.json"))
    _check_layers(model, [current_name(model, name) for name in find_tensors(directory)], directory)


def _check_tied_head(model: Model, named: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    """Raise where a tied config comes with a head that differs from the embedding."""
    if not model.config.text.tied or HEAD not in named:
        return
    head, embedding = named[HEAD], named[f"{embedding_name(model)}.weight"]
    if not np.array_equal(read_tensor(entries[head]), read_tensor(entries[embedding])):
        raise UserError(
            f"config.json ties the head to the embedding, but '{head}' differs from "
            f"'{embedding}'. If the head was trained, set tie_word_embeddings to false in "
            f"config.json; otherwise delete the tensor."
        )


def _check_storage(
    model: Model,
    names: Iterable[str],
    quantize: Quantize,
    directory: Path,
) -> None:
    """Raise where weights are quantized in a way that is not read, or would be twice."""
    config = model.hf_config.get("quantization_config")
    stored = [name for name in map(bnb.weight_of, names) if name is not None]
    if config:
        fields = config if isinstance(config, dict) else {}
        four = bool(fields.get("load_in_4bit"))
        # Older files name no method.
        method = fields.get("quant_method") or ("bitsandbytes" if four else None)
        if method != "bitsandbytes" or not four:
            how = "to 8 bits by 'bitsandbytes'" if method == "bitsandbytes" else f"by '{method}'"
            raise UserError(
                f"'{directory}' holds weights quantized {how}, which are not read; what "
                f"bitsandbytes quantized to 4 bits is. Use the checkpoint in 16 bits."
            )
    if quantize is not None and (config or stored):
        first = f", such as '{stored[0]}'" if stored else ""
        raise UserError(
            f"'{directory}' holds 4-bit weights already{first}, and "
            f"quantize={described(quantize)} asks to quantize again. Leave quantize out (in a "
            f"config model.quantize and load_in_4bit): the codes are read as they are. Or take the "
            f"checkpoint in 16 bits."
        )


def load(
    path_or_repo_id: str,
    dtype: Any = "float32",
    quantize: Quantize = None,
    mesh: Any = None,
    revision: str | None = None,
    token: str | None = None,
    remat: str = "none",
    attention: str | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Return `(model, params)` of a Hugging Face checkpoint: a directory or a hub id.

    Only config.json and *.safetensors are needed. One tensor is read at a time, so the dense model
    is never in memory as a whole; a checkpoint that bitsandbytes quantized keeps its codes.

    Args:
        path_or_repo_id: the directory or hub id.
        dtype: of the parameters and the computation.
        quantize: None; "nf4" or "nf4-dq" (double quantization; also "fp4", "fp4-dq") for the linear
            layers of the language model; transformers' `BitsAndBytesConfig` or its dict; a
            `Quantization`; or a table of (regex, name or "dense") rows over paths.
        mesh: of `vlm_jax.make_mesh`: each leaf is placed on its shards as it is read.
        revision, token: of the hub.
        remat, attention: as for `from_config`.

    Returns:
        The model, and a nested dict of arrays and 4-bit leaves named as in the checkpoint: kernels
        [in, out], equal layers stacked on a leading axis.

    Raises:
        UserError: for whatever does not fit, naming the tensor or field.
    """
    directory = resolve(str(path_or_repo_id), revision, token)
    model = from_config(read_json(directory / "config.json"), dtype, remat, attention=attention)
    entries = find_tensors(directory)
    check_base(directory, {entry.path.name for entry in entries.values()})
    _check_storage(model, entries, quantize, directory)
    # A 4-bit weight is several tensors: the others are read along with it.
    found, beside = dict(entries), dict[str, dict[str, Entry]]()
    for name in entries:
        weight = bnb.weight_of(name)
        if weight in entries:
            beside.setdefault(weight, {})[name.removeprefix(weight)] = found.pop(name)
    wanted = storages(model, quantize)
    shapes = flatten(model.abstract())
    places = disk_places(model, {path: leaf.shape for path, leaf in shapes.items()})
    named = {current_name(model, name): name for name in found}
    _check_layers(model, named, directory)
    _check_names(model, named, places, directory)
    _check_sizes(model, entries, places, named)
    _check_tied_head(model, named, entries)
    kinds = {name: entry.dtype for name, entry in entries.items()}
    params: dict[str, Any] = {}
    with ThreadPoolExecutor(THREADS) as threads:
        # The layers of a leaf follow one another.
        for path, layers in itertools.groupby(places.items(), lambda item: item[1].path):
            tensors = [
                Tensor(named[name], entries[named[name]], place, beside.get(named[name], {}))
                for name, place in layers
            ]
            params[path], stored = read_leaf(
                path,
                shapes[path].shape,
                tensors,
                wanted[path],
                jnp.dtype(dtype),
                functools.partial(_sharding, model, mesh, path),
                threads,
            )
            if stored is not None:
                kinds |= {tensor.name: SAFETENSORS[stored] for tensor in tensors}
    unread = found.keys() - {named[name] for name in places}
    listed = {
        name: (os.path.relpath(entry.path, directory), kinds[name])
        for name, entry in entries.items()
    }
    source = Source(
        str(directory.absolute()),
        {name: listed[name] for name in found},
        str(path_or_repo_id),
        revision,
        {name: listed[name] for name in entries if bnb.weight_of(name) in unread},
    )
    made = from_config(model.hf_config, dtype, remat, source, CheckpointFiles(), attention)
    return made, unflatten(params)


def _sharding(model: Model, mesh: Any, path: str, leaf: Any) -> Any:
    """Return where a leaf of these shapes lies on a mesh, and in which layout; None without one."""
    if mesh is None:
        return None
    tree = laid_out(model, unflatten({path: leaf}), mesh)
    return flatten(param_shardings(model, tree, mesh))[path]
