"""Keys of TrainingArguments, LoraConfig and BitsAndBytesConfig, and their equivalents here.

So too of TRL's SFTConfig and of LLaMA-Factory. The tables of docs/FROM_PYTORCH.md are made of
these, and so are the errors for keys that this program does not take.
"""

from vlm_jax.config.from_pytorch.llama_factory import LLAMA_FACTORY
from vlm_jax.config.from_pytorch.message import NOT_NEEDED, REFUSED, RENAMED, SAME, Said
from vlm_jax.config.from_pytorch.trl import SFT_CONFIG

_HUB = "nothing is uploaded; `hf upload` takes the run's adapter/ or model/"
_TRACKIO = "nothing is uploaded; trackio's own commands do"
_PLATFORM = "XLA compiles every step as a whole"
_GATHERED = "an evaluation keeps sums only"
_DDP = "the compiler places what devices exchange"
_WORKERS = "always so"

TRAINING_ARGUMENTS = {
    "output_dir": Said(SAME),
    "per_device_train_batch_size": Said(SAME, "of one micro-batch"),
    "num_train_epochs": Said(SAME),
    "max_steps": Said(SAME),
    "learning_rate": Said(SAME, "scaled for each component by model.*_lr_scale"),
    "lr_scheduler_type": Said(SAME, "not reduce_lr_on_plateau and greedy"),
    "lr_scheduler_kwargs": Said(SAME),
    "warmup_steps": Said(
        SAME, "a share of all steps below 1; without it version 4's warmup_ratio counts, 0.03"
    ),
    "optim": Said(SAME, "the names are listed in vlm_jax/config/choices.py"),
    "optim_args": Said(REFUSED, "options are keys of their own: adam_beta1, weight_decay, ..."),
    "weight_decay": Said(SAME, "never of norms and biases"),
    "adam_beta1": Said(SAME),
    "adam_beta2": Said(SAME),
    "adam_epsilon": Said(SAME),
    "optim_target_modules": Said(REFUSED, "it names modules for GaLore and APOLLO"),
    "gradient_accumulation_steps": Said(SAME),
    "average_tokens_across_devices": Said(
        NOT_NEEDED, "the loss is always divided by the tokens of all devices and micro-batches"
    ),
    "max_grad_norm": Said(SAME),
    "label_smoothing_factor": Said(
        SAME, "of shifted labels for every model; transformers shifts them for text models only"
    ),
    "bf16": Said(SAME),
    "fp16": Said(REFUSED, "float16 needs loss scaling; use bf16"),
    "bf16_full_eval": Said(NOT_NEEDED, "an evaluation computes in model.dtype, as a step does"),
    "fp16_full_eval": Said(REFUSED, "float16 needs loss scaling; use bf16"),
    "tf32": Said(REFUSED, "set JAX_DEFAULT_MATMUL_PRECISION in the environment"),
    "activation_checkpointing": Said(RENAMED, "training.gradient_checkpointing"),
    "activation_checkpointing_kwargs": Said(RENAMED, "training.remat_policy"),
    "gradient_checkpointing": Said(SAME),
    "gradient_checkpointing_kwargs": Said(RENAMED, "training.remat_policy"),
    "torch_compile": Said(NOT_NEEDED, _PLATFORM),
    "torch_compile_backend": Said(NOT_NEEDED, _PLATFORM),
    "torch_compile_mode": Said(NOT_NEEDED, _PLATFORM),
    "use_liger_kernel": Said(NOT_NEEDED, "the loss goes in chunks, without an array of all logits"),
    "liger_kernel_config": Said(NOT_NEEDED, "there is no such kernel to set"),
    "use_cache": Said(NOT_NEEDED, "a training step has no cache"),
    "neftune_noise_alpha": Said(SAME, "tokens are an example's own, without padding"),
    "torch_empty_cache_steps": Said(NOT_NEEDED, "a compiled step's memory is planned as a whole"),
    "auto_find_batch_size": Said(
        REFUSED, "`vlm-jax plan --fit` finds what fits before a run, which then never changes"
    ),
    "logging_strategy": Said(SAME),
    "logging_steps": Said(SAME),
    "logging_first_step": Said(SAME),
    "log_on_each_node": Said(NOT_NEEDED, "the first process writes for all"),
    "logging_nan_inf_filter": Said(REFUSED, "a loss that is not finite stops the run"),
    "include_num_input_tokens_seen": Said(NOT_NEEDED, "metrics.jsonl counts answer tokens"),
    "log_level": Said(NOT_NEEDED, "a run prints what it does, and nothing else"),
    "log_level_replica": Said(NOT_NEEDED, "the first process prints for all"),
    "disable_tqdm": Said(NOT_NEEDED, "there is a bar on a terminal only"),
    "report_to": Said(SAME, "tensorboard, wandb, trackio or none; metrics.jsonl is always written"),
    "run_name": Said(SAME),
    "project": Said(SAME, "of wandb too"),
    "trackio_space_id": Said(REFUSED, _TRACKIO),
    "trackio_bucket_id": Said(REFUSED, _TRACKIO),
    "trackio_static_space_id": Said(REFUSED, _TRACKIO),
    "eval_strategy": Said(SAME, "only where there is data.eval_file; the end is always evaluated"),
    "eval_steps": Said(SAME, "logging_steps, as there, where eval_strategy is given and it is not"),
    "eval_delay": Said(SAME),
    "per_device_eval_batch_size": Said(SAME),
    "prediction_loss_only": Said(RENAMED, "evaluation.accuracy, false where this is true"),
    "eval_on_start": Said(SAME),
    "eval_do_concat_batches": Said(NOT_NEEDED, _GATHERED),
    "eval_use_gather_object": Said(NOT_NEEDED, _GATHERED),
    "eval_accumulation_steps": Said(NOT_NEEDED, _GATHERED),
    "include_for_metrics": Said(NOT_NEEDED, _GATHERED),
    "batch_eval_metrics": Said(NOT_NEEDED, _GATHERED),
    "save_only_model": Said(REFUSED, "a checkpoint without the optimizer could not be resumed"),
    "save_strategy": Said(SAME, "not best: the best one stays with load_best_model_at_end"),
    "save_steps": Said(SAME),
    "save_on_each_node": Said(
        RENAMED, "training.checkpoint_dir, where hosts share no disk: all write one checkpoint"
    ),
    "save_total_limit": Said(SAME, "0, too, keeps all"),
    "enable_jit_checkpoint": Said(NOT_NEEDED, "SIGTERM and Ctrl-C always save one"),
    "push_to_hub": Said(REFUSED, _HUB),
    "hub_token": Said(REFUSED, _HUB),
    "hub_private_repo": Said(REFUSED, _HUB),
    "hub_model_id": Said(REFUSED, _HUB),
    "hub_strategy": Said(REFUSED, _HUB),
    "hub_always_push": Said(REFUSED, _HUB),
    "hub_revision": Said(REFUSED, _HUB),
    "load_best_model_at_end": Said(SAME),
    "metric_for_best_model": Said(SAME, "loss or accuracy, with or without eval_"),
    "greater_is_better": Said(SAME),
    "ignore_data_skip": Said(
        REFUSED, "a resumed run continues at its data position, without reading again"
    ),
    "restore_callback_states_from_checkpoint": Said(
        NOT_NEEDED, "a checkpoint holds what early stopping counts"
    ),
    "full_determinism": Said(
        NOT_NEEDED,
        "a step is a function of state and batch; on GPUs set XLA_FLAGS="
        "--xla_gpu_deterministic_ops=true",
    ),
    "seed": Said(SAME),
    "data_seed": Said(SAME),
    "use_cpu": Said(REFUSED, "set JAX_PLATFORMS=cpu in the environment"),
    "accelerator_config": Said(REFUSED, "there is no accelerate; devices are the mesh section's"),
    "parallelism_config": Said(RENAMED, "mesh.data, mesh.fsdp, mesh.tensor, mesh.context"),
    "dataloader_drop_last": Said(SAME, "what fills no micro-batch is left out"),
    "dataloader_num_workers": Said(SAME),
    "dataloader_pin_memory": Said(NOT_NEEDED, "JAX copies from where batches lie"),
    "dataloader_persistent_workers": Said(NOT_NEEDED, _WORKERS),
    "dataloader_prefetch_factor": Said(NOT_NEEDED, "two batches a worker are kept ready"),
    "dataloader_multiprocessing_context": Said(NOT_NEEDED, "workers are spawned"),
    "dataloader_in_order": Said(NOT_NEEDED, _WORKERS),
    "remove_unused_columns": Said(NOT_NEEDED, "only the columns of data.columns are read"),
    "label_names": Said(NOT_NEEDED, "labels follow from the turns of a record, see data.train_on"),
    "train_sampling_strategy": Said(
        SAME, "not batch_rebalance; by default like-sized rows make a step, in random order"
    ),
    "length_column_name": Said(NOT_NEEDED, "lengths are measured, with images"),
    "ddp_find_unused_parameters": Said(NOT_NEEDED, _DDP),
    "ddp_bucket_cap_mb": Said(NOT_NEEDED, _DDP),
    "ddp_broadcast_buffers": Said(NOT_NEEDED, _DDP),
    "ddp_static_graph": Said(NOT_NEEDED, _DDP),
    "ddp_backend": Said(NOT_NEEDED, _DDP),
    "ddp_timeout": Said(NOT_NEEDED, "processes wait for each other, and end together"),
    "fsdp": Said(RENAMED, "mesh.fsdp, a number of devices"),
    "fsdp_config": Said(RENAMED, "mesh.fsdp, a number of devices"),
    "deepspeed": Said(RENAMED, "mesh.fsdp; with paged_adamw in training.optim for offloading"),
    "debug": Said(REFUSED, "JAX_DEBUG_NANS=true in the environment finds what is not finite"),
    "skip_memory_metrics": Said(NOT_NEEDED, "`vlm-jax plan` tells a step's memory before a run"),
    "do_train": Said(NOT_NEEDED, "`vlm-jax train` does"),
    "do_eval": Said(NOT_NEEDED, "data.eval_file or data.eval_share does, and `vlm-jax evaluate`"),
    "do_predict": Said(NOT_NEEDED, "`vlm-jax generate` does"),
    "resume_from_checkpoint": Said(REFUSED, "`vlm-jax train --resume` takes the newest"),
    "local_rank": Said(NOT_NEEDED, "a process finds its number in the cluster's environment"),
}

