"""What a run is built from, and how it is read back."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax.data import Encoder, Pipeline, read_records
from vlm_jax.data.stream import open_stream
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.hub.adapter_files import is_adapter_directory, load_adapter
from vlm_jax.hub.load import load, resolve
from vlm_jax.hub.peft import starts_from_kernel
from vlm_jax.hub.peft_load import load_peft
from vlm_jax.hub.tensors import dtypes, tensor_files
from vlm_jax.layers.bottleneck import is_adapter
from vlm_jax.lora import add_lora, bias_leaves, is_lora, saved_modules
from vlm_jax.model import LoRA, Model
from vlm_jax.names import layer_names
from vlm_jax.sharding import check_spread, make_mesh, param_shardings, shard_params
from vlm_jax.starts import kind_of
from vlm_jax.targets import PRESETS, slots, target_kernels, target_modules
from vlm_jax.train.base import compute_dtype, load_base
from vlm_jax.train.bottlenecks import adapt_bottlenecks
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.identity import identity
from vlm_jax.train.optim import optimizer
from vlm_jax.train.places import places_of
from vlm_jax.train.recipe import lora_modules_to_save, training_table
from vlm_jax.train.step import init_state
from vlm_jax.trees import Table, flatten, join, split
from vlm_jax.vocabulary import EMBEDDING, add_tokens, is_added
from vlm_jax.weights import bnb, is_quantized


def build(config: ConfigDict, mesh: Any) -> tuple[Model, dict[str, Any], list[tuple[str, str]]]:
    """Return (model, params, training table): the base with what the config adds to train."""
    kind_of(config.lora.init_lora_weights)  # before weights are read
    model, params = load_base(config, mesh)
    assert model.source is not None
    tokens = len(load_tokenizer(model.source.directory))
    model, params, table = adapt(config, model, params, tokens)
    check_spread(param_shardings(model, params, mesh), mesh)
    return model, shard_params(model, params, mesh), table


def adapt(
    config: ConfigDict, model: Model, params: Mapping[str, Any], tokens: int
) -> tuple[Model, dict[str, Any], list[tuple[str, str]]]:
    """Return (model, params, training table) of a base and its tokenizer of `tokens` tokens.

    Where the tokenizer has more tokens than the embedding, rows for them are added and trained;
    a loaded adapter must bring them itself, else `UserError`.
    """
    if tokens > model.config.text.vocab_size and config.model.adapter is None:
        model, params = add_tokens(model, params, tokens - model.config.text.vocab_size)
    model, params, table = adapt_base(config, model, params)
    if tokens > model.config.text.vocab_size:
        raise UserError(
            f"The tokenizer of '{config.model.name_or_path}' has {tokens} tokens, but with the "
            f"adapter '{config.model.adapter}' the embedding has {model.config.text.vocab_size} "
            f"rows. Rows are not added to a loaded adapter: give the tokenizer that it was "
            f"trained with, or merge it first (vlm-jax export --merge) and train from the result."
        )
    return model, params, table


def adapt_base(
    config: ConfigDict, model: Model, params: Mapping[str, Any]
) -> tuple[Model, dict[str, Any], list[tuple[str, str]]]:
    """Return (model, params, training table) of a base: what `adapt` adds beside tokens.

    Runs under `jax.eval_shape` too, unless an adapter of model.adapter has rows of an embedding.
    """
    m, adapt = config.model, config.lora
    params = dict(params)
    if config.adapter.type is not None:
        model, params, table = adapt_bottlenecks(config, model, params)
        check_kept(model, params, table)
        return model, params, table
    if m.adapter is not None:
        model, params = load_peft(model, params, m.adapter)
    adapted = [  # what a loaded adapter reaches
        path.replace("/lora_A", "/embedding" if path.startswith(EMBEDDING) else "/kernel")
        for path in flatten(params)
        if path.endswith("/lora_A")
    ]
    scales = {
        "vision_encoder_lr_scale": m.vision_encoder_lr_scale,
        "projector_lr_scale": m.projector_lr_scale,
    }
    alpha = int(adapt.alpha) if adapt.alpha == int(adapt.alpha) else adapt.alpha
    targets = adapt.target_modules or PRESETS["llama"]
    lora = LoRA(
        adapt.r,
        alpha,
        adapt.dropout,
        targets,
        rslora=adapt.use_rslora,
        dora=adapt.use_dora,
        rank_pattern=configs.plain(adapt.rank_pattern) or {},
        alpha_pattern=configs.plain(adapt.alpha_pattern) or {},
        layers_to_transform=tuple(configs.plain(adapt.layers_to_transform) or ()),
        layers_pattern=tuple(adapt.layers_pattern),
        exclude_modules=adapt.exclude_modules or (),
        bias=adapt.bias,
        init=adapt.init_lora_weights,
    )
    kernels = adapted
    if adapt.enabled and not adapted:
        kernels = target_kernels(model, params, lora)
    saved = lora_modules_to_save(model, kernels, modules_to_save=adapt.modules_to_save, **scales)
    # What a loaded adapter without matrices brings stays in this one, trained further or not.
    brought = () if adapted or model.lora is None else model.lora.modules_to_save
    lora = dataclasses.replace(lora, modules_to_save=tuple(dict.fromkeys((*brought, *saved))))
    if adapted:
        model = _continue_lora(model, params, lora, config, adapted)
    elif adapt.enabled:
        _check_start(lora, params, kernels)
        key = jax.random.key(config.training.seed)
        model, params = add_lora(model, params, lora, key)
    elif m.language_model_lr_scale == 0:  # LLaVA's first stage: an adapter without matrices
        model = dataclasses.replace(model, lora=dataclasses.replace(lora, targets=()))
    else:  # trained in full: the result is a whole checkpoint, whatever adapter it started from
        model = dataclasses.replace(model, lora=None)
    table = training_table(
        model,
        params,
        language_model_lr_scale=m.language_model_lr_scale,
        lora_enabled=adapt.enabled or m.language_model_lr_scale == 0,
        loraplus_lr_ratio=adapt.loraplus_lr_ratio,
        freeze_layers=m.freeze_layers,
        vision_layer_decay=m.vision_layer_decay,
        modules_to_save=saved if brought else None,
        **scales,
    )
    check_kept(model, params, table)
    return model, params, table


def _check_start(lora: LoRA, params: Mapping[str, Any], kernels: list[str]) -> None:
    """Raise before a run whose adapter would be for other codes than its base's."""
    flat = flatten(params)
    if starts_from_kernel(lora) and any(is_quantized(flat[path]) for path in kernels):
        raise UserError(
            f"lora.init_lora_weights is {lora.init!r}, which makes the codes of a 4-bit base anew, "
            f"and the run's adapter could not hold them. Take 'loftq', which leaves the codes as "
            f"they are and fills up what they lost, or a base that is not quantized."
        )


