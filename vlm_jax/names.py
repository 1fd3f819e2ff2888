"""The bijection between paths in our tree and names of tensors on disk.

Our path is Hugging Face's current name with "/" for "."; three things differ. Kernels are
transposed to [in, out] (convolutions flattened first); equal layers are stacked on a leading
axis, so their path has no layer number; the last key says what the leaf is:

    model/language_model/layers/self_attn/q_proj/kernel[3]
    model.language_model.layers.3.self_attn.q_proj.weight, transposed
"""

import dataclasses
import re
from typing import Any

import numpy as np

from vlm_jax.model import Model

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor of a checkpoint lives in the tree.

    path, layer: the leaf, and which slice of it (None for a leaf that is not stacked).
    shape: the tensor's shape on disk.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def index(self) -> Any:
        """What the leaf is indexed with for this tensor."""
        return ... if self.layer is None else self.layer


def embedding_name(model: Model) -> str:
    """Return the Hugging Face name of the token embedding's module, in the current layout."""
    return model.config.embedding.replace("/", ".")


def stacked_layers(model: Model, path: str) -> int | None:
    """Return how many layers a leaf stacks, or None."""
    stacks = model.config.stacks.items()
    return next((layers for prefix, layers in stacks if path.startswith(f"{prefix}/")), None)


def layers_of(model: Model, path: str) -> dict[str, int | None]:
    """Return {Hugging Face name of the module that owns a leaf: layer}, in the current layout.

    One for each layer that the leaf stacks; {name: None} of no stack.
    """
    module = path.rsplit("/", 1)[0].replace("/", ".")
    for stack, layers in model.config.stacks.items():
        prefix = stack.replace("/", ".")
        if module.startswith(f"{prefix}."):
            inside = module.removeprefix(prefix)
            return {f"{prefix}.{layer}{inside}": layer for layer in range(layers)}
    return {module: None}


def layer_names(model: Model, path: str) -> list[str]:
    """Return the module names of each layer that a leaf stacks (one for a plain leaf)."""
    return list(layers_of(model, path))


def disk_places(model: Model, shapes: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return {tensor name in the current layout: its `Place`} for leaves of the given shapes."""
    places: dict[str, Place] = {}
    for path, shape in shapes.items():
        leaf = path.rsplit("/", 1)[1]
        one = shape if stacked_layers(model, path) is None else shape[1:]
        on_disk = model.config.disk_shapes.get(path, one[::-1] if leaf == "kernel" else one)
        places |= {
            f"{module}.{LEAVES.get(leaf, leaf)}": Place(path, layer, tuple(on_disk))
            for module, layer in layers_of(model, path).items()
        }
    return places


def current_name(model: Model, name: str) -> str:
    """Return a tensor or module name of any layout in the current one."""
    for pattern, replacement in model.config.RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def is_unused(model: Model, name: str) -> bool:
    """Return whether a tensor, named in the current layout, is one that nothing here reads."""
    return any(re.fullmatch(pattern, name) for pattern in model.config.UNUSED)


def to_tree(path: str, tensor: np.ndarray) -> np.ndarray:
    """Return a tensor from disk as (a slice of) the leaf at `path`."""
    return tensor.reshape(tensor.shape[0], -1).T if path.endswith("/kernel") else tensor


def to_disk(place: Place, leaf: np.ndarray) -> np.ndarray:
    """Return (a slice of) a leaf as the tensor on disk; undoes `to_tree`."""
    kernel = place.path.endswith("/kernel")
    return np.ascontiguousarray(leaf.T).reshape(place.shape) if kernel else leaf
