"""Reads a Hugging Face `config.json`: every field is handled, known to be irrelevant, or raised."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vlm_jax.errors import UserError, nearest
from vlm_jax.files.limits import number

REQUIRED = object()
NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}

# What `layers.activations` computes, by Hugging Face's names.
ACTIVATION_NAMES = tuple("gelu gelu_new gelu_pytorch_tanh quick_gelu relu silu swish tanh".split())

# Fields that describe a file, an initialisation or text generation, and change no computation here.
IRRELEVANT = frozenset(
    """_name_or_path architectures dtype torch_dtype transformers_version model_type use_cache
    initializer_range initializer_factor pretraining_tp max_position_embeddings bos_token_id
    eos_token_id pad_token_id sep_token_id attn_implementation _attn_implementation
    _attn_implementation_autoset use_bfloat16 torchscript is_decoder is_encoder_decoder
    add_cross_attention cross_attention_hidden_size tie_encoder_decoder decoder_start_token_id
    bad_words_ids begin_suppress_tokens suppress_tokens chunk_size_feed_forward diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label label2id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p typical_p
    auto_map cache_implementation unsloth_fixed unsloth_version ignore_index quantization_config
    projection_dim""".split()
)


def entry(table: Mapping[str, Any], name: Any, where: str) -> Any:
    """Return what a table holds for a model_type; raise `UserError` for one that it lacks."""
    if not isinstance(name, str) or name not in table:
        raise UserError(
            f"The {where} has the model_type {name!r}, which is not supported"
            f"{nearest(str(name), table)}; supported: {', '.join(table)}."
        )
    return table[name]


class Fields:
    """The fields of one (sub-)config; `take` reads one, `finish` raises for whatever is left.

    where: how errors name this config, such as "config.json, text_config". defaults: of fields that
    it may leave out, as the reference's class defines them.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        where: str,
        irrelevant: str = "",
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ):
        if not isinstance(fields, Mapping):
            raise UserError(
                f"The {where} is not a JSON object: {fields!r:.80}. Use the config.json that "
                f"belongs to the checkpoint."
            )
        self.fields = dict(fields)
        self.where, self.defaults = where, defaults
        self.known = set(IRRELEVANT) | set(irrelevant.split())

    def take(
        self, name: str, default: Any = REQUIRED, kind: type | None = None, null: bool = False
    ) -> Any:
        """Return and consume a field; its default stands in where it is missing.

        kind: what it must be, by default the type of `default`: bool, int, float (which an int is
        too) or dict. With `null` or a default of None, and for bool, null is allowed. Else
        `UserError`.
        """
        self.known.add(name)
        default = self.defaults.get(name, default)
        if default is REQUIRED and name not in self.fields:
            raise UserError(
                f"The {self.where} lacks the field '{name}', which fixes the size of the model. "
                f"Use the config.json that belongs to the checkpoint."
            )
        value, kind = self.fields.pop(name, default), type(default) if kind is None else kind
        allowed: Any = {float: (int, float), dict: Mapping}.get(kind, kind)
        fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
        if fits and kind in (int, float):
            number(name, value, self.where)
        null |= default is None or kind is bool
        if kind in NAMES and not fits and not (null and value is None):
            raise UserError(
                f"The {self.where} has {name} = {value!r:.80}; expected {NAMES[kind]}. Use the "
                f"config.json that belongs to the checkpoint."
            )
        return value

    def size(self, name: str, default: Any = REQUIRED, null: bool = False) -> Any:
        """Return a field that counts something: a whole number of at least 1.

        With `null` or a default of None null is allowed.
        """
        value = self.take(name, default, int, null)
        if value is not None and value < 1:
            raise UserError(f"The {self.where} has {name} = {value!r}; expected at least 1.")
        return value

    def positive(self, name: str, default: Any = REQUIRED) -> float:
        """Return a field that is a number above 0."""
        value = self.take(name, default, float)
        number(name, value, self.where, above=0)
        return value

    def drop_copies(self, nested: Mapping[str, Any]) -> dict[str, Any]:
        """Forget fields that a nested config repeats; return those whose values differ there."""
        copies = {name: self.fields.pop(name) for name in list(self.fields) if name in nested}
        return {
            name: value
            for name, value in copies.items()
            if name not in self.known and value != nested[name]
        }

    def require(self, name: str, allowed: tuple, default: Any = REQUIRED) -> Any:
        """Return a field whose value must be one of `allowed`; else raise, naming it."""
        value = self.take(name, default)
        if value not in allowed:
            raise UserError(
                f"The {self.where} sets {name}={value!r}, which is not supported; supported: "
                f"{', '.join(repr(a) for a in allowed)}. The computation would differ from the "
                f"reference, so the checkpoint is refused."
            )
        return value

    def finish(self, made: Any = None) -> Any:
        """Return what was made of the fields; raise `UserError` for the first unhandled one.

        A null sets nothing, which is what the reference's class has no field for.
        """
        for name, value in self.fields.items():
            if value is not None and name not in self.known and not name.startswith("_"):
                raise UserError(
                    f"The {self.where} has the field '{name}' = {value!r}, which this "
                    f"model family does not know{nearest(name, self.known)}. It may change the "
                    f"computation, so the checkpoint is refused rather than computed wrongly."
                )
        return made