def check_kept(model: Model, params: Mapping[str, Any], table: Table) -> None:
    """Raise before a run whose adapter would leave out a leaf that it trains."""
    if model.lora is None and model.adapter is None:
        return
    kept = saved_modules(model, params, model.modules_to_save).leaves
    kept += bias_leaves(model, params)
    for path in flatten(split(params, table)[0]):
        if not (is_lora(path) or is_adapter(path) or is_added(path) or path in kept):
            raise UserError(
                f"The training table trains '{path}', but the adapter would not hold it: add its "
                f"module, '{path.split('/')[-2]}', to modules_to_save, or freeze it."
            )


def _continue_lora(
    model: Model, params: Mapping[str, Any], lora: LoRA, config: ConfigDict, adapted: list[str]
) -> Model:
    """Return the model whose loaded LoRA goes on training, with this run's dropout.

    adapted: the kernels that have matrices. Raises `UserError` where the config asks for others.
    """
    own = model.lora
    assert own is not None
    if not config.lora.enabled:
        raise UserError(
            f"The adapter '{config.model.adapter}' holds LoRA matrices, but lora.enabled is false. "
            f"Merge it first (vlm-jax export --merge) and train from the result."
        )
    if lora.init != "true":
        raise UserError(
            f"lora.init_lora_weights is {lora.init!r}, but the adapter '{config.model.adapter}' "
            f"brings its matrices: they do not start anew. Take one of the two out."
        )
    for name in ("rank", "alpha", "rslora", "dora", "rank_pattern", "alpha_pattern", "bias"):
        if getattr(own, name) != getattr(lora, name):
            raise UserError(
                f"The adapter '{config.model.adapter}' has {name}={getattr(own, name)}, but the "
                f"config's lora section says {getattr(lora, name)}. Set the adapter's own value."
            )
    asked = config.lora.target_modules
    if asked is not None or lora.layers_to_transform or lora.exclude_modules:
        hits = target_modules(model, params, lora)
        wanted = {
            module
            for path, flags in hits.items()
            for module, hit in zip(layer_names(model, path), flags, strict=True)
            if hit
        }
        held = {s.module for path in adapted for s in slots(model, own, path) if s.rank}
        differ = sorted(wanted ^ held)
        if differ:
            which = "does not adapt" if differ[0] in wanted else "also adapts"
            raise UserError(
                f"lora.target_modules is {lora.targets!r}, but the adapter "
                f"'{config.model.adapter}' {which} '{differ[0]}' ({len(differ)} modules differ). A "
                f"loaded adapter goes on with its own layers: take lora.target_modules, "
                f"layers_to_transform and exclude_modules out of the config, or merge the adapter "
                f"first (vlm-jax export --merge) and train from the result."
            )
    saved = tuple(dict.fromkeys((*own.modules_to_save, *lora.modules_to_save)))
    return dataclasses.replace(
        model, lora=dataclasses.replace(own, dropout=lora.dropout, modules_to_save=saved)
    )


