"""Keys of TrainingArguments, LoraConfig and BitsAndBytesConfig, and their equivalents here.

So too of TRL's SFTConfig and of LLaMA-Factory. The tables of docs/FROM_PYTORCH.md are made of
these, and so are the errors for keys that this program does not take.
"""

from vlm_jax.config.from_pytorch.llama_factory import LLAMA_FACTORY
from vlm_jax.config.from_pytorch.message import NOT_NEEDED, REFUSED, RENAMED, SAME, Key
from vlm_jax.config.from_pytorch.trl import SFT_CONFIG

_HUB = "nothing is uploaded; `hf upload` takes the run's adapter/ or model/"
_TRACKIO = "nothing is uploaded; trackio's own commands do"
_PLATFORM = "XLA compiles every step as a whole"
_GATHERED = "an evaluation keeps sums only"
_DDP = "the compiler places what devices exchange"
_WORKERS = "always so"

TRAINING_ARGUMENTS = {
    "output_dir": Key(SAME),
    "per_device_train_batch_size": Key(SAME, "of one micro-batch"),
    "num_train_epochs": Key(SAME),
    "max_steps": Key(SAME),
    "learning_rate": Key(SAME, "scaled for each component by model.*_lr_scale"),
    "lr_scheduler_type": Key(SAME, "not reduce_lr_on_plateau and greedy"),
    "lr_scheduler_kwargs": Key(SAME),
    "warmup_steps": Key(
        SAME, "a share of all steps below 1; without it version 4's warmup_ratio counts, 0.03"
    ),
    "optim": Key(SAME, "the names are listed in vlm_jax/config/choices.py"),
    "optim_args": Key(REFUSED, "options are keys of their own: adam_beta1, weight_decay, ..."),
    "weight_decay": Key(SAME, "never of norms and biases"),
    "adam_beta1": Key(SAME),
    "adam_beta2": Key(SAME),
    "adam_epsilon": Key(SAME),
    "optim_target_modules": Key(REFUSED, "it names modules for GaLore and APOLLO"),
    "gradient_accumulation_steps": Key(SAME),
    "average_tokens_across_devices": Key(
        NOT_NEEDED, "the loss is always divided by the tokens of all devices and micro-batches"
    ),
    "max_grad_norm": Key(SAME),
    "label_smoothing_factor": Key(
        SAME, "of shifted labels for every model; transformers shifts them for text models only"
    ),
    "bf16": Key(SAME),
    "fp16": Key(REFUSED, "float16 needs loss scaling; use bf16"),
    "bf16_full_eval": Key(NOT_NEEDED, "an evaluation computes in model.dtype, as a step does"),
    "fp16_full_eval": Key(REFUSED, "float16 needs loss scaling; use bf16"),
    "tf32": Key(REFUSED, "set JAX_DEFAULT_MATMUL_PRECISION in the environment"),
    "activation_checkpointing": Key(RENAMED, "training.gradient_checkpointing"),
    "activation_checkpointing_kwargs": Key(RENAMED, "training.remat_policy"),
    "gradient_checkpointing": Key(SAME),
    "gradient_checkpointing_kwargs": Key(RENAMED, "training.remat_policy"),
    "torch_compile": Key(NOT_NEEDED, _PLATFORM),
    "torch_compile_backend": Key(NOT_NEEDED, _PLATFORM),
    "torch_compile_mode": Key(NOT_NEEDED, _PLATFORM),
    "use_liger_kernel": Key(NOT_NEEDED, "the loss goes in chunks, without an array of all logits"),
    "liger_kernel_config": Key(NOT_NEEDED, "there is no such kernel to set"),
    "use_cache": Key(NOT_NEEDED, "a training step has no cache"),
    "neftune_noise_alpha": Key(SAME, "tokens are an example's own, without padding"),
    "torch_empty_cache_steps": Key(NOT_NEEDED, "a compiled step's memory is planned as a whole"),
    "auto_find_batch_size": Key(
        REFUSED, "`vlm-jax plan --fit` finds what fits before a run, which then never changes"
    ),
    "logging_strategy": Key(SAME),
    "logging_steps": Key(SAME),
    "logging_first_step": Key(SAME),
    "log_on_each_node": Key(NOT_NEEDED, "the first process writes for all"),
    "logging_nan_inf_filter": Key(REFUSED, "a loss that is not finite stops the run"),
    "include_num_input_tokens_seen": Key(NOT_NEEDED, "metrics.jsonl counts answer tokens"),
    "log_level": Key(NOT_NEEDED, "a run prints what it does, and nothing else"),
    "log_level_replica": Key(NOT_NEEDED, "the first process prints for all"),
    "disable_tqdm": Key(NOT_NEEDED, "there is a bar on a terminal only"),
    "report_to": Key(SAME, "tensorboard, wandb, trackio or none; metrics.jsonl is always written"),
    "run_name": Key(SAME),
    "project": Key(SAME, "of wandb too"),
    "trackio_space_id": Key(REFUSED, _TRACKIO),
    "trackio_bucket_id": Key(REFUSED, _TRACKIO),
    "trackio_static_space_id": Key(REFUSED, _TRACKIO),
    "eval_strategy": Key(SAME, "only where there is data.eval_file; the end is always evaluated"),
    "eval_steps": Key(SAME, "logging_steps, as there, where eval_strategy is given and it is not"),
    "eval_delay": Key(SAME),
    "per_device_eval_batch_size": Key(SAME),
    "prediction_loss_only": Key(RENAMED, "evaluation.accuracy, false where this is true"),
    "eval_on_start": Key(SAME),
    "eval_do_concat_batches": Key(NOT_NEEDED, _GATHERED),
    "eval_use_gather_object": Key(NOT_NEEDED, _GATHERED),
    "eval_accumulation_steps": Key(NOT_NEEDED, _GATHERED),
    "include_for_metrics": Key(NOT_NEEDED, _GATHERED),
    "batch_eval_metrics": Key(NOT_NEEDED, _GATHERED),
    "save_only_model": Key(REFUSED, "a checkpoint without the optimizer could not be resumed"),
    "save_strategy": Key(SAME, "not best: the best one stays with load_best_model_at_end"),
    "save_steps": Key(SAME),
    "save_on_each_node": Key(
        RENAMED, "training.checkpoint_dir, where hosts share no disk: all write one checkpoint"
    ),
    "save_total_limit": Key(SAME, "0, too, keeps all"),
    "enable_jit_checkpoint": Key(NOT_NEEDED, "SIGTERM and Ctrl-C always save one"),
    "push_to_hub": Key(REFUSED, _HUB),
    "hub_token": Key(REFUSED, _HUB),
    "hub_private_repo": Key(REFUSED, _HUB),
    "hub_model_id": Key(REFUSED, _HUB),
    "hub_strategy": Key(REFUSED, _HUB),
    "hub_always_push": Key(REFUSED, _HUB),
    "hub_revision": Key(REFUSED, _HUB),
    "load_best_model_at_end": Key(SAME),
    "metric_for_best_model": Key(SAME, "loss or accuracy, with or without eval_"),
    "greater_is_better": Key(SAME),
    "ignore_data_skip": Key(
        REFUSED, "a resumed run continues at its data position, without reading again"
    ),
    "restore_callback_states_from_checkpoint": Key(
        NOT_NEEDED, "a checkpoint holds what early stopping counts"
    ),
    "full_determinism": Key(
        NOT_NEEDED,
        "a step is a function of state and batch; on GPUs set XLA_FLAGS="
        "--xla_gpu_deterministic_ops=true",
    ),
    "seed": Key(SAME),
    "data_seed": Key(SAME),
    "use_cpu": Key(REFUSED, "set JAX_PLATFORMS=cpu in the environment"),
    "accelerator_config": Key(REFUSED, "there is no accelerate; devices are the mesh section's"),
    "parallelism_config": Key(RENAMED, "mesh.data, mesh.fsdp, mesh.tensor, mesh.context"),
    "dataloader_drop_last": Key(SAME, "what fills no micro-batch is left out"),
    "dataloader_num_workers": Key(SAME),
    "dataloader_pin_memory": Key(NOT_NEEDED, "JAX copies from where batches lie"),
    "dataloader_persistent_workers": Key(NOT_NEEDED, _WORKERS),
    "dataloader_prefetch_factor": Key(NOT_NEEDED, "two batches a worker are kept ready"),
    "dataloader_multiprocessing_context": Key(NOT_NEEDED, "workers are spawned"),
    "dataloader_in_order": Key(NOT_NEEDED, _WORKERS),
    "remove_unused_columns": Key(NOT_NEEDED, "only the columns of data.columns are read"),
    "label_names": Key(NOT_NEEDED, "labels follow from the turns of a record, see data.train_on"),
    "train_sampling_strategy": Key(
        SAME, "not batch_rebalance; by default like-sized rows make a step, in random order"
    ),
    "length_column_name": Key(NOT_NEEDED, "lengths are measured, with images"),
    "ddp_find_unused_parameters": Key(NOT_NEEDED, _DDP),
    "ddp_bucket_cap_mb": Key(NOT_NEEDED, _DDP),
    "ddp_broadcast_buffers": Key(NOT_NEEDED, _DDP),
    "ddp_static_graph": Key(NOT_NEEDED, _DDP),
    "ddp_backend": Key(NOT_NEEDED, _DDP),
    "ddp_timeout": Key(NOT_NEEDED, "processes wait for each other, and end together"),
    "fsdp": Key(RENAMED, "mesh.fsdp, a number of devices"),
    "fsdp_config": Key(RENAMED, "mesh.fsdp, a number of devices"),
    "deepspeed": Key(RENAMED, "mesh.fsdp; with paged_adamw in training.optim for offloading"),
    "debug": Key(REFUSED, "JAX_DEBUG_NANS=true in the environment finds what is not finite"),
    "skip_memory_metrics": Key(NOT_NEEDED, "`vlm-jax plan` tells a step's memory before a run"),
    "do_train": Key(NOT_NEEDED, "`vlm-jax train` does"),
    "do_eval": Key(NOT_NEEDED, "data.eval_file or data.eval_share does, and `vlm-jax evaluate`"),
    "do_predict": Key(NOT_NEEDED, "`vlm-jax generate` does"),
    "resume_from_checkpoint": Key(REFUSED, "`vlm-jax train --resume` takes the newest"),
    "local_rank": Key(NOT_NEEDED, "a process finds its number in the cluster's environment"),
}

