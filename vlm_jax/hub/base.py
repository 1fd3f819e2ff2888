"""The base checkpoint of a loaded model: its tensors and tokenizer, read later."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.batch import Example
from vlm_jax.errors import UserError
from vlm_jax.files.limits import read_json
from vlm_jax.hub.tensors import open_tensors
from vlm_jax.model import Model
from vlm_jax.names import current_name
from vlm_jax.weights import bnb


class CheckpointFiles:
    """The `model.Files` of a model that came from a directory.

    `data` is imported where it is needed: with transformers' tokenizers it takes seconds.
    """

    def prompt(self, model: Model, record: dict[str, Any], options: dict[str, Any]) -> Example:
        from vlm_jax.data import Encoder

        assert model.source is not None
        options = {"adapter": model.source.adapter, **options}
        return Encoder(model.source.directory, **options).prompt(record)

    def turn_end(self, model: Model) -> int | None:
        from vlm_jax.data import Chat

        assert model.source is not None
        ids = model.config.image_token_id, model.config.video_token_id
        try:
            mark = model.config.IMAGE_MARK
            return Chat(model.source.directory, *ids, model.source.adapter, mark).turn_end
        except UserError:  # `encode` reports it; arrays may come from elsewhere
            return None

    def tensors(self, model: Model) -> Callable[[str], np.ndarray]:
        return base_tensors(model)


def base_is_here(model: Model) -> bool:
    """Return whether the files of the base can be read."""
    return model.source is not None and Path(model.source.directory).is_dir()


def named_base(adapter: Path) -> str | None:
    """Return what an adapter's directory calls its base, a hub id or a path, if anything."""
    config = read_json(adapter / "adapter_config.json")
    return config.get("base_model_name_or_path") or config.get("model_name")


def base_tensors(model: Model) -> Callable[[str], np.ndarray]:
    """Return a function from a tensor's name, in the current layout, to the base's array.

    4-bit weights that nothing here reads are decoded. Each file is opened once. Raises `UserError`
    where the base's files are gone.
    """
    source = model.source
    if source is None or not base_is_here(model):
        where = "" if source is None else f" '{source.directory}'"
        raise UserError(
            f"The base checkpoint{where} is gone, but this export copies tensors of it. Restore it."
        )
    on_disk = {current_name(model, name): name for name in source.tensors}
    handles: dict[str, Any] = {}

    def raw(name: str) -> np.ndarray:
        file = (source.beside if name in source.beside else source.tensors)[name][0]
        if file not in handles:
            handles[file] = open_tensors(Path(source.directory) / file)
        return handles[file].get_tensor(name)

    def read(name: str) -> np.ndarray:
        name = on_disk[name]
        beside = [other for other in source.beside if bnb.weight_of(other) == name]
        parts = {other.removeprefix(name): raw(other) for other in (name, *beside)}
        return bnb.decoded(parts, name) if beside else parts[""]

    return read
