"""What must be the same when a run goes on from its checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax.config_checks import optimizer_name
from vlm_jax.hub.adapter_files import WEIGHTS, is_adapter_directory
from vlm_jax.model import Model
from vlm_jax.train.base import compute_dtype, quantization_of
from vlm_jax.train.digests import base_identity, file_identity
from vlm_jax.trees import Table

# Config keys of data that decide which batches come.
DATA_KEYS = (
    *("max_seq_length", "image_resolution", "min_pixels", "max_pixels", "max_shapes"),
    # Not on_bad_example: up to a bad example that stops a run, "skip" gives the same batches.
    *("train_split", "shuffle", "train_on", "max_patches", "packing", "overlong"),
    *("video_fps", "video_min_frames", "video_max_frames", "video_min_pixels", "video_max_pixels"),
)

# Where things lie, which may differ from host to host.
PLACES = (
    *("model.name_or_path", "model.adapter", "training.output_dir", "training.run_name"),
    *("data.train_file", "data.eval_file", "data.image_folder"),
)


def identity(config: ConfigDict, model: Model, table: Table, rows: int) -> dict[str, Any]:
    """Return what must be the same when a run goes on, as JSON values.

    Schedules, limits, logging and the places of files may change; what the state and the order of
    the data mean may not.
    """
    assert model.source is not None
    d, t, quantized = config.data, config.training, quantization_of(config)
    adapter = Path(config.model.adapter or "", "adapter_model.safetensors")
    if config.model.adapter and is_adapter_directory(config.model.adapter):
        adapter = Path(config.model.adapter, WEIGHTS)
    own = {} if model.adapter is None else dataclasses.asdict(model.adapter)
    own.pop("targets", None)  # of foreign modules alone: older checkpoints have no such field
    return {
        "base": base_identity(model.source.directory),
        "model": {
            "dtype": compute_dtype(config),
            "adapter": file_identity(adapter),
            **({} if quantized is None else {"quantize": str(quantized)}),
        },
        "training table": [list(row) for row in table],
        "lora": None if model.lora is None else dataclasses.asdict(model.lora),
        "adapter": own or None,
        "data": {
            "train_file": sources_identity(configs.plain(d.train_file)),
            **{key: d[key] for key in DATA_KEYS},
            **({"columns": configs.plain(d.columns)} if d.columns else {}),
            **({"eval_share": d.eval_share} if d.eval_share else {}),
        },
        "training": {
            "rows": rows,
            "gradient_accumulation_steps": t.gradient_accumulation_steps,
            "seed": t.seed,
            "dataloader_drop_last": t.dataloader_drop_last,
            # Absent where unset, as in checkpoints that are older than these keys.
            **{
                key: t[key]
                for key in ("data_seed", "train_sampling_strategy")
                if t[key] is not None
            },
            # Paging moves moments and changes no number: a run may go on without it, or with it.
            "optim": optimizer_name(t.optim).removeprefix("paged_"),
        },
    }


def settings_of(config: ConfigDict) -> dict[str, str]:
    """Return {"section.key": value in words} of a config, but for where things lie."""
    flat = configs.flatten_config(config)
    return {key: str(value) for key, value in flat.items() if key not in PLACES}


def sources_identity(source: Any) -> Any:
    """Return the digest of a data file, or of each source of a list, beside how it is read."""
    if isinstance(source, list):
        return [sources_identity(one) for one in source]
    if isinstance(source, Mapping):
        said = {key: value for key, value in source.items() if key not in ("path", "image_folder")}
        return {**said, "path": sources_identity(source["path"])}
    return file_identity(Path(source).expanduser())
