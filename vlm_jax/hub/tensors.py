"""Reads a checkpoint's safetensors files: the index of tensors, and one tensor at a time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_jax.errors import UserError, explained
from vlm_jax.files.file_types import lost
from vlm_jax.files.limits import check_finite, is_file_name, read_json

Block = tuple[slice, ...]

# safetensors' names of dtypes.
DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
}

SAFETENSORS = {np.dtype(dtype).name: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file: its dtype by safetensors' name, and where its first byte is."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def read_as(self) -> np.dtype:
        """The dtype of the values; raises `UserError` for one that is not read."""
        if self.dtype not in DTYPES:
            raise UserError(
                f"'{self.path}' holds a tensor of the type {self.dtype}, which is not read; known "
                f"are {', '.join(DTYPES)}. Use the checkpoint in 16 bits."
            )
        return np.dtype(DTYPES[self.dtype])


def find_tensors(directory: Path) -> dict[str, Entry]:
    """Return where each tensor is of a checkpoint of one file or a sharded index; headers alone."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and file.endswith(".safetensors") for file in weight_map.values()
        ):
            raise UserError(
                f"'{index}' is not an index of safetensors files: expected 'weight_map' to be an "
                f"object of tensor names and the files they are in. Fetch it again, or delete it "
                f"if there is only one file."
            )
        outside = [name for name in weight_map.values() if not is_file_name(name)]
        if outside:
            raise UserError(
                f"'{index}' names the file '{outside[0]:.200}', which is not in its own directory. "
                f"An index that came with a checkpoint must not name other files: fetch the "
                f"checkpoint from its source, or move the file beside its index and name it so."
            )
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if not (directory / name).exists()]
        if missing:
            raise UserError(
                f"'{index}' lists files that are not there: {', '.join(missing)}. The "
                f"download is incomplete: fetch them again."
            )
        headers = {name: read_header(directory / name) for name in files}
        vain = [name for name, file in weight_map.items() if name not in headers[file]]
        if vain:
            raise UserError(
                f"'{directory / weight_map[vain[0]]}' lacks the tensor '{vain[0]}' that the index "
                f"names: the files belong to different checkpoints."
            )
        return {name: headers[file][name] for name, file in weight_map.items()}
    files = sorted(
        {path.name for path in directory.glob("*.safetensors")} - {"adapter_model.safetensors"}
    )
    if not files:
        pickles = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in directory.glob(kind)]
        if pickles:
            raise UserError(
                f"'{directory}' holds only pickle weights ({', '.join(sorted(pickles)[:3])}), "
                f"which can run code when opened and are not read. Convert them once where "
                f'torch is installed: python -c "from transformers import AutoModelForImageTextTo'
                f"Text as M; M.from_pretrained('{directory}').save_pretrained('converted')\""
            )
        raise UserError(f"'{directory}' holds no *.safetensors files; a checkpoint needs them.")
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(directory / file).items():
            if name in found:
                raise UserError(
                    f"Both '{found[name].path}' and '{entry.path}' hold the tensor '{name}', and "
                    f"no model.safetensors.index.json says which is meant. Delete the files of the "
                    f"other checkpoint."
                )
            found[name] = entry
    return found


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, tensor) of a small file, an adapter's; `UserError` for values not finite."""
    with open_tensors(path) as handle:
        for name in handle.keys():
            tensor = handle.get_tensor(name)
            check_finite(tensor, name, path)
            yield name, tensor


def open_tensors(path: Path) -> Any:
    """Return an open safetensors file; raise `UserError` where it is damaged."""
    with explained(
        (SafetensorError, OSError),
        lambda error: (
            f"'{path}' could not be read as safetensors ({error})."
            f"{lost(path) or ' It is damaged or incomplete: fetch it again.'}"
        ),
    ):
        return safe_open(path, framework="np")


def read_header(path: Path) -> dict[str, Entry]:
    """Return where each tensor of a file is, by name; raise `UserError` where it is damaged."""
    with open_tensors(path), path.open("rb") as file:  # opening checks all that is read here
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Entry(path, one["dtype"], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
        for name, one in sorted(header.items())
    }


def read_tensor(entry: Entry, block: Block = ()) -> np.ndarray:
    """Return one tensor, or a block of it; block: a slice for each of its axes.

    The memory is the array's own. A file that stays mapped, as safetensors' does while it is open,
    counts with every page that was read, which adds up to the whole checkpoint.
    """
    dtype = entry.read_as
    with explained(
        (OSError, ValueError),
        lambda error: (
            f"'{entry.path}' was changed or removed while it was read ({error}). Load it again "
            f"when nothing writes to it."
        ),
    ):
        others = zip(block[1:], entry.shape[1:], strict=False)
        if not all(one.indices(n) == (0, n, 1) for one, n in others):
            return np.array(np.memmap(entry.path, dtype, "r", entry.start, entry.shape)[block])
        shape, skipped = entry.shape, 0
        if block:
            first, last, _ = block[0].indices(shape[0])
            shape, skipped = (last - first, *shape[1:]), first * math.prod(shape[1:])
        start = entry.start + skipped * dtype.itemsize
        return np.fromfile(entry.path, dtype, math.prod(shape), offset=start).reshape(shape)