_ON_DATA = "this start needs activations or gradients on data"
_OTHER_LORA = "this LoRA variant is not implemented"

LORA_CONFIG = {
    "task_type": Key(SAME, "CAUSAL_LM alone"),
    "peft_type": Key(NOT_NEEDED, "LORA is written; an adapter of another type is refused"),
    "auto_mapping": Key(NOT_NEEDED, "written as null"),
    "peft_version": Key(NOT_NEEDED, "in an adapter it is read and passed over"),
    "base_model_name_or_path": Key(RENAMED, "model.name_or_path"),
    "revision": Key(RENAMED, "model.revision"),
    "inference_mode": Key(NOT_NEEDED, "what trains is the training table's business"),
    "r": Key(SAME, "LoRA.rank in Python"),
    "target_modules": Key(
        SAME,
        "also presets (llama, qwen, ...); suffixes stay out of the vision tower; embed_tokens and "
        "lm_head where named",
    ),
    "exclude_modules": Key(SAME, "suffixes, or one regex"),
    "lora_alpha": Key(RENAMED, "lora.alpha, default 32; this name is taken too"),
    "lora_dropout": Key(RENAMED, "lora.dropout, default 0.05; this name is taken too"),
    "fan_in_fan_out": Key(REFUSED, "no supported model stores kernels so"),
    "bias": Key(
        SAME,
        "a component whose learning-rate scale is 0.0 (the tower, by default) stays frozen, "
        "biases and all",
    ),
    "use_rslora": Key(SAME, "LoRA.rslora in Python"),
    "modules_to_save": Key(SAME, "the projector is added by itself where it trains"),
    "init_lora_weights": Key(
        SAME,
        "true, gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq; others are refused by "
        "name; LoRA.init in Python",
    ),
    "layers_to_transform": Key(SAME),
    "layers_pattern": Key(SAME),
    "rank_pattern": Key(SAME),
    "alpha_pattern": Key(SAME),
    "megatron_config": Key(REFUSED, "the mesh section divides layers"),
    "megatron_core": Key(NOT_NEEDED, "it means nothing without megatron_config"),
    "trainable_token_indices": Key(
        REFUSED, "new tokens have rows of their own, vlm_jax.add_tokens"
    ),
    "loftq_config": Key(
        NOT_NEEDED,
        "model.quantize says the 4 bits; LoftQ takes one step, loftq_iter's default, and no more",
    ),
    "eva_config": Key(REFUSED, _ON_DATA),
    "corda_config": Key(REFUSED, _ON_DATA),
    "lora_ga_config": Key(REFUSED, _ON_DATA),
    "use_dora": Key(SAME, "linear layers; on the embedding it is refused; LoRA.dora in Python"),
    "velora_config": Key(REFUSED, _OTHER_LORA),
    "alora_invocation_tokens": Key(REFUSED, _OTHER_LORA),
    "use_qalora": Key(REFUSED, _OTHER_LORA),
    "qalora_group_size": Key(NOT_NEEDED, "it means nothing without use_qalora"),
    "monteclora_config": Key(REFUSED, _OTHER_LORA),
    "layer_replication": Key(REFUSED, "layers are stacked as the checkpoint has them"),
    "runtime_config": Key(NOT_NEEDED, "it is where PyTorch computes DoRA's norms"),
    "lora_bias": Key(REFUSED, "it is a bias of B, not of the layer"),
    "target_parameters": Key(REFUSED, "it is for mixtures of experts"),
    "use_bdlora": Key(REFUSED, _OTHER_LORA),
    "arrow_config": Key(REFUSED, "it routes among adapters"),
    "kasa_config": Key(REFUSED, _OTHER_LORA),
    "ensure_weight_tying": Key(
        NOT_NEEDED,
        "written where a tied embedding is saved in full, where PEFT needs it; LoRA on an "
        "embedding leaves a tied head alone, PEFT's default, and an adapter that ties them is "
        "refused",
    ),
}

