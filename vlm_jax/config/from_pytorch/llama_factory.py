"""Keys of LLaMA-Factory's files beside those of TrainingArguments, and their equivalents here.

Those of supervised fine-tuning one by one; those of its other stages, optimizers and engines by
their group.
"""

from vlm_jax.config.from_pytorch.message import NOT_NEEDED, REFUSED, RENAMED, Said

_TEMPLATE = "the checkpoint's own chat template is used, chat_template.jinja"
_TOKENS = "new tokens are those that the base's tokenizer has beyond its embedding"
_DATASET = "data.{}, a path, or a list of paths and of {{path, weight, ...}}"

_STAGE = "this program fine-tunes on given answers alone"
_OPTIMIZER = "there is no such optimizer; training.optim lists those there are"
_ENGINE = "other programs serve what `vlm-jax export` writes"
_KERNELS = "XLA compiles every step as a whole"
_EXPORT = "`vlm-jax export` has options of its own"

_MODEL = {
    "model_name_or_path": Said(RENAMED, "model.name_or_path; this name is taken in its section"),
    "adapter_name_or_path": Said(RENAMED, "model.adapter, one directory"),
    "adapter_folder": Said(RENAMED, "model.adapter, one directory"),
    "cache_dir": Said(REFUSED, "set HF_HOME in the environment"),
    "use_fast_tokenizer": Said(NOT_NEEDED, "tokenizers are always fast ones"),
    "resize_vocab": Said(NOT_NEEDED, _TOKENS),
    "split_special_tokens": Said(NOT_NEEDED, "a placeholder in a record's text is plain text"),
    "add_tokens": Said(NOT_NEEDED, _TOKENS),
    "add_special_tokens": Said(NOT_NEEDED, _TOKENS),
    "model_revision": Said(RENAMED, "model.revision"),
    "low_cpu_mem_usage": Said(NOT_NEEDED, "weights are read one tensor at a time"),
    "rope_scaling": Said(NOT_NEEDED, "as the checkpoint's config.json says"),
    "flash_attn": Said(NOT_NEEDED, _KERNELS),
    "shift_attn": Said(REFUSED, "attention is the checkpoint's own"),
    "use_unsloth": Said(NOT_NEEDED, _KERNELS),
    "use_unsloth_gc": Said(RENAMED, "training.gradient_checkpointing"),
    "enable_liger_kernel": Said(NOT_NEEDED, _KERNELS),
    "moe_aux_loss_coef": Said(REFUSED, "it is for mixtures of experts"),
    "disable_gradient_checkpointing": Said(
        RENAMED, "training.gradient_checkpointing, false where this is true"
    ),
    "use_reentrant_gc": Said(NOT_NEEDED, "rematerialisation is JAX's own"),
    "upcast_layernorm": Said(NOT_NEEDED, "norms are always computed in float32"),
    "upcast_lmhead_output": Said(NOT_NEEDED, "logits are always float32"),
    "train_from_scratch": Said(REFUSED, "a run starts from a checkpoint's weights"),
    "hf_hub_token": Said(REFUSED, "set HF_TOKEN in the environment"),
    "print_param_status": Said(NOT_NEEDED, "a run prints what trains"),
    "trust_remote_code": Said(NOT_NEEDED, "no code of a checkpoint or data set is run"),
    "quantization_method": Said(RENAMED, "model.quantize; it is bitsandbytes' always"),
    "quantization_bit": Said(RENAMED, "model.quantize, nf4-dq for 4"),
    "quantization_type": Said(RENAMED, "model.quantize, nf4 or fp4"),
    "double_quantization": Said(RENAMED, "model.quantize, nf4-dq"),
    "quantization_device_map": Said(RENAMED, "mesh.fsdp, a number of devices"),
    "image_max_pixels": Said(RENAMED, "data.max_pixels"),
    "image_min_pixels": Said(RENAMED, "data.min_pixels"),
    "video_max_pixels": Said(RENAMED, "data.video_max_pixels"),
    "video_min_pixels": Said(RENAMED, "data.video_min_pixels"),
    "video_fps": Said(RENAMED, "data.video_fps"),
    "video_maxlen": Said(RENAMED, "data.video_max_frames"),
    **dict.fromkeys(
        ("infer_backend", "infer_dtype", "offload_folder", "use_kv_cache"),
        Said(NOT_NEEDED, _ENGINE),
    ),
}

