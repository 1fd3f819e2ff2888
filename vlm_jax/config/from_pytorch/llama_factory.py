"""Keys of LLaMA-Factory's files beside those of TrainingArguments, and their equivalents here.

Those of supervised fine-tuning one by one; those of its other stages, optimizers and engines by
their group.
"""

from vlm_jax.config.from_pytorch.message import NOT_NEEDED, REFUSED, RENAMED, Key

_TEMPLATE = "the checkpoint's own chat template is used, chat_template.jinja"
_TOKENS = "new tokens are those that the base's tokenizer has beyond its embedding"
_DATASET = "data.{}, a path, or a list of paths and of {{path, weight, ...}}"

_STAGE = "this program fine-tunes on given answers alone"
_KERNELS = "XLA compiles every step as a whole"

LLAMA_FACTORY = {
    # of the model
    "model_name_or_path": Key(RENAMED, "model.name_or_path; this name is taken in its section"),
    "adapter_name_or_path": Key(RENAMED, "model.adapter, one directory"),
    "adapter_folder": Key(RENAMED, "model.adapter, one directory"),
    "cache_dir": Key(REFUSED, "set HF_HOME in the environment"),
    "use_fast_tokenizer": Key(NOT_NEEDED, "tokenizers are always fast ones"),
    "resize_vocab": Key(NOT_NEEDED, _TOKENS),
    "split_special_tokens": Key(NOT_NEEDED, "a placeholder in a record's text is plain text"),
    "add_tokens": Key(NOT_NEEDED, _TOKENS),
    "add_special_tokens": Key(NOT_NEEDED, _TOKENS),
    "model_revision": Key(RENAMED, "model.revision"),
    "low_cpu_mem_usage": Key(NOT_NEEDED, "weights are read one tensor at a time"),
    "rope_scaling": Key(NOT_NEEDED, "as the checkpoint's config.json says"),
    "flash_attn": Key(NOT_NEEDED, "the kernel follows from the device; model.attention forces one"),
    "shift_attn": Key(REFUSED, "attention is the checkpoint's own"),
    "use_unsloth": Key(NOT_NEEDED, _KERNELS),
    "use_unsloth_gc": Key(RENAMED, "training.gradient_checkpointing"),
    "enable_liger_kernel": Key(NOT_NEEDED, _KERNELS),
    "moe_aux_loss_coef": Key(REFUSED, "it is for mixtures of experts"),
    "disable_gradient_checkpointing": Key(
        RENAMED, "training.gradient_checkpointing, false where this is true"
    ),
    "use_reentrant_gc": Key(NOT_NEEDED, "rematerialisation is JAX's own"),
    "upcast_layernorm": Key(NOT_NEEDED, "norms are always computed in float32"),
    "upcast_lmhead_output": Key(NOT_NEEDED, "logits are always float32"),
    "train_from_scratch": Key(REFUSED, "a run starts from a checkpoint's weights"),
    "hf_hub_token": Key(REFUSED, "set HF_TOKEN in the environment"),
    "print_param_status": Key(NOT_NEEDED, "a run prints what trains"),
    "trust_remote_code": Key(NOT_NEEDED, "no code of a checkpoint or data set is run"),
    "quantization_method": Key(RENAMED, "model.quantize; it is bitsandbytes' always"),
    "quantization_bit": Key(RENAMED, "model.quantize, nf4-dq for 4"),
    "quantization_type": Key(RENAMED, "model.quantize, nf4 or fp4"),
    "double_quantization": Key(RENAMED, "model.quantize, nf4-dq"),
    "quantization_device_map": Key(RENAMED, "mesh.fsdp, a number of devices"),
    "image_max_pixels": Key(RENAMED, "data.max_pixels"),
    "image_min_pixels": Key(RENAMED, "data.min_pixels"),
    "video_max_pixels": Key(RENAMED, "data.video_max_pixels"),
    "video_min_pixels": Key(RENAMED, "data.video_min_pixels"),
    "video_fps": Key(RENAMED, "data.video_fps"),
    "video_maxlen": Key(RENAMED, "data.video_max_frames"),
    **dict.fromkeys(
        ("infer_backend", "infer_dtype", "offload_folder", "use_kv_cache"),
        Key(NOT_NEEDED, "other programs serve what `vlm-jax export` writes"),
    ),
    # of data
    "template": Key(NOT_NEEDED, _TEMPLATE),
    "dataset": Key(RENAMED, _DATASET.format("train_file")),
    "eval_dataset": Key(RENAMED, _DATASET.format("eval_file")),
    "dataset_dir": Key(RENAMED, "data.train_file, whose path says it"),
    "media_dir": Key(RENAMED, "data.image_folder"),
    "cutoff_len": Key(RENAMED, "data.max_seq_length; what is longer is never cut: data.overlong"),
    "train_on_prompt": Key(REFUSED, "answers alone carry loss"),
    "mask_history": Key(RENAMED, "data.train_on, last where this is true"),
    "streaming": Key(RENAMED, "data.streaming"),
    "buffer_size": Key(NOT_NEEDED, "a stream keeps its own order"),
    "mix_strategy": Key(RENAMED, "data.train_file, a list of {path, weight or epochs}"),
    "interleave_probs": Key(RENAMED, "data.train_file, a list of {path, weight}"),
    "overwrite_cache": Key(NOT_NEEDED, "sizes are kept by the content of a file"),
    "preprocessing_batch_size": Key(NOT_NEEDED, "records are encoded as batches are made"),
    "preprocessing_num_workers": Key(RENAMED, "training.dataloader_num_workers"),
    "max_samples": Key(RENAMED, "training.max_steps; data are never cut"),
    "ignore_pad_token_for_loss": Key(NOT_NEEDED, "padding never carries loss"),
    "val_size": Key(RENAMED, "data.eval_share, a share below 1"),
    "eval_on_each_dataset": Key(NOT_NEEDED, "each data set has a name under `evaluators`"),
    "packing": Key(RENAMED, "data.packing"),
    "neat_packing": Key(RENAMED, "data.packing, where each example sees itself alone"),
    "tool_format": Key(NOT_NEEDED, _TEMPLATE),
    "default_system": Key(NOT_NEEDED, "a record has its own system prompt, or the template's"),
    "enable_thinking": Key(NOT_NEEDED, _TEMPLATE),
    "preserve_thinking": Key(NOT_NEEDED, _TEMPLATE),
    "tokenized_path": Key(NOT_NEEDED, "records are encoded as batches are made"),
    "data_shared_file_system": Key(NOT_NEEDED, "each host reads what its rows need"),
    # of training
    "stage": Key(NOT_NEEDED, _STAGE),
    "finetuning_type": Key(RENAMED, "lora.enabled, or the one word method: lora, qlora, full"),
    "lora_rank": Key(RENAMED, "lora.r; this name is taken in its section"),
    "lora_alpha": Key(RENAMED, "lora.alpha; this name is taken in its section"),
    "lora_dropout": Key(RENAMED, "lora.dropout; this name is taken in its section"),
    "lora_target": Key(RENAMED, "lora.target_modules, all-linear for all"),
    "additional_target": Key(RENAMED, "lora.modules_to_save"),
    "loraplus_lr_ratio": Key(RENAMED, "lora.loraplus_lr_ratio"),
    "loraplus_lr_embedding": Key(REFUSED, "an embedding learns at its component's rate"),
    "use_rslora": Key(RENAMED, "lora.use_rslora"),
    "use_dora": Key(RENAMED, "lora.use_dora"),
    "pissa_init": Key(RENAMED, "lora.init_lora_weights, pissa"),
    "pissa_iter": Key(RENAMED, "lora.init_lora_weights, pissa_niter_16"),
    "pissa_convert": Key(NOT_NEEDED, "an adapter is written for the unchanged base"),
    "create_new_adapter": Key(
        REFUSED, "model.adapter is trained further; without it a new adapter is made"
    ),
    "freeze_trainable_layers": Key(RENAMED, "model.freeze_layers, the lowest that stay frozen"),
    "freeze_trainable_modules": Key(RENAMED, "lora.modules_to_save"),
    "freeze_extra_modules": Key(RENAMED, "lora.modules_to_save"),
    "freeze_vision_tower": Key(RENAMED, "model.vision_encoder_lr_scale, 0.0 where this is true"),
    "freeze_multi_modal_projector": Key(
        RENAMED, "model.projector_lr_scale, 0.0 where this is true"
    ),
    "freeze_language_model": Key(RENAMED, "model.language_model_lr_scale, 0.0 where this is true"),
    "pure_bf16": Key(RENAMED, "training.param_dtype, bfloat16"),
    "compute_accuracy": Key(RENAMED, "evaluation.accuracy, of whole answers"),
    "disable_shuffling": Key(RENAMED, "data.shuffle, false where this is true"),
    "early_stopping_steps": Key(RENAMED, "training.early_stopping_patience, in evaluations"),
    "plot_loss": Key(RENAMED, "training.report_to, tensorboard"),
    "include_effective_tokens_per_second": Key(NOT_NEEDED, "metrics.jsonl has them"),
    "overwrite_output_dir": Key(REFUSED, "a run never writes over another; delete it"),
    "use_muon": Key(RENAMED, "training.optim, muon"),
    **dict.fromkeys(
        ("use_adam_mini", "use_galore", "use_apollo", "use_badam"),
        Key(REFUSED, "there is no such optimizer; training.optim lists those there are"),
    ),
    **dict.fromkeys(
        ("use_llama_pro", "oft_rank", "oft_block_size", "oft_target"),
        Key(REFUSED, "there is no such method; docs/METHODS.md lists those there are"),
    ),
    **dict.fromkeys(
        ("use_dft_loss", "use_asft_loss", "use_eaft_loss"),
        Key(REFUSED, "the loss is the mean over answer tokens"),
    ),
    **dict.fromkeys(
        ("ref_model", "reward_model", "pref_loss", "pref_beta", "ppo_epochs"),
        Key(REFUSED, _STAGE),
    ),
    **dict.fromkeys(
        ("use_swanlab", "swanlab_project"), Key(RENAMED, "training.report_to, wandb or trackio")
    ),
    **dict.fromkeys(("fp8", "fp8_backend"), Key(REFUSED, "use training.bf16")),
    # of an export
    **dict.fromkeys(
        ("export_dir", "export_size", "export_device", "export_legacy_format"),
        Key(NOT_NEEDED, "`vlm-jax export` has options of its own"),
    ),
}
