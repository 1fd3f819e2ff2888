"""Every key of a run's config, with default and meaning; overlays of files and overrides."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

from vlm_jax.config.checks import check, check_choice, unknown_keys
from vlm_jax.config.choices import (
    ALIASES,
    CHOICES,
    IMPLIED,
    METHODS,
    NONE_MEANS,
    NONE_WORDS,
    SWITCHES,
    WORDS,
)
from vlm_jax.config.files import read_file
from vlm_jax.config.parse import VALUES, plain
from vlm_jax.errors import UserError


def get_config() -> ConfigDict:
    """Return a new, locked config of all keys at their defaults. `None` means: not set.

    A file or an override may also say `method`, a key of config_tables.METHODS, as "dora": it
    stands for the keys by which that differs from plain LoRA.
    """
    c = ConfigDict()

    c.model = ConfigDict()
    c.model.name_or_path = placeholder(str)  # checkpoint directory or hub id; required
    c.model.revision = placeholder(str)  # branch, tag or commit on the hub
    c.model.type = placeholder(str)  # if set, config.json's model_type must be this
    c.model.adapter = placeholder(str)  # PEFT directory to start from (LLaVA's second stage)
    c.model.dtype = "auto"  # of frozen weights and computation; auto: bfloat16 if training.bf16
    # How frozen linear layers are stored: nf4, nf4-dq (double quantization: QLoRA), fp4, fp4-dq;
    # None: as they are. A checkpoint that is in 4 bits already keeps its codes and needs nothing.
    c.model.quantize = placeholder(str)
    c.model.quantize_components = ("language_model",)  # also vision, projector, head
    c.model.llm_int8_skip_modules = ()  # names or regexes of what stays dense
    # The same in the keys and with the defaults of transformers' BitsAndBytesConfig.
    c.model.load_in_4bit = False  # quantize, as the next keys say
    c.model.bnb_4bit_quant_type = "fp4"  # fp4, nf4
    c.model.bnb_4bit_use_double_quant = False  # store the scales in 8 bits too
    c.model.bnb_4bit_compute_dtype = placeholder(str)  # None: as model.dtype says
    # Learning rate of each component as a multiple of training.learning_rate; 0.0 freezes it.
    c.model.vision_encoder_lr_scale = 0.0  # of the vision tower
    c.model.projector_lr_scale = 1.0  # of the layers between tower and language model
    c.model.language_model_lr_scale = 1.0  # of LoRA factors, or of all weights without LoRA
    # Blocks of the language model that do not train, from the lowest on. Their moments are kept.
    c.model.freeze_layers = 0
    # What each block of the vision tower learns slower by than the one above it; 1.0: alike.
    c.model.vision_layer_decay = 1.0

    c.lora = ConfigDict()
    c.lora.enabled = True  # False trains the language model in full
    c.lora.r = 16  # rank
    c.lora.alpha = 32.0  # the update is scaled by alpha / r
    c.lora.dropout = 0.05  # on the input of A, while training
    # Suffixes of module names, a preset (llama, qwen, gpt, bert, vit), "all-linear", or one regex
    # over whole module names. Suffixes never reach into the vision tower. None: the layers of
    # model.adapter where it has LoRA factors, else the preset llama, all seven projections.
    c.lora.target_modules = placeholder(tuple)
    c.lora.modules_to_save = ()  # further modules to train in full; the projector is added itself
    c.lora.use_rslora = False  # scale by alpha / sqrt(r)
    c.lora.use_dora = False  # learn the norms of the sum's columns too
    c.lora.loraplus_lr_ratio = 1.0  # LoRA+: the learning rate of B over that of A; 16 is usual
    c.lora.rank_pattern = placeholder(object)  # other ranks: {regex over a name's end: rank}
    c.lora.alpha_pattern = placeholder(object)  # other alphas, likewise
    c.lora.layers_to_transform = placeholder(object)  # the only layers adapted, [0, 1]; None: all
    c.lora.layers_pattern = ()  # what stands before such a number in names; (): the first number
    c.lora.exclude_modules = placeholder(tuple)  # suffixes, or one regex, of what is not adapted
    # Which biases train too: none, all, lora_only (of adapted layers). A component whose
    # learning-rate scale is 0.0 stays frozen, biases and all.
    c.lora.bias = "none"
    # How matrices start: true (A at random, B zero), gaussian, orthogonal; pissa, pissa_niter_16
    # (fast), olora: with the kernel's own largest part; loftq: with what 4 bits lost of it.
    c.lora.init_lora_weights = "true"
    c.lora.task_type = "CAUSAL_LM"  # only this; PEFT files ask for it

    a = c.adapter = ConfigDict()  # bottleneck adapters, instead of LoRA: see methods.Adapter
    # houlsby, pfeiffer or parallel, or the `adapters` library's names; None: none.
    a.type = placeholder(str)
    # The width of a block over that of its bottleneck; None: 16, 16, 2.
    a.reduction_factor = placeholder(float)
    a.non_linearity = placeholder(str)  # None: swish, relu, relu
    a.scaling = placeholder(float)  # of what an adapter adds; None: 1, 1, 4
    a.norm = False  # a LayerNorm on what an adapter reads
    a.dropout = 0.0  # on what it adds, while training
    a.init_weights = "mam_adapter"  # starts equal to the base; bert, houlsby: nearly so
    a.components = ("language_model",)  # also vision
    a.modules_to_save = ()  # further modules to train in full; the projector is added itself

    t = c.training = ConfigDict()  # names and meanings of transformers' TrainingArguments
    t.output_dir = "outputs/run"  # what the run writes; must not hold another run
    # A bucket for checkpoints, as gs://bucket/run1: then hosts need share no disk; None: they lie
    # in output_dir/checkpoints.
    t.checkpoint_dir = placeholder(str)
    t.run_name = placeholder(str)  # for wandb and trackio; None: output_dir's last part
    t.project = "vlm_jax"  # where wandb and trackio keep the run
    t.num_train_epochs = 1.0  # times that every example is seen
    t.max_steps = -1  # optimizer steps; above 0 it overrides num_train_epochs
    t.per_device_train_batch_size = 1  # rows a device and micro-batch
    t.per_device_eval_batch_size = 8  # rows a device, for the loss on data.eval_file
    t.gradient_accumulation_steps = 1  # micro-batches of one optimizer step
    t.learning_rate = 2e-4  # its peak, of a component whose scale is 1.0
    t.weight_decay = 0.0  # never on norms and biases
    t.warmup_ratio = 0.03  # share of all steps over which the learning rate rises from 0
    # Above 0 it overrides warmup_ratio; below 1 it is such a share itself. Where it is given alone,
    # 0 too, warmup_ratio is 0.
    t.warmup_steps = 0
    t.lr_scheduler_type = "cosine"  # a key of train.schedules.SCHEDULES
    t.lr_scheduler_kwargs = placeholder(object)  # its own options, {min_lr_rate: 0.1}
    # adamw; adamw_8bit: bitsandbytes' 8-bit moments, a quarter of the memory; paged_adamw,
    # paged_adamw_8bit: moments lie in host memory and pass through the device page by page; a
    # resumed run may begin or end paging, but not change the number of bits.
    # adafactor: a row and a column for a matrix of squares; lion: one moment; muon: orthogonal
    # updates of hidden matrices from one moment, adamw for the rest.
    t.optim = "adamw"
    t.adam_beta1 = 0.9  # decay of the mean of gradients
    t.adam_beta2 = 0.999  # decay of the mean of squared gradients
    t.adam_epsilon = 1e-8  # added to the root of the latter
    t.max_grad_norm = 1.0  # global norm over the trained leaves; 0: no clipping
    t.logging_strategy = "steps"  # no, steps, epoch: when a line of metrics.jsonl is written
    t.logging_steps = 10  # steps that one line sums up; this and the next two may be shares of all
    t.logging_first_step = False  # the first step has a line too
    t.save_strategy = "steps"  # no, steps, epoch; the last step is always saved
    t.save_steps = 500  # steps between checkpoints
    t.save_total_limit = 2  # checkpoints kept, the newest; 0 or None: all
    t.eval_strategy = placeholder(str)  # no, steps, epoch; only where data.eval_file is set
    # Steps between evaluations. None: logging_steps where eval_strategy is set, else 500.
    t.eval_steps = placeholder(object)
    t.eval_on_start = False  # evaluate before the first step too
    t.eval_delay = 0.0  # no evaluation before so many steps, or epochs, as eval_strategy counts
    # Make the result of the best checkpoint, which is never deleted; else of the last step. Each
    # checkpoint must be evaluated, and is written after that: strategies agree, save_steps is a
    # multiple of eval_steps.
    t.load_best_model_at_end = False
    t.metric_for_best_model = placeholder(str)  # loss, accuracy; None: loss
    t.greater_is_better = placeholder(bool)  # None: as the metric says
    # Stop after so many evaluations in a row that do not better the best value before them by more
    # than early_stopping_threshold: transformers' EarlyStoppingCallback. 0: never.
    t.early_stopping_patience = 0
    t.early_stopping_threshold = 0.0  # of the metric's own unit
    t.neftune_noise_alpha = placeholder(float)  # NEFTune: noise on text embeddings, 5 is usual
    t.label_smoothing_factor = 0.0  # share of a target that all tokens of the vocabulary divide
    t.bf16 = True  # compute in bfloat16; trained weights are as param_dtype says, moments float32
    # float32: masters; bfloat16: half of their memory, stochastic rounding. A base of 32
    # bits is rounded to 16 once then, in layers that model.freeze_layers freezes too.
    t.param_dtype = "float32"
    t.ema_decay = 0.0  # of a moving average of trained weights, which is evaluated and exported
    t.fp16 = False  # not supported: bfloat16 needs no loss scaling
    t.gradient_checkpointing = True  # recompute each block in the backward pass
    t.remat_policy = placeholder(str)  # what of it is kept: a key of layers.scan.REMAT
    # Processes that prepare batches beside the run's own; 0: threads of the run, which is enough
    # where a step takes longer than its images. metrics.jsonl's data_wait tells.
    t.dataloader_num_workers = 0
    t.dataloader_drop_last = False  # leave out an epoch's last rows that fill no batch
    t.report_to = ("tensorboard",)  # tensorboard, wandb, trackio, none; metrics.jsonl is always
    t.seed = 42  # of LoRA's A, dropout and the order of the data
    t.data_seed = placeholder(int)  # of the order of the data alone; None: seed
    # Which examples make a step: random; sequential: as they lie; group_by_length: of megabatches
    # of 50 steps, each from its longest example to its shortest. None: those of one shape, steps in
    # random order, which pads least.
    t.train_sampling_strategy = placeholder(str)

    d = c.data = ConfigDict()
    # A .json, .jsonl, .csv, .tsv (or .gz, .zst of them), .parquet or .arrow file, a gs://, s3://
    # or hf:// address of one, a directory (saved data set, images with captions) or a hub data set;
    # required. Or a list of such, each a path or {path, split, image_folder, columns,
    # caption_prompt, name} with weight (its share of the examples) or epochs (how often each of
    # its records comes an epoch); docs/DATA.md.
    d.train_file = placeholder(object)
    d.eval_file = placeholder(object)  # the same for evaluation; None: there is none
    # Without an eval_file: the share of train_file's records that is held out to evaluate on, drawn
    # by the seed of the order of the data.
    d.eval_share = 0.0
    # Our names of columns -> the data's: {"question": "q_text", "image": "img"}; None: they agree.
    d.columns = placeholder(object)
    d.caption_prompt = "Describe this image."  # what the user says where images have captions only
    d.streaming = False  # read data sets as streams: no download first, no length, one fixed order
    # The media root, where relative paths of images and videos start; None: at the data file.
    d.image_folder = placeholder(str)
    d.allow_absolute_paths = False  # read files outside the media root: "/...", "..", links
    d.allow_urls = False  # fetch http(s) addresses of images and videos, each time they are read
    d.max_image_pixels = 178_956_970  # a larger image or frame is refused undecoded; the most
    d.max_seq_length = 2048  # tokens a row; nothing is ever cut, see overlong
    d.max_patches = placeholder(int)  # image patches a row; None: what the data ask for
    d.packing = False  # several examples share a row; each still sees itself alone
    # An example longer than a row: shrink_pixels of its images (down to min_pixels), then drop
    # whole leading turns, then leave it out; drop_turns; drop; error. Each case is counted.
    d.overlong = "shrink_pixels"
    d.train_split = placeholder(str)  # of a data set that has several; None: "train"
    d.eval_split = placeholder(str)  # the same of data.eval_file
    # Every image gets the pixels of a square of this side: on Qwen2-VL its aspect ratio is kept
    # (min_pixels = max_pixels = side x side, as when served); a tower of fixed size takes only its
    # own side. 0, or the word dynamic: dynamic resolution.
    d.image_resolution = 0
    d.min_pixels = placeholder(int)  # of dynamic resolution; None: the checkpoint's own setting
    d.max_pixels = placeholder(int)  # of dynamic resolution: the limit on image tokens
    # Videos; None: the checkpoint's own setting, else the number in brackets.
    d.video_fps = placeholder(float)  # frames that are taken of each second (2.0)
    d.video_min_frames = placeholder(int)  # of one video (4)
    d.video_max_frames = placeholder(int)  # of one video (768)
    d.video_min_pixels = placeholder(int)  # of one frame
    d.video_max_pixels = placeholder(int)  # of one frame: the limit on video tokens
    d.max_shapes = 4  # how many (tokens, patches) shapes rows are padded to
    d.shuffle = True  # a new order each epoch, of training.seed
    d.train_on = "all"  # assistant turns that carry loss: all (or "answers"), or the last one
    d.on_bad_example = "raise"  # an unreadable example: raise, or skip (counted and listed)
    d.max_bad_share = 0.01  # with skip: the run stops where a larger share of the records is bad

    e = c.evaluation = ConfigDict()
    e.accuracy = True  # generate answers to data.eval_file and count exact matches
    e.max_examples = 500  # of data.eval_file, the first ones, while training; 0: all
    e.max_new_tokens = 16  # longer answers are cut, and then do not match
    e.batch_size = 16  # prompts that generate together

    m = c.mesh = ConfigDict()  # the devices of a run; the four sizes multiply to their number
    # Pick data and fsdp so that memory suffices; also written `mesh: auto`.
    m.auto = False
    m.devices = 0  # how many take part, the first ones; 0: all
    m.data = -1  # copies of the model that share the rows; -1: what is left
    m.fsdp = 1  # devices that share one copy's parameters, and rows too
    m.tensor = 1  # devices that share each layer's matrices
    m.context = 1  # devices that share the tokens of a row, for rows too long for one

    return c.lock()


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        is_tree = isinstance(value, Mapping | ConfigDict | FrozenConfigDict)
        is_tree = is_tree and f"{prefix}{key}" not in VALUES
        if is_tree and (value or not prefix):  # an empty one in a section is a value, a wrong one
            flat.update(flatten_config(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def key_types() -> dict[str, type]:
    """Return {"section.key": the type of its values} of every key."""
    default = get_config()
    types: dict[str, type] = {}
    for section in default:
        for key in default[section]:
            types[f"{section}.{key}"] = default[section].get_type(key)
    return types


def _words(text: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[\s,]+", text.strip("[]() ").replace("'", "")) if part)


def coerce(key: str, value: Any, kind: type, optional: bool, where: str) -> Any:
    """Return `value` as the key's type, or raise `UserError`. Numbers may come as strings."""
    try:
        named = str(value) in CHOICES.get(key, ())  # "none" may be one of several choices
        if value is None or (optional and not named and str(value).strip().lower() in NONE_WORDS):
            if optional:
                return None
            if kind is tuple:
                return ()
            raise ValueError
        if key in VALUES:
            return VALUES[key](value)
        if key in ("lora.target_modules", "lora.exclude_modules") and isinstance(value, str):
            # One string is a preset or a regex, unless it plainly is a list.
            listed = value.startswith("[") or re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value)
            return _words(value) if listed else value
        if kind is bool:
            return SWITCHES[str(value).strip().lower()]
        if kind is tuple:
            return _words(value) if isinstance(value, str) else tuple(str(v) for v in value)
        if isinstance(value, bool):
            raise ValueError
        if kind is int:
            number = float(value)
            if number != int(number):
                raise ValueError
            return int(number) if abs(number) > 2**53 or not isinstance(value, int) else value
        if kind is float:
            return float(value)
        if isinstance(value, str | Path):
            return str(value).removeprefix("torch.") if key.endswith("dtype") else str(value)
        raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        names = {tuple: "list of strings", str: "string", bool: "true or false"}
        expected = (key in VALUES and str(error)) or names.get(kind, kind.__name__)
        raise UserError(
            f"The key '{key}' has the value {value!r} in {where}; expected {expected}. Its "
            f"default is {flatten_config(get_config())[key]!r}."
        ) from None


