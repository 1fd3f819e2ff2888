"""A run's settings as frozen values: every key of a config, its type, default and meaning.

`None` means: not set. A config (`ml_collections`, YAML, words) becomes a `RunSpec` once, at the
command or at `train`'s entry; what lies below sees only these.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.config.checks import check
from vlm_jax.config.parse import flatten, plain

AUTO = "auto"  # a remat policy that `train.mesh` chooses


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The base checkpoint: which one, how it is stored, and what of it trains."""

    name_or_path: str | None = None  # checkpoint directory or hub id; required
    revision: str | None = None  # branch, tag or commit on the hub
    type: str | None = None  # if set, config.json's model_type must be this
    adapter: str | None = None  # PEFT directory to start from (LLaVA's second stage)
    dtype: str = "auto"  # of frozen weights and computation; auto: bfloat16 if training.bf16
    # How frozen linear layers are stored: nf4, nf4-dq (double quantization: QLoRA), fp4, fp4-dq;
    # None: as they are. A checkpoint that is in 4 bits already keeps its codes and needs nothing.
    quantize: str | None = None
    quantize_components: tuple[str, ...] = ("language_model",)  # also vision, projector, head
    llm_int8_skip_modules: tuple[str, ...] = ()  # names or regexes of what stays dense
    # The same in the keys and with the defaults of transformers' BitsAndBytesConfig.
    load_in_4bit: bool = False  # quantize, as the next keys say
    bnb_4bit_quant_type: str = "fp4"  # fp4, nf4
    bnb_4bit_use_double_quant: bool = False  # store the scales in 8 bits too
    bnb_4bit_compute_dtype: str | None = None  # None: as model.dtype says
    # What computes attention: splash (TPU), chunked or xla (any device). None: the fastest for each
    # length of rows. Steps of a generation, with a KV cache, never take splash.
    attention: str | None = None
    # Learning rate of each component as a multiple of training.learning_rate; 0.0 freezes it.
    vision_encoder_lr_scale: float = 0.0  # of the vision tower
    projector_lr_scale: float = 1.0  # of the layers between tower and language model
    language_model_lr_scale: float = 1.0  # of LoRA's matrices, or of all weights without LoRA
    # Blocks of the language model that do not train, from the lowest on. Their moments are kept.
    freeze_layers: int = 0
    # What each block of the vision tower learns slower by than the one above it; 1.0: alike.
    vision_layer_decay: float = 1.0