def make_encoder(config: ConfigDict, model: Model) -> Encoder:
    """Return the encoder of the model's own tokenizer and images, with the config's options."""
    d = config.data
    assert model.source is not None
    return Encoder(
        model.source.directory,
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


def make_pipeline(
    config: ConfigDict,
    encoder: Encoder,
    file: Any,
    split: str | None,
    rows: int,
    name: str,
    share: tuple[int, int] = (0, 1),
) -> Pipeline:
    """Return the pipeline of one data file. rows: of the global batch; share: `row_share`."""
    if file is None:
        raise UserError(
            f"The config names no data: set data.{name} to a .json, .jsonl or .parquet file, or a "
            f"data set."
        )
    d, source, training = config.data, configs.plain(file), name == "train_file"
    columns = configs.plain(d.columns)
    records: Any
    if d.streaming and training:
        records = open_stream(source, d.image_folder, split, columns)
    else:
        records = read_records(
            source, d.image_folder, split, columns=columns, caption_prompt=d.caption_prompt
        )
    index, count = share
    return Pipeline(
        encoder,
        records,
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


def stored_dtype(directory: Path) -> str:
    """Return the widest dtype of a checkpoint's dense tensors: in it none of them is rounded."""
    kinds: set[str] = set()
    for file in sorted(set(tensor_files(directory).values())):
        found = dtypes(directory / file)
        four = {bnb.weight_of(name) for name in found}  # 4-bit weights, and None for all others
        kinds |= {
            k for name, k in found.items() if bnb.weight_of(name) is None and name not in four
        }
    narrow = {"BF16": "bfloat16", "F16": "float16"}
    return narrow[kinds.pop()] if len(kinds) == 1 and kinds <= narrow.keys() else "float32"


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


def load_run(
    directory: str | Path, exact: bool = False
) -> tuple[Model, dict[str, Any], ConfigDict]:
    """Return (model, params, config) of a run: its result, or its newest checkpoint without one.

    exact: in the dtype that the base is stored in, so that no weight is rounded; otherwise in the
    run's compute dtype.
    """
    directory = Path(directory).expanduser()
    if not (directory / "config.json").is_file():
        raise UserError(
            f"'{directory}' holds no run: there is no config.json. Give the training.output_dir of "
            f"a run."
        )
    try:
        config = configs.load(directory / "config.json")
    except UserError as error:
        raise UserError(
            f"The run in '{directory}' cannot be read: {error} If this is a checkpoint and no run, "
            f"give it by --model."
        ) from error
    full = directory / "model"
    if exact:
        base = resolve(config.model.name_or_path, config.model.revision)
        dtype = stored_dtype(full if full.is_dir() else base)
        with config.unlocked():
            config.model.dtype = dtype
    if full.is_dir():
        model, params = load(str(full), compute_dtype(config))
        return model, params, config
    if (directory / "adapter").is_dir():
        model, params = load_base(config)
        read = load_adapter if is_adapter_directory(directory / "adapter") else load_peft
        model, params = read(model, params, directory / "adapter")
        return model, params, config
    places = places_of(config, directory)
    if not places.saved_steps():
        raise UserError(f"The run in '{directory}' has neither a result nor a checkpoint yet.")
    mesh = make_mesh(devices=jax.devices()[:1])
    model, params, table = build(config, mesh)
    trainable, frozen = split(params, table)
    training = {**config.training, "max_steps": max(1, config.training.max_steps)}
    tx = optimizer(trainable, table, training)
    state = init_state(trainable, tx, **state_options(config))
    same = identity(config, model, table, rows=0)
    same = {name: same[name] for name in ("base", "training table", "lora", "adapter")}
    checkpoints = Checkpoints(places.checkpoints, same)
    state, _ = checkpoints.restore(state)
    checkpoints.close()
    return model, join(state.result, frozen), config