_ON_DATA = "this start needs activations or gradients on data"
_OTHER_LORA = "this LoRA variant is not implemented"

LORA_CONFIG = {
    "task_type": Said(SAME, "CAUSAL_LM alone"),
    "peft_type": Said(NOT_NEEDED, "LORA is written; an adapter of another type is refused"),
    "auto_mapping": Said(NOT_NEEDED, "written as null"),
    "peft_version": Said(NOT_NEEDED, "in an adapter it is read and passed over"),
    "base_model_name_or_path": Said(RENAMED, "model.name_or_path"),
    "revision": Said(RENAMED, "model.revision"),
    "inference_mode": Said(NOT_NEEDED, "what trains is the training table's business"),
    "r": Said(SAME, "LoRA.rank in Python"),
    "target_modules": Said(
        SAME,
        "also presets (llama, qwen, ...); suffixes stay out of the vision tower; embed_tokens and "
        "lm_head where named",
    ),
    "exclude_modules": Said(SAME, "suffixes, or one regex"),
    "lora_alpha": Said(RENAMED, "lora.alpha, default 32; this name is taken too"),
    "lora_dropout": Said(RENAMED, "lora.dropout, default 0.05; this name is taken too"),
    "fan_in_fan_out": Said(REFUSED, "no supported model stores kernels so"),
    "bias": Said(
        SAME,
        "a component whose learning-rate scale is 0.0 (the tower, by default) stays frozen, "
        "biases and all",
    ),
    "use_rslora": Said(SAME, "LoRA.rslora in Python"),
    "modules_to_save": Said(SAME, "the projector is added by itself where it trains"),
    "init_lora_weights": Said(
        SAME,
        "true, gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq; others are refused by "
        "name; LoRA.init in Python",
    ),
    "layers_to_transform": Said(SAME),
    "layers_pattern": Said(SAME),
    "rank_pattern": Said(SAME),
    "alpha_pattern": Said(SAME),
    "megatron_config": Said(REFUSED, "the mesh section divides layers"),
    "megatron_core": Said(NOT_NEEDED, "it means nothing without megatron_config"),
    "trainable_token_indices": Said(
        REFUSED, "new tokens have rows of their own, vlm_jax.add_tokens"
    ),
    "loftq_config": Said(
        NOT_NEEDED,
        "model.quantize says the 4 bits; LoftQ takes one step, loftq_iter's default, and no more",
    ),
    "eva_config": Said(REFUSED, _ON_DATA),
    "corda_config": Said(REFUSED, _ON_DATA),
    "lora_ga_config": Said(REFUSED, _ON_DATA),
    "use_dora": Said(SAME, "linear layers; on the embedding it is refused; LoRA.dora in Python"),
    "velora_config": Said(REFUSED, _OTHER_LORA),
    "alora_invocation_tokens": Said(REFUSED, _OTHER_LORA),
    "use_qalora": Said(REFUSED, _OTHER_LORA),
    "qalora_group_size": Said(NOT_NEEDED, "it means nothing without use_qalora"),
    "monteclora_config": Said(REFUSED, _OTHER_LORA),
    "layer_replication": Said(REFUSED, "layers are stacked as the checkpoint has them"),
    "runtime_config": Said(NOT_NEEDED, "it is where PyTorch computes DoRA's norms"),
    "lora_bias": Said(REFUSED, "it is a bias of B, not of the layer"),
    "target_parameters": Said(REFUSED, "it is for mixtures of experts"),
    "use_bdlora": Said(REFUSED, _OTHER_LORA),
    "arrow_config": Said(REFUSED, "it routes among adapters"),
    "kasa_config": Said(REFUSED, _OTHER_LORA),
    "ensure_weight_tying": Said(
        NOT_NEEDED,
        "written where a tied embedding is saved in full, where PEFT needs it; LoRA on an "
        "embedding leaves a tied head alone, PEFT's default, and an adapter that ties them is "
        "refused",
    ),
}

