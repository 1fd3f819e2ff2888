"""Reads a Hugging Face checkpoint directory into (model, params), tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_jax.errors import UserError
from vlm_jax.model import Model, Source, from_config
from vlm_jax.names import Place, current_name, disk_places, to_tree
from vlm_jax.trees import flatten, match, unflatten

# What a run needs of a hub repository; never its pickles or other frameworks' weights.
NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def resolve(path_or_repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local directory of a checkpoint, downloading a hub repository if it is one."""
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
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

    try:
        found = snapshot_download(
            path_or_repo_id, revision=revision, token=token, allow_patterns=NEEDED
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"'{path_or_repo_id}' is no local directory, and it could not be fetched from the "
            f"Hugging Face hub (revision {revision or 'main'}): {str(error).splitlines()[0]} "
            f"Check the spelling, the network, and for gated models your token."
        ) from error
    return Path(found)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; raise `UserError` where it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file '{path}'. A checkpoint directory needs it.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not valid JSON: line {error.lineno}, {error.msg}.") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"'{path}' cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds a JSON {type(value).__name__}; expected an object.")
    return value


def tensor_files(directory: Path) -> dict[str, str]:
    """Return {tensor name: file name} of a checkpoint of one file or a sharded index."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise UserError(
                f"'{index}' is no index of safetensors files: expected 'weight_map' to be an "
                f"object of tensor names and the files they are in. Fetch it again, or delete it "
                f"if there is only one file."
            )
        missing = [name for name in set(weight_map.values()) if not (directory / name).exists()]
        if missing:
            raise UserError(
                f"'{index}' lists files that are not there: {', '.join(sorted(missing))}. The "
                f"download is incomplete: fetch them again."
            )
        return dict(weight_map)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    files = [name for name in files if name != "adapter_model.safetensors"]
    if not files:
        pickles = [
            p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)
        ]
        if pickles:
            raise UserError(
                f"'{directory}' holds only pickle weights ({', '.join(sorted(pickles)[:3])}), "
                f"which can run code when opened and are not read. Convert them once where "
                f'torch is installed: python -c "from transformers import AutoModelForImageTextTo'
                f"Text as M; M.from_pretrained('{directory}').save_pretrained('converted')\""
            )
        raise UserError(f"'{directory}' holds no *.safetensors files; a checkpoint needs them.")
    names: dict[str, str] = {}
    for file in files:
        with open_tensors(directory / file) as tensors:
            for name in tensors.keys():
                names[name] = file
    return names


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors")


def open_tensors(path: Path) -> Any:
    """Return an open safetensors file; raise `UserError` where it is damaged."""
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{path}' could not be read as safetensors ({error}). It is damaged or incomplete: "
            f"fetch it again."
        ) from error


def _check(model: Model, found: dict[str, str], places: dict[str, Place], directory: Path):
    """Return {current name: (name on disk, Place)}; raise for missing and left-over tensors."""
    named = {current_name(model, name): name for name in found}
    missing = [name for name in places if name not in named]
    allowed = [(pattern, True) for pattern in model.family.UNUSED] + [(".*", False)]
    extra = [name for name in named if name not in places]
    if model.config.text.tied:  # the head is the embedding; a copy of it on disk is not read
        extra = [name for name in extra if name != "lm_head.weight"]
    unused = match(allowed, extra, "unused tensors", unused="allow")
    left = [named[name] for name in extra if not unused[name]]
    if missing or left:
        raise UserError(
            f"The tensors in '{directory}' do not fit its config.json. "
            + (f"Missing ({len(missing)}): {', '.join(missing[:4])}. " if missing else "")
            + (f"Left over ({len(left)}): {', '.join(left[:4])}. " if left else "")
            + "Every tensor must have its place: check that config.json belongs to these weights."
        )
    return {name: named[name] for name in places}


def _check_tied_head(model: Model, found: dict[str, str], handles: dict[str, Any]) -> None:
    """Raise where a tied config comes with a head that differs from the embedding."""
    named = {current_name(model, name): name for name in found}
    head = named.get("lm_head.weight")
    if not model.config.text.tied or head is None:
        return
    embedding = named["model.language_model.embed_tokens.weight"]
    tensors = [handles[found[name]].get_tensor(name) for name in (head, embedding)]
    if not np.array_equal(*tensors):
        raise UserError(
            f"config.json ties the head to the embedding, but '{head}' differs from "
            f"'{embedding}'. If the head was trained, set tie_word_embeddings to false in "
            f"config.json; otherwise delete the tensor."
        )


def check_quantize(quantize: str | None) -> None:
    """Raise `UserError` for a way of storing frozen kernels that is not known."""
    if quantize is not None:
        raise UserError(f"quantize={quantize!r} is not supported; supported: None.")


def load(
    path_or_repo_id: str,
    dtype: Any = "float32",
    quantize: str | None = None,
    mesh: Any = None,
    revision: str | None = None,
    token: str | None = None,
    remat: str = "none",
) -> tuple[Model, dict[str, Any]]:
    """Return `(model, params)` of a Hugging Face checkpoint: a directory or a hub id.

    dtype: of the parameters and the computation. quantize: None. mesh: a mesh of
    `vlm_jax.make_mesh`: each leaf is placed on its shards as it is read. revision, token: of the
    hub. Only config.json and *.safetensors are needed. params is a nested dict of arrays named as
    in the checkpoint, kernels [in, out], equal layers stacked on a leading axis.
    Raises `UserError` for whatever does not fit, naming the tensor or field.
    """
    check_quantize(quantize)
    directory = resolve(str(path_or_repo_id), revision, token)
    model = from_config(read_json(directory / "config.json"), dtype, remat)
    quantization = model.hf_config.get("quantization_config")
    if quantization:
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unknown") if known else "unknown"
        raise UserError(
            f"'{directory}' holds weights quantized by '{method}', which are not read. Take the "
            f"checkpoint in 16 bits."
        )
    found = tensor_files(directory)
    abstract = flatten(model.abstract())
    places = disk_places(model, {path: leaf.shape for path, leaf in abstract.items()})
    on_disk = _check(model, found, places, directory)
    by_path: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        by_path.setdefault(place.path, []).append((on_disk[name], place))

    shardings: dict[str, Any] = {}
    if mesh is not None:
        from vlm_jax.sharding import param_shardings

        shardings = flatten(param_shardings(model, unflatten(abstract), mesh))
    handles = {file: open_tensors(directory / file) for file in sorted(set(found.values()))}
    dtypes: dict[str, str] = {}
    params: dict[str, Any] = {}
    for path, tensors in by_path.items():
        shape = abstract[path].shape
        leaf = np.empty(shape, jnp.dtype(dtype))
        for name, place in tensors:
            try:
                tensor = handles[found[name]].get_tensor(name)
            except SafetensorError as error:
                raise UserError(
                    f"'{directory / found[name]}' lacks the tensor '{name}' that the index names: "
                    f"the files belong to different checkpoints ({error})."
                ) from error
            if tensor.shape != place.shape:
                raise UserError(
                    f"The tensor '{name}' in '{directory / found[name]}' has the shape "
                    f"{list(tensor.shape)}; config.json asks for {list(place.shape)}."
                )
            leaf[... if place.layer is None else place.layer] = to_tree(path, tensor)
        params[path] = jax.device_put(leaf, shardings.get(path))
    _check_tied_head(model, found, handles)
    for name, file in found.items():
        dtypes[name] = handles[file].get_slice(name).get_dtype()
    source = Source(
        str(directory.absolute()),
        {name: (file, dtypes[name]) for name, file in found.items()},
        str(path_or_repo_id),
        revision,
    )
    return from_config(model.hf_config, dtype, remat, source), unflatten(params)