_DATA = {
    "template": Said(NOT_NEEDED, _TEMPLATE),
    "dataset": Said(RENAMED, _DATASET.format("train_file")),
    "eval_dataset": Said(RENAMED, _DATASET.format("eval_file")),
    "dataset_dir": Said(RENAMED, "data.train_file, whose path says it"),
    "media_dir": Said(RENAMED, "data.image_folder"),
    "cutoff_len": Said(RENAMED, "data.max_seq_length; what is longer is never cut: data.overlong"),
    "train_on_prompt": Said(REFUSED, "answers alone carry loss"),
    "mask_history": Said(RENAMED, "data.train_on, last where this is true"),
    "streaming": Said(RENAMED, "data.streaming"),
    "buffer_size": Said(NOT_NEEDED, "a stream keeps its own order"),
    "mix_strategy": Said(RENAMED, "data.train_file, a list of {path, weight or epochs}"),
    "interleave_probs": Said(RENAMED, "data.train_file, a list of {path, weight}"),
    "overwrite_cache": Said(NOT_NEEDED, "sizes are kept by the content of a file"),
    "preprocessing_batch_size": Said(NOT_NEEDED, "records are encoded as batches are made"),
    "preprocessing_num_workers": Said(RENAMED, "training.dataloader_num_workers"),
    "max_samples": Said(RENAMED, "training.max_steps; data are never cut"),
    "ignore_pad_token_for_loss": Said(NOT_NEEDED, "padding never carries loss"),
    "val_size": Said(RENAMED, "data.eval_share, a share below 1"),
    "eval_on_each_dataset": Said(NOT_NEEDED, "each data set has a name under `evaluators`"),
    "packing": Said(RENAMED, "data.packing"),
    "neat_packing": Said(RENAMED, "data.packing, where each example sees itself alone"),
    "tool_format": Said(NOT_NEEDED, _TEMPLATE),
    "default_system": Said(NOT_NEEDED, "a record has its own system prompt, or the template's"),
    "enable_thinking": Said(NOT_NEEDED, _TEMPLATE),
    "preserve_thinking": Said(NOT_NEEDED, _TEMPLATE),
    "tokenized_path": Said(NOT_NEEDED, "records are encoded as batches are made"),
    "data_shared_file_system": Said(NOT_NEEDED, "each host reads what its rows need"),
}

_TRAINING = {
    "stage": Said(NOT_NEEDED, _STAGE),
    "finetuning_type": Said(RENAMED, "lora.enabled, or the one word method: lora, qlora, full"),
    "lora_rank": Said(RENAMED, "lora.r; this name is taken in its section"),
    "lora_alpha": Said(RENAMED, "lora.alpha; this name is taken in its section"),
    "lora_dropout": Said(RENAMED, "lora.dropout; this name is taken in its section"),
    "lora_target": Said(RENAMED, "lora.target_modules, all-linear for all"),
    "additional_target": Said(RENAMED, "lora.modules_to_save"),
    "loraplus_lr_ratio": Said(RENAMED, "lora.loraplus_lr_ratio"),
    "loraplus_lr_embedding": Said(REFUSED, "an embedding learns at its component's rate"),
    "use_rslora": Said(RENAMED, "lora.use_rslora"),
    "use_dora": Said(RENAMED, "lora.use_dora"),
    "pissa_init": Said(RENAMED, "lora.init_lora_weights, pissa"),
    "pissa_iter": Said(RENAMED, "lora.init_lora_weights, pissa_niter_16"),
    "pissa_convert": Said(NOT_NEEDED, "an adapter is written for the unchanged base"),
    "create_new_adapter": Said(
        REFUSED, "model.adapter is trained further; without it a new adapter is made"
    ),
    "freeze_trainable_layers": Said(RENAMED, "model.freeze_layers, the lowest that stay frozen"),
    "freeze_trainable_modules": Said(RENAMED, "lora.modules_to_save"),
    "freeze_extra_modules": Said(RENAMED, "lora.modules_to_save"),
    "freeze_vision_tower": Said(RENAMED, "model.vision_encoder_lr_scale, 0.0 where this is true"),
    "freeze_multi_modal_projector": Said(
        RENAMED, "model.projector_lr_scale, 0.0 where this is true"
    ),
    "freeze_language_model": Said(RENAMED, "model.language_model_lr_scale, 0.0 where this is true"),
    "pure_bf16": Said(RENAMED, "training.param_dtype, bfloat16"),
    "compute_accuracy": Said(RENAMED, "evaluation.accuracy, of whole answers"),
    "disable_shuffling": Said(RENAMED, "data.shuffle, false where this is true"),
    "early_stopping_steps": Said(RENAMED, "training.early_stopping_patience, in evaluations"),
    "plot_loss": Said(RENAMED, "training.report_to, tensorboard"),
    "include_effective_tokens_per_second": Said(NOT_NEEDED, "metrics.jsonl has them"),
    "overwrite_output_dir": Said(REFUSED, "a run never writes over another; delete it"),
    "use_muon": Said(RENAMED, "training.optim, muon"),
    **dict.fromkeys(
        ("use_adam_mini", "use_galore", "use_apollo", "use_badam"), Said(REFUSED, _OPTIMIZER)
    ),
    **dict.fromkeys(
        ("use_llama_pro", "oft_rank", "oft_block_size", "oft_target"),
        Said(REFUSED, "there is no such method; docs/METHODS.md lists those there are"),
    ),
    **dict.fromkeys(
        ("use_dft_loss", "use_asft_loss", "use_eaft_loss"),
        Said(REFUSED, "the loss is the mean over answer tokens"),
    ),
    **dict.fromkeys(
        ("ref_model", "reward_model", "pref_loss", "pref_beta", "ppo_epochs"),
        Said(REFUSED, _STAGE),
    ),
    **dict.fromkeys(
        ("use_swanlab", "swanlab_project"), Said(RENAMED, "training.report_to, wandb or trackio")
    ),
    **dict.fromkeys(("fp8", "fp8_backend"), Said(REFUSED, "use training.bf16")),
}

_OTHERS = {
    **dict.fromkeys(
        ("export_dir", "export_size", "export_device", "export_legacy_format"),
        Said(NOT_NEEDED, _EXPORT),
    ),
}

LLAMA_FACTORY = {**_MODEL, **_DATA, **_TRAINING, **_OTHERS}