_INT8 = "weights are stored in 4 bits or as they are, never in 8"

BITS_AND_BYTES_CONFIG = {
    "load_in_8bit": Said(REFUSED, _INT8),
    "load_in_4bit": Said(SAME),
    "llm_int8_threshold": Said(REFUSED, _INT8),
    "llm_int8_skip_modules": Said(SAME, "names or regexes; None is ()"),
    "llm_int8_enable_fp32_cpu_offload": Said(REFUSED, "every weight lies on a device"),
    "llm_int8_has_fp16_weight": Said(REFUSED, _INT8),
    "bnb_4bit_compute_dtype": Said(SAME, "float32 or bfloat16; by default as model.dtype says"),
    "bnb_4bit_quant_type": Said(SAME),
    "bnb_4bit_use_double_quant": Said(SAME),
    "bnb_4bit_quant_storage": Said(
        NOT_NEEDED, "devices share codes as they are; no float type has to stand for them"
    ),
}

_QUANTIZED = ("model", "quantization", "quantization_config", "bnb")
# Sections of a config, the class or program whose keys people write there, and its table.
TABLES = [
    (("training",), "TrainingArguments", TRAINING_ARGUMENTS),
    (("training", "data"), "SFTConfig", SFT_CONFIG),
    (("lora",), "LoraConfig", LORA_CONFIG),
    (_QUANTIZED, "BitsAndBytesConfig", BITS_AND_BYTES_CONFIG),
    (("model", "data", "lora", "training"), "LLaMA-Factory", LLAMA_FACTORY),
]


def told(section: str | None, key: str) -> str | None:
    """Return what to say of a foreign key that is not a key here; None: it is unknown there too.

    section: the one it stands in; None: none, so that the first of the tables has the word.
    """
    for sections, owner, table in TABLES:
        if section in (None, *sections) and key in table and table[key].kind != SAME:
            kind, words = table[key]
            called = f"'{key}' of {owner} is"
            if kind == RENAMED:
                return f"{called} another key here: {words}."
            return f"{called} {'not needed' if kind == NOT_NEEDED else 'not supported'}: {words}."
    return None