def _known(given: str, value: Any) -> tuple[str, Any]:
    """Return the key and value that a given key, perhaps by another name, and its value mean."""
    key = ALIASES.get(given, given)
    return WORDS.get(_spelled(key, value), (key, value))


def _spelled(key: str, value: Any) -> str:
    """Return a key with its value as `WORDS` has them."""
    return f"{key}={str(value).strip().lower()}"


def _with_implied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat values with the keys that others stand for, where they are not given too."""
    given = {key: value for key, value in values.items() if key != "method"}
    known = {ALIASES.get(key, key) for key in given}
    implied = {key: value for one in known for key, value in IMPLIED.get(one, {}).items()}
    if "method" in values:
        check_choice("method", values["method"], METHODS)
        implied |= METHODS[values["method"]]
    return {**{key: value for key, value in implied.items() if key not in known}, **given}


def _overlay(config: ConfigDict, values: Mapping[str, Any], where: str) -> None:
    """Set flat `values` in `config`, with their aliases, types and names checked."""
    types = key_types()
    optional = {key for key, value in flatten_config(get_config()).items() if value is None}
    seen: dict[str, str] = {}
    words = {given: _known(given, value) for given, value in _with_implied(values).items()}
    if unknown := [given for given, (key, _) in words.items() if key not in types]:
        raise unknown_keys(unknown, where, types)
    for given, (key, value) in words.items():
        if key in seen:
            raise UserError(f"{where} sets '{seen[key]}' and '{given}', which are one key: {key}.")
        seen[key] = given
        if key in NONE_MEANS and (value is None or str(value).strip().lower() in NONE_WORDS):
            value = NONE_MEANS[key]
        section, name = key.split(".")
        with config.ignore_type():  # target_modules is a tuple or a string
            config[section][name] = coerce(key, value, types[key], key in optional, where)


def _set_defaults(t: ConfigDict) -> None:
    """Set the defaults that other keys decide, as in transformers."""
    with t.ignore_type():
        if t.eval_steps is None:
            t.eval_steps = 500 if t.eval_strategy is None else t.logging_steps
        t.eval_strategy = "steps" if t.eval_strategy is None else t.eval_strategy


def load(path: str | Path | None, overrides: Mapping[str, Any] | Iterable[str] = ()) -> ConfigDict:
    """Return the locked config of a Python or YAML file (or a run's config.json), checked.

    path: a `.py` file with `get_config()` (`file.py:arg` calls `get_config("arg")`), a `.yaml` or
    `.json` file with the same sections and keys, or None for the defaults.
    overrides: {"training.learning_rate": 1e-4} or ["training.learning_rate=1e-4"]; they win.
    Raises `UserError` for a missing file, an unknown key (with the nearest known one), a value of
    the wrong type, or a value that is not supported.
    """
    if not isinstance(overrides, Mapping):
        pairs = {}
        for item in overrides:
            name, equals, value = item.partition("=")
            if not equals:
                raise UserError(f"The override '{item}' has no value; write section.key=value.")
            pairs[name] = value
        overrides = pairs
    config = get_config()
    if path is not None:
        file, tree = read_file(path)
        for section, values in tree.items():
            is_section = isinstance(values, Mapping | ConfigDict | FrozenConfigDict)
            if section in config and not is_section and _spelled(section, values) not in WORDS:
                raise UserError(f"'{section}' in '{file}' is a section, not the value {values!r}.")
        values = flatten_config(tree)
        if "method" in overrides:  # another method, and not what the file's one stood for
            values.pop("method", None)
        _overlay(config, values, f"'{file}'")
    _overlay(config, overrides, "the overrides")
    _set_defaults(config.training)
    check(flatten_config(config))
    return config.lock()


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Return plain nested dicts of values that JSON can hold."""
    return {
        section: {
            key: plain(value) if f"{section}.{key}" in VALUES or isinstance(value, tuple) else value
            for key, value in config[section].items()
        }
        for section in config
    }
