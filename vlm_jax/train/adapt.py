"""Method and training table of a run: LoRA, adapters or added tokens, by its config."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from vlm_jax.adapters.added_tokens import add_tokens, is_added
from vlm_jax.adapters.bottleneck import add_adapter
from vlm_jax.adapters.lora import add_lora
from vlm_jax.adapters.lora_init import starts_from_kernel
from vlm_jax.adapters.modules_to_save import bias_leaves, saved_modules
from vlm_jax.adapters.targets import PRESETS, slots, target_kernels, target_modules
from vlm_jax.config.specs import RunSpec
from vlm_jax.errors import UserError, refuse
from vlm_jax.hub.adapter_files import load_either
from vlm_jax.hub.peft_load import load_peft
from vlm_jax.model import Model
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.models.methods import Adapter, LoRA
from vlm_jax.names import layer_names
from vlm_jax.train.trainable import lora_modules_to_save, training_table
from vlm_jax.trees import Table, flatten, split
from vlm_jax.weights import is_quantized


def adapt(
    config: RunSpec, model: Model, params: Mapping[str, Any], tokens: int
) -> tuple[Model, dict[str, Any], list[tuple[str, str]]]:
    """Return (model, params, training table) of a base and its tokenizer of `tokens` tokens.

    Where the tokenizer has more tokens than the embedding, rows for them are added and trained;
    a loaded adapter must hold them itself, else `UserError`.
    """
    if tokens > model.vocab_size and config.model.adapter is None:
        model, params = add_tokens(model, params, tokens - model.vocab_size)
    model, params, table = adapt_base(config, model, params)
    rng = config.training.dropout_rng or model.dropout_rng
    model = dataclasses.replace(model, dropout_rng=rng)
    if tokens > model.vocab_size:
        raise UserError(
            f"The tokenizer of '{config.model.name_or_path}' has {tokens} tokens, but with the "
            f"adapter '{config.model.adapter}' the embedding has {model.vocab_size} rows. Rows are "
            f"not added to a loaded adapter: give the tokenizer that it was trained with, or merge "
            f"it first (vlm-jax export --merge) and train from the result."
        )
    return model, params, table


def adapt_base(
    config: RunSpec, model: Model, params: Mapping[str, Any]
) -> tuple[Model, dict[str, Any], list[tuple[str, str]]]:
    """Return (model, params, training table) of a base: what `adapt` adds beside tokens.

    Runs under `jax.eval_shape` too, unless an adapter of model.adapter has rows of an embedding.
    """
    m, bottlenecks = config.model, config.adapter.type is not None
    model, new, saved = (_add_bottlenecks if bottlenecks else _add_lora)(
        config, model, dict(params)
    )
    table = training_table(
        model,
        new,
        vision_encoder_lr_scale=m.vision_encoder_lr_scale,
        projector_lr_scale=m.projector_lr_scale,
        language_model_lr_scale=m.language_model_lr_scale,
        lora_enabled=bottlenecks or config.lora.enabled or m.language_model_lr_scale == 0,
        loraplus_lr_ratio=config.lora.loraplus_lr_ratio,
        freeze_layers=m.freeze_layers,
        vision_layer_decay=m.vision_layer_decay,
        modules_to_save=saved,
    )
    check_kept(model, new, table)
    return model, new, table


def _modules_to_save(
    config: RunSpec, model: Model, kernels: list[str], asked: Iterable[str]
) -> tuple[str, ...]:
    """Return the modules to save beside an adapter of these kernels. asked: by the config."""
    return lora_modules_to_save(
        model,
        kernels,
        vision_encoder_lr_scale=config.model.vision_encoder_lr_scale,
        projector_lr_scale=config.model.projector_lr_scale,
        modules_to_save=asked,
    )


def _add_lora(
    config: RunSpec, model: Model, params: dict[str, Any]
) -> tuple[Model, dict[str, Any], tuple[str, ...] | None]:
    """Return (model, params, the modules to save that train; None: the model's own)."""
    m, asked = config.model, config.lora
    if m.adapter is not None:
        model, params = load_peft(model, params, m.adapter)
    adapted = [  # the weights with a loaded adapter's factors
        path.removesuffix("lora_A")
        + ("embedding" if path.startswith(model.config.embedding) else "kernel")
        for path in flatten(params)
        if path.endswith("/lora_A")
    ]
    lora = lora_of(config)
    kernels = adapted if adapted or not asked.enabled else target_kernels(model, params, lora)
    saved = _modules_to_save(config, model, kernels, asked.modules_to_save)
    # The modules of a loaded adapter without LoRA stay in this one, trained further or not.
    loaded = () if adapted or model.lora is None else model.lora.modules_to_save
    lora = dataclasses.replace(lora, modules_to_save=tuple(dict.fromkeys((*loaded, *saved))))
    if adapted:
        model = _continue_lora(model, params, lora, config, adapted)
    elif asked.enabled:
        _check_start(lora, params, kernels)
        model, params = add_lora(model, params, lora, jax.random.key(config.training.seed))
    elif m.language_model_lr_scale == 0:  # LLaVA's first stage: an adapter without LoRA
        model = dataclasses.replace(model, lora=dataclasses.replace(lora, targets=()))
    else:  # trained in full: the result is a whole checkpoint, whatever adapter it started from
        model = dataclasses.replace(model, lora=None)
    return model, params, saved if loaded else None


def lora_of(config: RunSpec) -> LoRA:
    """Return what a config's lora section asks for, but for modules to save."""
    asked = config.lora
    return LoRA(
        asked.r,
        int(asked.alpha) if asked.alpha == int(asked.alpha) else asked.alpha,
        asked.dropout,
        asked.target_modules or PRESETS["llama"],
        rslora=asked.use_rslora,
        dora=asked.use_dora,
        rank_pattern=asked.rank_pattern or {},
        alpha_pattern=asked.alpha_pattern or {},
        layers_to_transform=tuple(asked.layers_to_transform or ()),
        layers_pattern=tuple(asked.layers_pattern),
        exclude_modules=asked.exclude_modules or (),
        bias=asked.bias,
        init=asked.init_lora_weights,
    )


def _check_start(lora: LoRA, params: Mapping[str, Any], kernels: list[str]) -> None:
    """Raise before a run whose adapter would be for other codes than its base's."""
    flat = flatten(params)
    if starts_from_kernel(lora.init) and any(is_quantized(flat[path]) for path in kernels):
        raise UserError(
            f"lora.init_lora_weights is {lora.init!r}, which quantizes a 4-bit base again, "
            f"and an adapter cannot hold the new codes. Use 'loftq', which keeps the codes and "
            f"compensates for their rounding, or a base that is not quantized."
        )


def check_kept(model: Model, params: Mapping[str, Any], table: Table) -> None:
    """Raise before a run whose adapter would leave out a leaf that it trains."""
    if model.lora is None and model.adapter is None:
        return
    kept = {
        *saved_modules(model, params, model.modules_to_save).leaves,
        *bias_leaves(model, params),
    }
    for path in flatten(split(params, table)[0]):
        if not (is_lora(path) or is_adapter(path) or is_added(path) or path in kept):
            raise UserError(
                f"The training table trains '{path}', but the adapter would not hold it: add its "
                f"module, '{path.split('/')[-2]}', to modules_to_save, or freeze it."
            )


def _continue_lora(
    model: Model, params: Mapping[str, Any], lora: LoRA, config: RunSpec, adapted: list[str]
) -> Model:
    """Return the model whose loaded LoRA is trained further, with this run's dropout.

    adapted: the kernels that have matrices. Raises `UserError` where the config asks for others.
    """
    own = model.lora
    assert own is not None
    refuse(
        (
            not config.lora.enabled,
            f"The adapter '{config.model.adapter}' holds LoRA factors, but lora.enabled is false. "
            f"Merge it first (vlm-jax export --merge) and train from the result.",
        ),
        (
            lora.init != "true",
            f"lora.init_lora_weights is {lora.init!r}, but the adapter '{config.model.adapter}' "
            f"has factors already, which are not initialised again. Remove one of the two.",
        ),
    )
    for name in ("rank", "alpha", "rslora", "dora", "rank_pattern", "alpha_pattern", "bias"):
        if getattr(own, name) != getattr(lora, name):
            raise UserError(
                f"The adapter '{config.model.adapter}' has {name}={getattr(own, name)}, but the "
                f"config's lora section says {getattr(lora, name)}. Set the adapter's own value."
            )
    asked = config.lora.target_modules
    if asked is not None or lora.layers_to_transform or lora.exclude_modules:
        wanted = {
            module
            for path, flags in target_modules(model, params, lora).items()
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
                f"loaded adapter keeps its own layers: remove lora.target_modules, "
                f"layers_to_transform and exclude_modules from the config, or merge the adapter "
                f"first (vlm-jax export --merge) and train from the result."
            )
    saved = tuple(dict.fromkeys((*own.modules_to_save, *lora.modules_to_save)))
    return dataclasses.replace(
        model, lora=dataclasses.replace(own, dropout=lora.dropout, modules_to_save=saved)
    )


def _add_bottlenecks(
    config: RunSpec, model: Model, params: dict[str, Any]
) -> tuple[Model, dict[str, Any], tuple[str, ...]]:
    """Return (model, params, the modules to save that train) with the config's adapters.

    Raises `UserError` where model.adapter holds LoRA, or adapters of another kind.
    """
    directory, asked = config.model.adapter, dataclasses.asdict(config.adapter)
    adapter = Adapter(kind=asked.pop("type"), **asked)
    loaded: tuple[str, ...] = ()
    if directory is not None:
        model, params = load_either(model, params, directory)
        loaded = model.modules_to_save
        if any(map(is_lora, flatten(params))):
            raise UserError(
                f"'{directory}' holds LoRA factors, and adapter.type asks for bottleneck adapters "
                f"beside them. Merge them first (vlm-jax export --merge) and train from the result."
            )
    if model.adapter is None:  # LLaVA's first stage saves modules alone
        model, params = add_adapter(model, params, adapter, jax.random.key(config.training.seed))
    else:
        _check_same(model.adapter, adapter, str(directory))
    places = [path for path in flatten(params) if is_adapter(path)]
    saved = _modules_to_save(config, model, places, adapter.modules_to_save)
    adapter = dataclasses.replace(adapter, modules_to_save=tuple(dict.fromkeys((*loaded, *saved))))
    return dataclasses.replace(model, adapter=adapter, lora=None), params, saved


def _check_same(own: Adapter, asked: Adapter, directory: str) -> None:
    """Raise where a loaded adapter computes otherwise than the config asks."""
    for name in ("kind", "reduction_factor", "non_linearity", "scaling", "norm", "components"):
        ours, theirs = getattr(own, name), getattr(asked, name)
        if ours != theirs and (name != "components" or set(ours) != set(theirs)):
            raise UserError(
                f"The adapter '{directory}' has {name}={getattr(own, name)!r}, but the config's "
                f"adapter section says {getattr(asked, name)!r}. Set the adapter's own value."
            )