@dataclasses.dataclass(frozen=True)
class LoRASpec:
    """LoRA, by the names of PEFT's `LoraConfig`."""

    enabled: bool = True  # False trains the language model in full
    r: int = 16  # rank
    alpha: float = 32.0  # the update is scaled by alpha / r
    dropout: float = 0.05  # on the input of A, while training
    # Suffixes of module names, a preset (llama, qwen, gpt, bert, vit), "all-linear", or one regex
    # over whole module names. Suffixes never reach into the vision tower. None: the layers of
    # model.adapter where it brings matrices, else the preset llama, all seven projections.
    target_modules: tuple[str, ...] | str | None = None
    # further modules to train in full; the projector is added itself
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False  # scale by alpha / sqrt(r)
    use_dora: bool = False  # learn the norms of the sum's columns too
    loraplus_lr_ratio: float = 1.0  # LoRA+: the learning rate of B over that of A; 16 is usual
    rank_pattern: Any = None  # other ranks: {regex over a name's end: rank}
    alpha_pattern: Any = None  # other alphas, likewise
    layers_to_transform: Any = None  # the only layers adapted, [0, 1]; None: all
    # what stands before such a number in names; (): the first number
    layers_pattern: tuple[str, ...] = ()
    # suffixes, or one regex, of what is not adapted
    exclude_modules: tuple[str, ...] | str | None = None
    # Which biases train too: none, all, lora_only (of adapted layers). A component whose
    # learning-rate scale is 0.0 stays frozen, biases and all.
    bias: str = "none"
    # How matrices start: true (A at random, B zero), gaussian, orthogonal; pissa, pissa_niter_16
    # (fast), olora: with the kernel's own largest part; loftq: with what 4 bits lost of it.
    init_lora_weights: str = "true"
    task_type: str = "CAUSAL_LM"  # only this; PEFT files ask for it


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Bottleneck adapters, instead of LoRA: see `models.methods.Adapter`."""

    # houlsby, pfeiffer or parallel, or the `adapters` library's names; None: none.
    type: str | None = None
    # The width of a block over that of its bottleneck; None: 16, 16, 2.
    reduction_factor: float | None = None
    non_linearity: str | None = None  # None: swish, relu, relu
    scaling: float | None = None  # of what an adapter adds; None: 1, 1, 4
    norm: bool = False  # a LayerNorm on what an adapter reads
    dropout: float = 0.0  # on what it adds, while training
    init_weights: str = "mam_adapter"  # starts equal to the base; bert, houlsby: nearly so
    components: tuple[str, ...] = ("language_model",)  # also vision
    # further modules to train in full; the projector is added itself
    modules_to_save: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """Names and meanings of transformers' `TrainingArguments`."""

    output_dir: str = "outputs/run"  # what the run writes; must not hold another run
    # A bucket for checkpoints, as gs://bucket/run1: then hosts need share no disk; None: they lie
    # in output_dir/checkpoints.
    checkpoint_dir: str | None = None
    run_name: str | None = None  # for wandb and trackio; None: output_dir's last part
    project: str = "vlm_jax"  # where wandb and trackio keep the run
    num_train_epochs: float = 1.0  # times that every example is seen
    max_steps: int = -1  # optimizer steps; above 0 it overrides num_train_epochs
    per_device_train_batch_size: int = 1  # rows a device and micro-batch
    per_device_eval_batch_size: int = 8  # rows a device, for the loss on data.eval_file
    gradient_accumulation_steps: int = 1  # micro-batches of one optimizer step
    learning_rate: float = 2e-4  # its peak, of a component whose scale is 1.0
    weight_decay: float = 0.0  # never on norms and biases
    warmup_ratio: float = 0.03  # share of all steps over which the learning rate rises from 0
    # Above 0 it overrides warmup_ratio; below 1 it is such a share itself. Where it is given alone,
    # 0 too, warmup_ratio is 0.
    warmup_steps: int = 0
    lr_scheduler_type: str = "cosine"  # a key of train.schedules.SCHEDULES
    lr_scheduler_kwargs: Any = None  # its own options, {min_lr_rate: 0.1}
    # adamw; adamw_8bit: bitsandbytes' 8-bit moments, a quarter of the memory; paged_adamw,
    # paged_adamw_8bit: moments lie in host memory and pass through the device page by page; a
    # resumed run may begin or end paging, but not change the number of bits.
    # adafactor: a row and a column for a matrix of squares; lion: one moment; muon: orthogonal
    # updates of hidden matrices from one moment, adamw for the rest.
    optim: str = "adamw"
    adam_beta1: float = 0.9  # decay of the mean of gradients
    adam_beta2: float = 0.999  # decay of the mean of squared gradients
    adam_epsilon: float = 1e-8  # added to the root of the latter
    max_grad_norm: float = 1.0  # global norm over the trained leaves; 0: no clipping
    logging_strategy: str = "steps"  # no, steps, epoch: when a line of metrics.jsonl is written
    # steps that one line sums up; this and the next two may be shares of all
    logging_steps: int = 10
    logging_first_step: bool = False  # the first step has a line too
    save_strategy: str = "steps"  # no, steps, epoch; the last step is always saved
    save_steps: int = 500  # steps between checkpoints
    save_total_limit: int = 2  # checkpoints kept, the newest; 0 or None: all
    eval_strategy: str | None = None  # no, steps, epoch; only where data.eval_file is set
    # Steps between evaluations. None: logging_steps where eval_strategy is set, else 500.
    eval_steps: Any = None
    eval_on_start: bool = False  # evaluate before the first step too
    # no evaluation before so many steps, or epochs, as eval_strategy counts
    eval_delay: float = 0.0
    # Make the result of the best checkpoint, which is never deleted; else of the last step. Each
    # checkpoint must be evaluated, and is written after that: strategies agree, save_steps is a
    # multiple of eval_steps.
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None  # loss, accuracy; None: loss
    greater_is_better: bool | None = None  # None: as the metric says
    # Stop after so many evaluations in a row that do not better the best value before them by more
    # than early_stopping_threshold: transformers' EarlyStoppingCallback. 0: never.
    early_stopping_patience: int = 0
    early_stopping_threshold: float = 0.0  # of the metric's own unit
    objective: str = "cross_entropy"  # what a step minimises: a key of train.losses.OBJECTIVES
    neftune_noise_alpha: float | None = None  # NEFTune: noise on text embeddings, 5 is usual
    # share of a target that all tokens of the vocabulary divide
    label_smoothing_factor: float = 0.0
    # compute in bfloat16; trained weights are as param_dtype says, moments float32
    bf16: bool = True
    # float32: masters; bfloat16: half of their memory, with stochastic rounding. A base of 32
    # bits is rounded to 16 once then, in layers that model.freeze_layers freezes too.
    param_dtype: str = "float32"
    # of a moving average of trained weights, which is evaluated and exported
    ema_decay: float = 0.0
    fp16: bool = False  # not supported: bfloat16 needs no loss scaling
    gradient_checkpointing: bool = True  # recompute each block in the backward pass
    # What is kept for the backward pass, from most to least: none, products, gate, residual, qkv,
    # block, offload; also products_offload, block_save_attention, dots. auto: the fastest that
    # fits, with micro-batches to match (docs/METHODS.md). None: block, or none without
    # gradient_checkpointing.
    remat_policy: str | None = None
    # What draws the masks of lora.dropout and adapter.dropout: hashed, a counter's hash that costs
    # next to nothing; threefry, jax.random's. None: hashed, or what a resumed run began with.
    dropout_rng: str | None = None
    # Where compiled programs are kept for later runs: a directory that only you may write to; none;
    # auto: what JAX_COMPILATION_CACHE_DIR says, else ~/.cache/vlm_jax/compiled, on a CPU nowhere.
    compilation_cache_dir: str | None = "auto"
    # Processes that prepare batches beside the run's own; 0: threads of the run, which is enough
    # where a step takes longer than its images. metrics.jsonl's data_wait tells.
    dataloader_num_workers: int = 0
    dataloader_drop_last: bool = False  # leave out an epoch's last rows that fill no batch
    profile_steps: str = ""  # "10-13": jax.profiler's trace of these steps, in output_dir/profile
    # tensorboard, wandb, trackio, none; metrics.jsonl is always
    report_to: tuple[str, ...] = ("tensorboard",)
    seed: int = 42  # of LoRA's A, dropout and the order of the data
    data_seed: int | None = None  # of the order of the data alone; None: seed
    # Which examples make a step: random; sequential: as they lie; group_by_length: of megabatches
    # of 50 steps, each from its longest example to its shortest. None: those of one shape, steps in
    # random order, which pads least.
    train_sampling_strategy: str | None = None

    def __post_init__(self) -> None:
        # What other keys decide, as in transformers.
        if self.eval_steps is None:
            default = 500 if self.eval_strategy is None else self.logging_steps
            object.__setattr__(self, "eval_steps", default)
        if self.eval_strategy is None:
            object.__setattr__(self, "eval_strategy", "steps")

    @property
    def remat(self) -> str:
        """The remat policy, a key of `layers.remat.REMAT`: the one named, or a block's.

        Where it is still to be chosen it is a block's, which needs least of a device.
        """
        if self.remat_policy in (None, AUTO):
            return "block" if self.remat_policy or self.gradient_checkpointing else "none"
        return self.remat_policy


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Records, and what becomes of them."""

    # A .json, .jsonl, .csv, .tsv (or .gz, .zst of them), .parquet or .arrow file, a gs://, s3://
    # or hf:// address of one, a directory (saved data set, images with captions) or a hub data set;
    # required. Or a list of such, each a path or {path, split, image_folder, columns,
    # caption_prompt, name} with weight (its share of the examples) or epochs (how often each of
    # its records comes an epoch); docs/DATA.md.
    train_file: Any = None
    eval_file: Any = None  # the same for evaluation; None: there is none
    # Without an eval_file: the share of train_file's records that is held out to evaluate on, drawn
    # by the seed of the order of the data.
    eval_share: float = 0.0
    # Our names of columns -> the data's: {"question": "q_text", "image": "img"}; None: they agree.
    columns: Any = None
    # what the user says where images have captions only
    caption_prompt: str = "Describe this image."
    # read data sets as streams: no download first, no length, one fixed order
    streaming: bool = False
    # The media root, where relative paths of images and videos start; None: at the data file.
    image_folder: str | None = None
    allow_absolute_paths: bool = False  # read files outside the media root: "/...", "..", links
    # fetch http(s) addresses of images and videos, each time they are read
    allow_urls: bool = False
    max_image_pixels: int = 178_956_970  # a larger image or frame is refused undecoded; the most
    max_seq_length: int = 2048  # tokens a row; nothing is ever cut, see overlong
    max_patches: int | None = None  # image patches a row; None: what the data ask for
    packing: bool = False  # several examples share a row; each still sees itself alone
    # An example longer than a row: shrink_pixels of its images (down to min_pixels), then drop
    # whole leading turns, then leave it out; drop_turns; drop; error. Each case is counted.
    overlong: str = "shrink_pixels"
    train_split: str | None = None  # of a data set that has several; None: "train"
    eval_split: str | None = None  # the same of data.eval_file
    # Every image gets the pixels of a square of this side: on Qwen2-VL its aspect ratio is kept
    # (min_pixels = max_pixels = side x side, as when served); a tower of fixed size takes only its
    # own side. 0, or the word dynamic: dynamic resolution.
    image_resolution: int = 0
    min_pixels: int | None = None  # of dynamic resolution; None: the checkpoint's own setting
    max_pixels: int | None = None  # of dynamic resolution: the limit on image tokens
    # Videos; None: the checkpoint's own setting, else the number in brackets.
    video_fps: float | None = None  # frames that are taken of each second (2.0)
    video_min_frames: int | None = None  # of one video (4)
    video_max_frames: int | None = None  # of one video (768)
    video_min_pixels: int | None = None  # of one frame
    video_max_pixels: int | None = None  # of one frame: the limit on video tokens
    max_shapes: int = 4  # how many (tokens, patches) shapes rows are padded to
    shuffle: bool = True  # a new order each epoch, of training.seed
    train_on: str = "all"  # assistant turns that carry loss: all (or "answers"), or the last one
    on_bad_example: str = "raise"  # an unreadable example: raise, or skip (counted and listed)
    # with skip: the run stops where a larger share of the records is bad
    max_bad_share: float = 0.01


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
    """What an evaluation does besides the loss."""

    accuracy: bool = True  # generate answers to data.eval_file and count exact matches
    max_examples: int = 500  # of data.eval_file, the first ones, while training; 0: all
    max_new_tokens: int = 16  # longer answers are cut, and then do not match
    batch_size: int = 16  # prompts that generate together


@dataclasses.dataclass(frozen=True)
class EvaluatorSpec:
    """An evaluator by name: answers to the questions of a file of its own, scored."""

    eval: str = "accuracy"  # how answers are scored: a key of evals.EVALS
    file: Any = None  # records with reference answers, as data.eval_file; required
    split: str | None = None  # of a data set that has several
    image_folder: str | None = None  # the root of relative paths; None: data.image_folder
    every: int | None = None  # steps; None: with each evaluation, as training.eval_steps says
    max_examples: int = 500  # the first ones; 0: all
    max_new_tokens: int = 16  # longer answers are cut
    batch_size: int = 16  # prompts that generate together


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """The devices of a run; the four sizes multiply to their number."""

    # Pick data and fsdp so that memory suffices; also written `mesh: auto`.
    auto: bool = False
    devices: int = 0  # how many take part, the first ones; 0: all
    data: int = -1  # copies of the model that share the rows; -1: what is left
    fsdp: int = 1  # devices that share one copy's parameters, and rows too
    tensor: int = 1  # devices that share each layer's matrices
    context: int = 1  # devices that share the tokens of a row, for rows too long for one


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """All settings of a run. Raises `UserError` for values that are not supported together."""

    model: ModelSpec = ModelSpec()
    lora: LoRASpec = LoRASpec()
    adapter: AdapterSpec = AdapterSpec()
    training: TrainSpec = TrainSpec()
    data: DataSpec = DataSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    mesh: MeshSpec = MeshSpec()
    # Names of the user's own, each for an evaluator: evaluators.docvqa.file
    evaluators: Mapping[str, EvaluatorSpec] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.flat())

    @classmethod
    def of(cls, config: "RunSpec | Mapping[str, Mapping[str, Any]]") -> "RunSpec":
        """Return the settings that a config holds; of such settings, themselves."""
        if isinstance(config, RunSpec):
            return config
        tree = dict(config)
        named = tree.pop("evaluators", {}).items()
        return cls(
            **{name: _section(SECTIONS[name], keys) for name, keys in tree.items()},
            evaluators={name: _section(EvaluatorSpec, keys) for name, keys in named},
        )

    @classmethod
    def of_flat(cls, values: Mapping[str, Any]) -> "RunSpec":
        """Return the settings of {"section.key": value}, defaults elsewhere."""
        tree: dict[str, Any] = {}
        for name, value in values.items():
            *sections, key = name.split(".")  # of an evaluator two
            keys = tree
            for section in sections:
                keys = keys.setdefault(section, {})
            keys[key] = value
        return cls.of(tree)

    def flat(self) -> dict[str, Any]:
        """Return {"section.key": value}, of evaluators {"evaluators.NAME.key": value}."""
        return flatten(dataclasses.asdict(self))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain nested dicts of values that JSON can hold."""
        return plain(dataclasses.asdict(self))

    def having(self, values: Mapping[str, Any]) -> "RunSpec":
        """Return these settings with others at some keys: {"mesh.data": 2}."""
        return RunSpec.of_flat({**self.flat(), **values})


SECTIONS: dict[str, type] = {
    "model": ModelSpec,
    "lora": LoRASpec,
    "adapter": AdapterSpec,
    "training": TrainSpec,
    "data": DataSpec,
    "evaluation": EvaluationSpec,
    "mesh": MeshSpec,
}


def _section(spec: type, keys: Mapping[str, Any]) -> Any:
    """Return a section of values without types of ml_collections; tuples of names stay tuples."""

    def own(value: Any) -> Any:
        names = isinstance(value, tuple) and all(isinstance(one, str) for one in value)
        return value if names else plain(value)

    return spec(**{key: own(value) for key, value in keys.items()})