_INT8 = "weights are stored in 4 bits or as they are, never in 8"

BITS_AND_BYTES_CONFIG = {
    "load_in_8bit": Key(REFUSED, _INT8),
    "load_in_4bit": Key(SAME),
    "llm_int8_threshold": Key(REFUSED, _INT8),
    "llm_int8_skip_modules": Key(SAME, "names or regexes; None is ()"),
    "llm_int8_enable_fp32_cpu_offload": Key(REFUSED, "every weight lies on a device"),
    "llm_int8_has_fp16_weight": Key(REFUSED, _INT8),
    "bnb_4bit_compute_dtype": Key(SAME, "float32 or bfloat16; by default as model.dtype says"),
    "bnb_4bit_quant_type": Key(SAME),
    "bnb_4bit_use_double_quant": Key(SAME),
    "bnb_4bit_quant_storage": Key(
        NOT_NEEDED, "devices share codes as they are; no float type has to stand for them"
    ),
}

# Sections of a config, the class or program whose keys people write there, and its table.
TABLES = [
    (("training",), "TrainingArguments", TRAINING_ARGUMENTS),
    (("training", "data"), "SFTConfig", SFT_CONFIG),
    (("lora",), "LoraConfig", LORA_CONFIG),
    (
        ("model", "quantization", "quantization_config", "bnb"),
        "BitsAndBytesConfig",
        BITS_AND_BYTES_CONFIG,
    ),
    (("model", "data", "lora", "training"), "LLaMA-Factory", LLAMA_FACTORY),
]


def foreign_key(section: str | None, key: str) -> str | None:
    """Return a sentence about a foreign key that is not a key here; None: it is unknown there too.

    section: the one it stands in; None: none, so that the first table with the key decides.
    """
    called = {RENAMED: "another key here", NOT_NEEDED: "not needed", REFUSED: "not supported"}
    for sections, owner, table in TABLES:
        if section in (None, *sections) and key in table and table[key].kind != SAME:
            kind, words = table[key]
            return f"'{key}' of {owner} is {called[kind]}: {words}."
    return None
