"""Keys that TRL's SFTConfig adds to TrainingArguments, and their equivalents here."""

from vlm_jax.config.from_pytorch.message import NOT_NEEDED, REFUSED, RENAMED, Key

SFT_CONFIG = {
    "model_init_kwargs": Key(RENAMED, "model.dtype, model.revision and model.quantize"),
    "trust_remote_code": Key(NOT_NEEDED, "no code of a checkpoint or data set is run"),
    "router_aux_loss_coef": Key(REFUSED, "it is for mixtures of experts"),
    "chat_template_path": Key(
        REFUSED, "a checkpoint's chat_template.jinja is read; put another one there"
    ),
    "dataset_text_field": Key(RENAMED, "data.columns, {question: ..., answer: ...}"),
    "dataset_kwargs": Key(NOT_NEEDED, "records are encoded as batches are made"),
    "dataset_num_proc": Key(RENAMED, "training.dataloader_num_workers"),
    "eos_token": Key(NOT_NEEDED, "an answer ends as the chat template ends it"),
    "max_length": Key(RENAMED, "data.max_seq_length; what is longer is never cut: data.overlong"),
    "truncation_mode": Key(RENAMED, "data.overlong; nothing is cut"),
    "shuffle_dataset": Key(RENAMED, "data.shuffle, a new order each epoch"),
    "packing": Key(RENAMED, "data.packing"),
    "packing_strategy": Key(NOT_NEEDED, "examples are packed whole, each sees itself alone"),
    "padding_free": Key(RENAMED, "data.packing"),
    "pad_to_multiple_of": Key(RENAMED, "data.max_shapes, to how many shapes rows are padded"),
    "eval_packing": Key(NOT_NEEDED, "an evaluation's rows are not packed"),
    "completion_only_loss": Key(NOT_NEEDED, "always so; data.train_on says of which answers"),
    "assistant_only_loss": Key(NOT_NEEDED, "always so; data.train_on says of which answers"),
    "loss_type": Key(REFUSED, "the loss is nll, the mean over answer tokens"),
    "activation_offloading": Key(RENAMED, "training.remat_policy, offload"),
    "pad_token": Key(NOT_NEEDED, "padding is masked, so its token means nothing"),
}
