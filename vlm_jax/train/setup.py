"""Setup of a run: base, method, data; as arrays, or as shapes and shardings alone."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vlm_jax import quantization
from vlm_jax.adapters.lora_init import kind_of
from vlm_jax.config.checks import check_choice
from vlm_jax.config.specs import RunSpec
from vlm_jax.data import Encoder, Pipeline, read_records
from vlm_jax.data.records.held_out import hold_out
from vlm_jax.data.records.stream import open_stream
from vlm_jax.data.text.tokenizer import has_tokenizer, load_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.evals import EVALS, Eval
from vlm_jax.hub.load import load, read_hf_config
from vlm_jax.model import Model, from_config
from vlm_jax.quantization import Quantization
from vlm_jax.sharding import (
    check_spread,
    laid_out,
    param_shardings,
    row_parts,
    row_share,
    shard_params,
    used_on_mesh,
)
from vlm_jax.train.adapt import adapt
from vlm_jax.train.losses import OBJECTIVES, Objective
from vlm_jax.train.optimizer import OptimizerSettings, optimizer
from vlm_jax.train.placement import abstract, abstract_state
from vlm_jax.train.step import TrainState
from vlm_jax.trees import split


def compute_dtype(config: RunSpec) -> str:
    """Return the dtype of frozen weights and computation."""
    m = config.model
    if m.dtype != "auto":
        return m.dtype
    if m.load_in_4bit and m.bnb_4bit_compute_dtype is not None:
        return m.bnb_4bit_compute_dtype
    return "bfloat16" if config.training.bf16 else "float32"


def quantization_of(config: RunSpec) -> Quantization | None:
    """Return what of the base is quantized, by model.quantize or `BitsAndBytesConfig`'s keys."""
    m, storage = config.model, config.model.quantize
    if m.load_in_4bit:
        storage = m.bnb_4bit_quant_type + ("-dq" if m.bnb_4bit_use_double_quant else "")
    return (
        None
        if storage is None
        else Quantization(storage, tuple(m.quantize_components), tuple(m.llm_int8_skip_modules))
    )


def base_name(config: RunSpec) -> str:
    """Return the base's directory or hub id; raise `UserError` where the config names none."""
    if config.model.name_or_path is None:
        raise UserError(
            "The config names no model: set model.name_or_path to a checkpoint directory or a hub "
            "id such as 'Qwen/Qwen2-VL-2B-Instruct'."
        )
    return config.model.name_or_path


def check_type(config: RunSpec, hf_config: Mapping[str, Any]) -> None:
    """Raise `UserError` where the base is not of the family that the config says."""
    wanted, found = config.model.type, hf_config["model_type"]
    if wanted is not None and wanted != found:
        raise UserError(f"model.type is '{wanted}', but '{base_name(config)}' is a '{found}'.")


def load_base(config: RunSpec, mesh: Any = None) -> tuple[Model, dict[str, Any]]:
    """Return the base checkpoint of a config, in its compute dtype."""
    m, stored = config.model, (compute_dtype(config), quantization_of(config))
    how: dict[str, Any] = {"remat": config.training.remat, "attention": m.attention}
    model, params = load(base_name(config), *stored, mesh, m.revision, **how)
    check_type(config, model.hf_config)
    return model, params


def build(
    config: RunSpec, mesh: Any, encoder: Encoder | None = None
) -> tuple[Model, dict[str, Any], list[tuple[str, str]], Encoder]:
    """Return (model, params, training table, encoder): the base with what is added to train.

    encoder: the base's, where it is made already.
    """
    kind_of(config.lora.init_lora_weights)  # before weights are read
    objective_of(config)
    model, params = load_base(config, mesh)
    encoder = encoder or make_encoder(config, model)
    model, params, table = adapt(config, model, params, len(encoder.tokenizer))
    check_spread(model, params, mesh)
    return model, shard_params(model, params, mesh), table, encoder


def make_encoder(config: RunSpec, model: Model) -> Encoder:
    """Return the encoder of the model's own tokenizer and images, with the config's options.

    What an adapter's directory has of them, the loaded one's or else model.adapter's, comes first.
    """
    assert model.source is not None
    return encoder_of(config, model.source.directory, model.source.adapter)


