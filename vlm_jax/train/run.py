"""What a run is built from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax.data import Encoder, Pipeline, read_records
from vlm_jax.data.held_out import hold_out
from vlm_jax.data.stream import open_stream
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.sharding import check_spread, shard_params
from vlm_jax.starts import kind_of
from vlm_jax.train.adapt import adapt
from vlm_jax.train.base import load_base


def build(
    config: ConfigDict, mesh: Any, encoder: Encoder | None = None
) -> tuple[Model, dict[str, Any], list[tuple[str, str]], Encoder]:
    """Return (model, params, training table, encoder): the base with what is added to train.

    encoder: the base's, where it is made already.
    """
    kind_of(config.lora.init_lora_weights)  # before weights are read
    model, params = load_base(config, mesh)
    encoder = encoder or make_encoder(config, model)
    model, params, table = adapt(config, model, params, len(encoder.tokenizer))
    check_spread(model, params, mesh)
    return model, shard_params(model, params, mesh), table, encoder


def make_encoder(config: ConfigDict, model: Model) -> Encoder:
    """Return the encoder of the model's own tokenizer and images, with the config's options.

    What an adapter's directory has of them, the loaded one's or else model.adapter's, comes first.
    """
    assert model.source is not None
    return encoder_of(config, model.source.directory, model.source.adapter)


def encoder_of(
    config: ConfigDict, directory: str | Path, adapter: str | Path | None = None
) -> Encoder:
    """Return the encoder of a checkpoint's directory, with the config's options.

    adapter: a directory whose tokenizer and settings come first; by default model.adapter.
    """
    d, adapter = config.data, adapter or config.model.adapter
    return Encoder(
        directory,
        adapter=None if adapter is None else Path(adapter).expanduser(),
        max_seq_length=d.max_seq_length,
        max_patches=d.max_patches,
        overlong=d.overlong,
        min_pixels=d.min_pixels,
        max_pixels=d.max_pixels,
        image_resolution=d.image_resolution or None,
        train_on=d.train_on,
        on_bad_example=d.on_bad_example,
        image_folder=d.image_folder,
        max_image_pixels=d.max_image_pixels,
        allow_absolute_paths=d.allow_absolute_paths,
        allow_urls=d.allow_urls,
        video_fps=d.video_fps,
        video_min_frames=d.video_min_frames,
        video_max_frames=d.video_max_frames,
        video_min_pixels=d.video_min_pixels,
        video_max_pixels=d.video_max_pixels,
    )


def evaluates(config: ConfigDict) -> bool:
    """Return whether a run of this config has anything to evaluate on."""
    return config.data.eval_file is not None or config.data.eval_share > 0


def _records(config: ConfigDict, training: bool) -> Any:
    """Return what a run trains on, or what it evaluates on."""
    d = config.data
    which = "train" if training or d.eval_share else "eval"
    source, split = configs.plain(d[f"{which}_file"]), d[f"{which}_split"]
    if source is None:
        raise UserError(
            f"The config names no data: set data.{which}_file to a .json, .jsonl, .csv, .tsv or "
            f".parquet file, or a data set."
        )
    columns = configs.plain(d.columns)
    if d.streaming and training:
        return open_stream(source, d.image_folder, split, columns, d.caption_prompt)
    records = read_records(
        source, d.image_folder, split, columns=columns, caption_prompt=d.caption_prompt
    )
    if d.eval_share:
        left, held = hold_out(records, d.eval_share, data_seed(config))
        return left if training else held
    return records


def make_pipeline(
    config: ConfigDict,
    encoder: Encoder,
    rows: int,
    share: tuple[int, int] = (0, 1),
    *,
    training: bool = True,
) -> Pipeline:
    """Return the pipeline of a run's data. rows: of the global batch; share: `row_share`.

    training: what it trains on; otherwise what it evaluates on.
    """
    d, (index, count) = config.data, share
    return Pipeline(
        encoder,
        _records(config, training),
        rows=rows,
        micro_batches=config.training.gradient_accumulation_steps if training else 1,
        process_index=index,
        process_count=count,
        max_shapes=d.max_shapes,
        seed=data_seed(config),
        shuffle=d.shuffle,
        sampling=config.training.train_sampling_strategy if training else None,
        packing=d.packing and training,
        drop_last=config.training.dataloader_drop_last and training,
        max_bad_share=d.max_bad_share,
        workers=config.training.dataloader_num_workers if training else 0,
    )


def step_options(config: ConfigDict) -> dict[str, Any]:
    """Return the options of `make_step` that the config's training section sets."""
    t = config.training
    return {
        "label_smoothing": t.label_smoothing_factor,
        "neftune_alpha": t.neftune_noise_alpha or 0.0,
        "ema_decay": t.ema_decay,
    }


def state_options(config: ConfigDict) -> dict[str, Any]:
    """Return the options of `init_state` that the config's training section sets."""
    t = config.training
    return {"param_dtype": jnp.dtype(t.param_dtype), "ema": t.ema_decay > 0}


def data_seed(config: ConfigDict) -> int:
    """Return the seed of the order of the data."""
    t = config.training
    return t.seed if t.data_seed is None else t.data_seed


def _absolute(value: Any) -> Any:
    """Return a path, or each path of a list of sources, so that it holds from anywhere."""
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    if isinstance(value, Mapping):
        paths = {key: value[key] for key in ("path", "image_folder") if value.get(key) is not None}
        return {**value, **{key: _absolute(path) for key, path in paths.items()}}
    there = Path(value).expanduser().exists()
    return str(Path(value).expanduser().resolve()) if there else value


def absolute_paths(config: ConfigDict) -> dict[str, Any]:
    """Return the config as plain values whose paths hold from any working directory."""
    tree = configs.to_dict(config)
    for section, key in (
        *(("model", "name_or_path"), ("model", "adapter"), ("data", "train_file")),
        *(("data", "eval_file"), ("data", "image_folder"), ("training", "output_dir")),
    ):
        value = tree[section][key]
        if key == "output_dir":
            tree[section][key] = str(Path(value).expanduser().resolve())
        elif value is not None:
            tree[section][key] = _absolute(value)
    return tree
