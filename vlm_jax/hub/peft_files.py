"""PEFT's files of an adapter: names of tensors, and matrices in a tree <-> matrices on disk.

A key is `base_model.model.<module>.lora_A.weight` of shape [R, in] (a tree's turned),
`.lora_B.weight` [out, R] or `.lora_magnitude_vector` [out]; of an embedding `.lora_embedding_A`
[R, V] and `.lora_embedding_B` [D, R]; or, behind the same prefix, the name of a whole tensor. Where
a module's matrices lie in a tree is its `Home`: a model of this library and a Linen module give
these, and between their trees and the files lies {module: {"lora_A": [in, R], "lora_B": [R, out]}},
in which each layer of a stack has its own rank.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from vlm_jax.errors import UserError, nearest
from vlm_jax.files.atomic import ADAPTER_PARTS, whole_directory, write_json
from vlm_jax.hub.peft_config import CONFIG
from vlm_jax.hub.unread_weights import PEFT_WEIGHTS

PREFIX = "base_model.model."
# A leaf -> the end of its tensor's name, of a layer and of an embedding.
MATRICES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
OF_EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
LEAVES = (*MATRICES, "start_A", "start_B")

Matrices = dict[str, dict[str, np.ndarray]]  # {module: {leaf: array of one layer}}


class Home(NamedTuple):
    """Where the matrices of one module lie in a tree.

    prefix: of the paths of their leaves, <prefix>lora_A [.., in, R]. layer: which layer of a stack
    is the module's, or None. shape: [.., in, out] of what they add to. embedding: PEFT names those
    of an embedding otherwise.
    """

    prefix: str
    layer: int | None
    shape: tuple[int, ...]
    embedding: bool

    def part(self, leaf: np.ndarray) -> np.ndarray:
        """Return the module's part of a leaf, a view of it."""
        return leaf[... if self.layer is None else self.layer]


class Key(NamedTuple):
    """What a tensor's name says: of matrices the module and the leaf, else the tensor in the base.

    copy: it holds what the base holds, as peft writes embeddings where they or a head are adapted.
    """

    name: str
    leaf: str | None = None
    embedding: bool = False
    copy: bool = False


def parse_key(key: str) -> Key:
    name = key.removeprefix(PREFIX)
    ends = r"\.lora_(?:(embedding_)?([AB])|magnitude_vector)(?:\.default)?(?:\.weight)?"
    if found := re.fullmatch(rf"(.*){ends}", name):
        return Key(found[1], f"lora_{found[3] or 'magnitude'}", bool(found[2]))
    saved = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", name)
    base = re.sub(r"\.(base_layer|original_module)(?=\.)", "", saved)
    return Key(base, copy=base != saved)


def no_home(directory: Path, key: str, name: str, known: Iterable[str], why: str) -> UserError:
    return UserError(
        f"The adapter in '{directory}' holds '{key}', for which there is no place in this model"
        f"{nearest(name, known)}. {why}"
    )


def another_base(directory: Path, key: str, name: str, config: Mapping[str, Any]) -> UserError:
    return UserError(
        f"The adapter in '{directory}' holds '{key}', a copy of the base's '{name}' whose values "
        f"or shape are not those of the base loaded here: it was made on another base, and its "
        f"logits would differ. Load the base that it names, "
        f"{config.get('base_model_name_or_path')!r}."
    )


def is_same(tensor: np.ndarray, own: np.ndarray) -> bool:
    """Return whether two arrays are equal in the narrower dtype of the two."""
    kind = min(tensor.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return np.array_equal(tensor.astype(kind), own.astype(kind))


def unstacked(
    flat: Mapping[str, Any], homes: Mapping[str, Home], ranks: Mapping[str, int]
) -> Matrices:
    """Return the matrices of a flat tree's modules; ranks: of each module that has some."""
    paths = {homes[module].prefix + name for module in ranks for name in LEAVES}
    held = {path: np.asarray(jax.device_get(flat[path])) for path in paths if path in flat}

    def of(home: Home, rank: int) -> dict[str, np.ndarray]:
        cut: dict[str, Any] = {"A": (slice(None), slice(rank)), "B": slice(rank)}
        return {
            name: home.part(held[home.prefix + name])[cut.get(name[-1], ...)]
            for name in LEAVES
            if home.prefix + name in held
        }

    return {module: of(homes[module], rank) for module, rank in ranks.items()}


def stacked(
    matrices: Matrices, homes: Mapping[str, Home], ranks: Mapping[str, int], dora: bool, file: Path
) -> dict[str, np.ndarray]:
    """Return {path: leaf} that `matrices` are, float32 and of the largest rank of each stack.

    What a layer lacks of that rank is zero, and so is a layer without matrices. Raises `UserError`
    for a matrix without its partner, and for other shapes than ranks and weights ask for.
    """
    for module, held in matrices.items():
        wanted = _shapes(homes[module], ranks[module], dora)
        for leaf in [leaf for leaf in MATRICES if (leaf in held) != (leaf in wanted)]:
            raise UserError(
                f"'{file}' holds matrices of '{module}', which "
                f"{'lacks its' if leaf in wanted else 'has a'} {MATRICES[leaf]}"
                f"{', unlike DoRA (use_dora)' if leaf == 'lora_magnitude' else ''}. It is damaged: "
                f"take the file that the adapter came with."
            )
        for leaf, tensor in held.items():
            if tensor.shape != wanted[leaf]:
                raise UserError(
                    f"'{file}' holds {leaf} of '{module}' with the shape "
                    f"{list(tensor.shape[::-1])}; rank {ranks[module]}, by r and rank_pattern in "
                    f"{CONFIG}, and the base's weight ask for {list(wanted[leaf][::-1])}. It was "
                    f"made for another base or rank, or one of the two files is another adapter's."
                )
    largest = {  # of each stack the last one
        homes[module].prefix: module for module in sorted(matrices, key=lambda one: ranks[one])
    }
    leaves = {
        prefix + name: np.zeros((*homes[module].shape[:-2], *shape), np.float32)
        for prefix, module in largest.items()
        for name, shape in _shapes(homes[module], ranks[module], dora).items()
    }
    for module, held in matrices.items():
        for name, tensor in held.items():
            part = homes[module].part(leaves[homes[module].prefix + name])
            part[tuple(map(slice, tensor.shape))] = tensor
    return leaves


def _shapes(home: Home, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    *_, inputs, outputs = home.shape
    shapes = {"lora_A": (inputs, rank), "lora_B": (rank, outputs), "lora_magnitude": (outputs,)}
    return {name: shape for name, shape in shapes.items() if dora or name != "lora_magnitude"}


def to_tensors(matrices: Matrices, homes: Mapping[str, Home]) -> dict[str, np.ndarray]:
    """Return {key: tensor as on disk}."""
    return {
        f"{PREFIX}{module}.{(OF_EMBEDDING if homes[module].embedding else MATRICES)[name]}": (
            np.ascontiguousarray(matrix.T)
        )
        for module, leaves in matrices.items()
        for name, matrix in leaves.items()
    }


def write_adapter(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    weights: str = PEFT_WEIGHTS,
) -> None:
    """Write both files of an adapter; the directory appears whole or not at all."""
    with whole_directory(directory, ADAPTER_PARTS) as folder:
        save_file(dict(tensors), folder / weights, metadata={"format": "pt"})
        write_json(folder / CONFIG, config)
