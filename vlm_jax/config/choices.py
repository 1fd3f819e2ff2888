"""Vocabularies of the config: aliases of keys, and the choices of values."""

from typing import Any

# What else people call a key. A value moves over as it is.
ALIASES = {
    "model.name": "model.name_or_path",
    "model.path": "model.name_or_path",
    "model.model_name": "model.name_or_path",
    "model.model_id": "model.name_or_path",
    "model.base_model": "model.name_or_path",
    "model.model_name_or_path": "model.name_or_path",
    "model.pretrained": "model.name_or_path",
    "model.pretrained_model_name_or_path": "model.name_or_path",
    "model.model_type": "model.type",
    "model.torch_dtype": "model.dtype",
    "model.quantization": "model.quantize",
    "model.skip_modules": "model.llm_int8_skip_modules",
    **{
        f"{section}.{key}": f"model.{key}"
        for section in ("quantization", "quantization_config", "bnb")
        for key in (
            *("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
            *("bnb_4bit_compute_dtype", "llm_int8_skip_modules", "quantize"),
        )
    },
    "model.vision_lr_scale": "model.vision_encoder_lr_scale",
    "lora.rank": "lora.r",
    "lora.lora_r": "lora.r",
    "lora.lora_rank": "lora.r",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "lora.targets": "lora.target_modules",
    "lora.init": "lora.init_lora_weights",
    "lora.rslora": "lora.use_rslora",
    "lora.dora": "lora.use_dora",
    "adapter.kind": "adapter.type",
    "training.optimizer": "training.optim",
    "training.label_smoothing": "training.label_smoothing_factor",
    "training.evaluation_strategy": "training.eval_strategy",
    "training.num_epochs": "training.num_train_epochs",
    "training.epochs": "training.num_train_epochs",
    "training.batch_size": "training.per_device_train_batch_size",
    "training.lr": "training.learning_rate",
    "training.scheduler": "training.lr_scheduler_type",
    "data.path": "data.train_file",
    "data.train_path": "data.train_file",
    "data.eval_path": "data.eval_file",
    "data.val_file": "data.eval_file",
    "data.validation_file": "data.eval_file",
    "data.val_split": "data.eval_split",
    "data.image_dir": "data.image_folder",
    "data.image_root": "data.image_folder",
    "data.max_length": "data.max_seq_length",
    "data.image_size": "data.image_resolution",
}

# A key with a word for its value, in lower case -> the key and value that they mean.
WORDS: dict[str, tuple[str, Any]] = {
    "mesh=auto": ("mesh.auto", True),
    "training.eval_strategy=none": ("training.eval_strategy", "no"),
    "training.report_to=false": ("training.report_to", "none"),
    "training.compilation_cache_dir=no": ("training.compilation_cache_dir", None),
    "training.compilation_cache_dir=false": ("training.compilation_cache_dir", None),
    # YAML reads the word no as false.
    **{
        f"training.{name}_strategy=false": (f"training.{name}_strategy", "no")
        for name in ("logging", "save", "eval")
    },
    # transformers 4's key of what version 5 calls train_sampling_strategy.
    **{
        f"training.group_by_length={word}": ("training.train_sampling_strategy", order)
        for word, order in (
            *((word, "group_by_length") for word in ("true", "yes", "1")),
            *((word, "random") for word in ("false", "no", "0")),
        )
    },
}

# Every name of an optimizer, transformers' OptimizerNames among them, and the one that it means.
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_torch_npu_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
    "adafactor": "adafactor",
    "lion": "lion",
    "lion_32bit": "lion",
    "muon": "muon",
}

# Kinds of bottleneck adapters, and the `adapters` library's names of them.
ADAPTERS = ("houlsby", "pfeiffer", "parallel", "double_seq_bn", "seq_bn", "par_bn")

# The keys by which methods differ, as plain LoRA has them.
PLAIN_LORA: dict[str, Any] = {
    "lora.enabled": True,
    "lora.use_rslora": False,
    "lora.use_dora": False,
    "lora.loraplus_lr_ratio": 1.0,
    "lora.init_lora_weights": "true",
    "adapter.type": None,
}
# The one word of a config's key `method`, and what it changes of plain LoRA.
CHANGES: dict[str, dict[str, Any]] = {
    "full": {"lora.enabled": False},
    "lora": {},
    "qlora": {"model.quantize": "nf4-dq"},
    "rslora": {"lora.use_rslora": True},
    "dora": {"lora.use_dora": True},
    "loraplus": {"lora.loraplus_lr_ratio": 16.0},
    "pissa": {"lora.init_lora_weights": "pissa"},
    "loftq": {"model.quantize": "nf4", "lora.init_lora_weights": "loftq"},
    "houlsby": {"lora.enabled": False, "adapter.type": "houlsby"},
    "pfeiffer": {"lora.enabled": False, "adapter.type": "pfeiffer"},
    "parallel": {"lora.enabled": False, "adapter.type": "parallel"},
}
METHODS = {name: {**PLAIN_LORA, **changes} for name, changes in CHANGES.items()}