def encoder_of(
    config: RunSpec, directory: str | Path, adapter: str | Path | None = None
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


def evaluates(config: RunSpec) -> bool:
    """Return whether a run of this config has anything to evaluate on."""
    return config.data.eval_file is not None or config.data.eval_share > 0


def evaluators_of(config: RunSpec) -> Mapping[str, Eval]:
    """Return the run's named evaluators, each with its own records and options.

    Raises `UserError` for one that cannot run.
    """
    d, made = config.data, {}
    for name, e in config.evaluators.items():
        check_choice(f"evaluators.{name}.eval", e.eval, EVALS)
        try:
            records = read_records(
                e.file,
                e.image_folder or d.image_folder,
                e.split,
                columns=d.columns,
                caption_prompt=d.caption_prompt,
            )
        except UserError as error:
            raise UserError(f"evaluators.{name}.file: {error}") from error
        options = {key: getattr(e, key) for key in ("max_new_tokens", "batch_size", "max_examples")}
        made[name] = functools.partial(EVALS[e.eval], records=records, **options)
    return made


def _records(config: RunSpec, training: bool) -> Any:
    """Return what a run trains on, or what it evaluates on."""
    d = config.data
    which = "train" if training or d.eval_share else "eval"
    source, split = (getattr(d, f"{which}_{key}") for key in ("file", "split"))
    if source is None:
        raise UserError(
            f"The config names no data: set data.{which}_file to a .json, .jsonl, .csv, .tsv or "
            f".parquet file, or a data set."
        )
    if d.streaming and training:
        return open_stream(source, d.image_folder, split, d.columns, d.caption_prompt)
    records = read_records(
        source, d.image_folder, split, columns=d.columns, caption_prompt=d.caption_prompt
    )
    if d.eval_share:
        left, held = hold_out(records, d.eval_share, data_seed(config))
        return left if training else held
    return records


def make_pipeline(
    config: RunSpec,
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


class RunData(NamedTuple):
    """A run's data, and the steps that follow from it.

    rows, held_out_rows: of a global batch, of training and of evaluation. total: optimizer steps
    of the run. epoch: those of an epoch, or of the run where data are a stream.
    """

    training: Pipeline
    held_out: Pipeline | None
    rows: int
    held_out_rows: int
    total: int
    epoch: int


def data_of(config: RunSpec, encoder: Encoder, mesh: Mesh, rows: int) -> RunData:
    """Return what a run trains and evaluates on, of which this process has its share.

    rows: of the global batch, `mesh.rows_of`.
    """
    t, share = config.training, row_share(mesh)
    held_out_rows = t.per_device_eval_batch_size * row_parts(mesh)
    training, held_out = make_pipeline(config, encoder, rows, share), None
    if evaluates(config):
        held_out = make_pipeline(config, encoder, held_out_rows, share, training=False)
    total = total_steps(t.max_steps, t.num_train_epochs, training.steps_per_epoch)
    return RunData(
        training, held_out, rows, held_out_rows, total, epoch=training.steps_per_epoch or total
    )


def total_steps(max_steps: int, epochs: float, steps_per_epoch: int | None) -> int:
    """Return the optimizer steps of a run: max_steps if above 0, else those of so many epochs.

    An epoch's last step may hold fewer micro-batches than the others. Raises `UserError` where
    neither is known.
    """
    if max_steps > 0:
        return max_steps
    if steps_per_epoch is None:
        raise UserError(
            "The length of a stream is unknown, so num_train_epochs has no meaning: set "
            "training.max_steps, or leave data.streaming out."
        )
    return math.ceil(epochs * steps_per_epoch)


def objective_of(config: RunSpec) -> Objective:
    """Return what a step minimises, by training.objective."""
    name = config.training.objective
    check_choice("training.objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def step_options(config: RunSpec) -> dict[str, Any]:
    """Return the options of `make_step` that the config's training section sets."""
    t = config.training
    return {
        "objective": objective_of(config),
        "label_smoothing": t.label_smoothing_factor,
        "neftune_alpha": t.neftune_noise_alpha or 0.0,
        "ema_decay": t.ema_decay,
    }


def state_options(config: RunSpec) -> dict[str, Any]:
    """Return the options of `init_state` that the config's training section sets."""
    t = config.training
    return {"param_dtype": jnp.dtype(t.param_dtype), "ema": t.ema_decay > 0}


def data_seed(config: RunSpec) -> int:
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
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def absolute_paths(config: RunSpec) -> dict[str, Any]:
    """Return the config as plain values whose paths hold from any working directory."""
    tree = config.to_dict()
    places = [
        *((tree["model"], key) for key in ("name_or_path", "adapter")),
        *((tree["data"], key) for key in ("train_file", "eval_file", "image_folder")),
        *((one, key) for one in tree["evaluators"].values() for key in ("file", "image_folder")),
    ]
    for keys, key in places:
        if keys[key] is not None:
            keys[key] = _absolute(keys[key])
    training = tree["training"]
    training["output_dir"] = str(Path(training["output_dir"]).expanduser().resolve())
    return tree


def abstract_base(config: RunSpec) -> tuple[Model, dict[str, Any]]:
    """Return the base of a config as `load_base` does, with shapes for arrays.

    Only config.json is read. A frozen leaf may be any pytree of shapes.
    """
    m, remat = config.model, config.training.remat
    found = read_hf_config(base_name(config), m.revision)
    model = from_config(found, compute_dtype(config), remat, attention=m.attention)
    check_type(config, model.hf_config)
    return model, quantization.abstract(model, quantization_of(config))


def abstract_run(
    config: RunSpec, mesh: Mesh, tokens: int | None = None
) -> tuple[Model, optax.GradientTransformation, TrainState, Any]:
    """Return (model, optimizer, state, frozen): a run's, its arrays as shapes with shardings.

    The schedule's length, which data decide, stands in as 1 where training.max_steps is not set:
    the program is the same but for that number. tokens: of the base's tokenizer; None: it is loaded
    where the base is a directory that holds one. Raises `UserError` for a config with
    model.adapter.
    """
    if config.model.adapter is not None:
        raise UserError(
            "A plan reads no weights, and model.adapter names some. Plan with model.adapter=none, "
            "with the lora.r and lora.target_modules of that adapter: the step is the same."
        )
    base, shapes = abstract_base(config)
    directory = Path(base_name(config)).expanduser()
    if tokens is None:
        tokens = len(load_tokenizer(directory)) if has_tokenizer(directory) else 0
    made: dict[str, Any] = {}

    def build(params: dict[str, Any]) -> dict[str, Any]:
        made["model"], params, made["table"] = adapt(config, base, params, tokens)
        return params

    params = jax.eval_shape(build, shapes)
    model, table = made["model"], made["table"]
    params = laid_out(model, params, mesh)
    check_spread(model, params, mesh)
    shardings = param_shardings(model, params, mesh)
    trainable, frozen = split(abstract(used_on_mesh(params, shardings), shardings), table)
    settings = OptimizerSettings.of(config.training)
    tx = optimizer(
        trainable, table, dataclasses.replace(settings, max_steps=max(1, settings.max_steps))
    )
    return model, tx, abstract_state(trainable, tx, mesh, **state_options(config)), frozen
