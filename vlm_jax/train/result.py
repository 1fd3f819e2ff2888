"""What a run gives: an adapter in PEFT's format, or a whole checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax import processes
from vlm_jax.data import Encoder
from vlm_jax.hub.adapter_files import save_adapter
from vlm_jax.hub.companions import copy_all, spoken
from vlm_jax.hub.files import whole_directory, write_json
from vlm_jax.hub.peft import save_peft
from vlm_jax.hub.save import save_pretrained
from vlm_jax.layers.bottleneck import is_adapter
from vlm_jax.layers.linear import is_lora
from vlm_jax.model import Model
from vlm_jax.saved import bias_leaves, saved_modules
from vlm_jax.trees import flatten, unflatten
from vlm_jax.vocabulary import is_added


def write_adapter(
    model: Model, params: Mapping[str, Any], directory: Path, encoder: Encoder
) -> None:
    """Write an adapter with its image settings; it appears whole or not at all.

    The tokenizer and chat template of an adapter that training went on from come along. LoRA is in
    PEFT's format, a bottleneck adapter in the `adapters` library's.
    """
    save = save_peft if model.adapter is None else save_adapter
    with whole_directory(directory) as folder:
        save(model, params, folder, compare_base=False)  # see check_kept
        for before in encoder.directories[:-1]:  # the last one is the base
            copy_all(spoken(Path(before)), folder)
        settings = encoder.image_settings()
        if settings is not None:  # served images must be cut as the trained ones were
            write_json(folder / "preprocessor_config.json", settings)
        settings = encoder.video_settings()
        if settings is not None:
            write_json(folder / "video_preprocessor_config.json", settings)


def write_result(
    model: Model, params: Mapping[str, Any], directory: Path, encoder: Encoder
) -> Path:
    """Write `adapter/`, or `model/` after full training, and return its path.

    It appears whole or not at all. Of several processes, which all call this, the first writes.
    """
    in_full = model.lora is None and model.adapter is None
    path = directory / ("model" if in_full else "adapter")
    if in_full:
        save_pretrained(
            model,
            params,
            path,
            processor=encoder.image_settings(),
            video_processor=encoder.video_settings(),
        )
    else:
        params = _here(model, params)
        if processes.is_primary():
            write_adapter(model, params, path, encoder)
    processes.wait_for_all("the result is written")
    return path


def _here(model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with what its adapter holds gathered from all processes' devices."""
    if processes.count() == 1:
        return dict(params)
    flat = flatten(params)
    added = [path.split("/")[-2] for path in flat if is_added(path)]
    saved = saved_modules(model, params, (*model.modules_to_save, *added)).leaves
    saved += bias_leaves(model, params)
    kinds = (is_lora, is_adapter, is_added)
    written = [p for p in flat if p in saved or any(kind(p) for kind in kinds)]
    primary = processes.is_primary()
    gathered = {path: processes.to_host(flat[path], primary) for path in written}
    return unflatten({**flat, **gathered})