# What a key that is given makes of others that are not given with it.
IMPLIED: dict[str, dict[str, Any]] = {"training.warmup_steps": {"training.warmup_ratio": 0.0}}

CHOICES: dict[str, tuple[str | None, ...]] = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.quantize": (None, "nf4", "nf4-dq", "fp4", "fp4-dq"),
    "model.bnb_4bit_quant_type": ("fp4", "nf4"),
    "model.bnb_4bit_compute_dtype": (None, "float32", "bfloat16"),
    "model.attention": (None, "splash", "xla", "chunked"),
    "lora.bias": ("none", "all", "lora_only"),
    "lora.task_type": ("CAUSAL_LM",),
    "adapter.type": (None, *ADAPTERS),
    "adapter.init_weights": ("mam_adapter", "bert", "houlsby"),
    "training.lr_scheduler_type": (
        *("constant", "constant_with_warmup", "linear", "polynomial", "inverse_sqrt"),
        *("cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr"),
        *("warmup_stable_decay", "wsd"),
    ),
    "training.optim": tuple(OPTIMIZERS),
    "training.remat_policy": (
        *(None, "auto", "block", "qkv", "residual", "gate", "products", "none"),
        *("block_save_attention", "dots", "offload", "products_offload"),
    ),
    "training.dropout_rng": (None, "hashed", "threefry"),
    "training.logging_strategy": ("no", "steps", "epoch"),
    "training.train_sampling_strategy": (None, "random", "sequential", "group_by_length"),
    "training.param_dtype": ("float32", "bfloat16"),
    "training.save_strategy": ("no", "steps", "epoch"),
    "training.eval_strategy": (None, "no", "steps", "epoch"),
    "training.metric_for_best_model": (None, "loss", "accuracy", "eval_loss", "eval_accuracy"),
    "data.train_on": ("all", "answers", "last"),
    "data.on_bad_example": ("raise", "skip"),
    "data.overlong": ("shrink_pixels", "drop_turns", "drop", "error"),
}
REPORTERS = ("tensorboard", "wandb", "trackio", "none")

# (keys, smallest, largest allowed value)
RANGES: list[tuple[str, float, float]] = [
    (r"model\..*_lr_scale", 0, 1000),
    (r"model\.freeze_layers", 0, 1e6),
    (r"model\.vision_layer_decay", 1e-6, 1),
    (r"lora\.r", 1, 65536),
    (r"lora\.alpha", 0, 1e9),
    (r"lora\.dropout", 0, 0.999),
    (r"lora\.loraplus_lr_ratio", 1e-3, 1e6),
    (r"adapter\.reduction_factor", 1e-3, 1e6),
    (r"adapter\.dropout", 0, 0.999),
    (r"training\.(per_device_.*|gradient_accumulation_steps)", 1, 1e9),
    (r"training\.(logging_steps|save_steps|eval_steps)", 1e-9, 1e9),
    (r"training\.(eval_delay|early_stopping_patience|early_stopping_threshold)", 0, 1e12),
    (r"training\.label_smoothing_factor", 0, 1),
    (r"training\.ema_decay", 0, 1 - 1e-9),
    (r"training\.neftune_noise_alpha", 0, 1e6),
    (r"training\.dataloader_num_workers", 0, 1e9),
    (r"training\.(save_total_limit|warmup_steps|weight_decay|max_grad_norm)", 0, 1e9),
    (r"training\.(num_train_epochs|learning_rate|adam_epsilon)", 1e-30, 1e9),
    (r"training\.max_steps", -1, 1e12),
    (r"training\.(adam_beta1|adam_beta2)", 0, 1 - 1e-9),  # at 1 a mean would never move
    (r"training\.warmup_ratio", 0, 1),
    (r"training\.(seed|data_seed)", 0, 2**31 - 1),
    (r"data\.(max_seq_length|max_patches|max_shapes)", 1, 1e9),
    (r"data\.max_bad_share", 0, 1),
    (r"data\.eval_share", 0, 0.9),
    (r"data\.(video_)?(min_pixels|max_pixels)", 1, 1e12),
    (r"data\.video_(fps|min_frames|max_frames)", 1e-6, 1e9),
    (r"data\.max_image_pixels", 1, 178_956_970),  # Pillow refuses more itself
    (r"data\.image_resolution", 0, 1e6),
    (r"(evaluation|evaluators\..*)\.(max_new_tokens|batch_size|every)", 1, 1e9),
    (r"(evaluation|evaluators\..*)\.max_examples", 0, 1e12),
    (r"mesh\.devices", 0, 1e6),
    (r"mesh\.(data|fsdp|tensor|context)", -1, 1e6),
]

SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
# The YAML parser reads these words as None, and people mean the string.
NONE_WORDS = ("none", "null", "~", "")
# Keys whose None, as TrainingArguments and others have it, is a value here.
NONE_MEANS: dict[str, Any] = {
    "training.save_total_limit": 0,
    "training.warmup_ratio": 0.0,
    "training.max_grad_norm": 0.0,
    "lora.bias": "none",
    "model.dtype": "auto",
    "data.image_resolution": 0,
}
