"""Reading a checkpoint's files: which tensor is where, and one tensor at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_jax.errors import UserError

Block = tuple[slice, ...]


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


def read_tensor(
    path: Path, name: str, block: Block = (), shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Return one tensor of a file, or a block of it; block: a slice for each of its axes.

    shape: what the tensor has to have, by config.json. The file is opened for it alone: it is
    mapped into memory, and pages that were read count as the process's until it is closed, which
    adds up to the whole checkpoint.
    """
    with open_tensors(path) as tensors:
        try:
            there = tensors.get_slice(name)
            found = there.get_shape()
            if shape is not None and tuple(found) != shape:
                raise UserError(
                    f"The tensor '{name}' in '{path}' has the shape {found}; config.json asks for "
                    f"{list(shape)}."
                )
            return there[block] if block else tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                f"'{path}' lacks the tensor '{name}' that the index names: the files belong to "
                f"different checkpoints ({error})."
            ) from error


def dtypes(path: Path) -> dict[str, str]:
    """Return {tensor name: dtype} of a file, in safetensors' names."""
    with open_tensors(path) as tensors:
        return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
