"""The optimizer over a training table's groups, with layer-wise rates; AdamW equals torch's."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vlm_jax.config.checks import optimizer_name
from vlm_jax.config.schema import coerce, get_config
from vlm_jax.errors import UserError, nearest, refuse
from vlm_jax.train.optimizers import RULES, each_tensor, scale_by_adam, takes
from vlm_jax.train.schedules import schedule
from vlm_jax.trees import Group, Table, flatten, map_leaves, match
from vlm_jax.weights import is_quantized

# Decay pulls a weight towards zero; a norm's scale and a bias have no business there.
DECAY: Table = [(r"(.*/)?(bias|scale|lora_scale)", False), (r".*", True)]


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """What `optimizer` reads of a run's `training` section, under TrainingArguments' names.

    optim: a key of `config.choices.OPTIMIZERS`.
    max_steps: all optimizer steps of the run, above 0 wherever the schedule depends on it.
    warmup_steps: above 0 it overrides warmup_ratio; below 1 it is a share of max_steps itself.
    max_grad_norm: 0 turns clipping off.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    optim: str = "adamw"
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_ratio: float = 0.0
    warmup_steps: float = 0
    max_steps: int = -1

    @classmethod
    def of(cls, training: Any) -> "OptimizerSettings":
        """Return the settings of a mapping or of any object with TrainingArguments' attributes.

        Keys may be left out, for the defaults above; but where neither a schedule nor max_steps
        is given, the learning rate is constant (after the warm-up, if there is one). Numbers may
        be strings, as YAML reads 2e-4. Raises `UserError` for an unknown key of a mapping and for
        a value of the wrong type.
        """
        if isinstance(training, cls):
            return training
        types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        if isinstance(training, Mapping | ConfigDict):
            known = {*types, *get_config().training}
            for key in training:
                if key not in known:
                    raise UserError(f"Unknown training key '{key}'{nearest(key, known)}.")
            given = {name: training[name] for name in types if name in training}
        else:
            given = {name: getattr(training, name, None) for name in types}
        for name in ("lr_scheduler_type", "optim"):  # TrainingArguments holds enumerations
            given[name] = getattr(given.get(name), "value", given.get(name))
        values = {
            name: coerce(f"training.{name}", value, types[name], False, "the training settings")
            for name, value in given.items()
            if value is not None
        }
        if "lr_scheduler_type" not in values and values.get("max_steps", -1) <= 0:
            values["lr_scheduler_type"] = "constant_with_warmup"
        return cls(**values)

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises linearly from 0."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        share = self.warmup_steps or self.warmup_ratio
        if share > 0 and self.max_steps <= 0:
            raise UserError("training.warmup_ratio is a share of training.max_steps: set it too.")
        return math.ceil(max(self.max_steps, 0) * share)


def learning_rate(settings: OptimizerSettings) -> Callable[[Any], jax.Array]:
    """Return `step -> learning rate` of a group of scale 1, see `schedule`."""
    kind = settings.lr_scheduler_type
    warmup = 0 if kind == "constant" else settings.warmup
    return schedule(
        kind,
        settings.learning_rate,
        warmup,
        settings.max_steps,
        settings.lr_scheduler_kwargs or {},
    )


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scale all gradients by min(1, limit / (norm + 1e-6)), torch's `clip_grad_norm_`.

    optax's own divides by the norm alone, and only above the limit.
    """

    def update(updates, state, params=None):
        del params
        # In float32: a sum of squares in bfloat16 has two digits, and leaves may differ in dtype.
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), updates))
        factor = jnp.minimum(1.0, limit / (norm + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def one_group(
    settings: OptimizerSettings,
    kind: str,
    scale: float,
    decay_mask: Callable[[Any], Any],
    shardings: Mapping[str, Any],
) -> optax.GradientTransformation:
    """Return the optimizer of one group, with decay beside it (https://arxiv.org/abs/1711.05101).

    kind: a key of `RULES`, or one of AdamW's names, which say how its moments are kept.
    """
    schedule, betas = learning_rate(settings), (settings.adam_beta1, settings.adam_beta2)
    rule = (
        each_tensor(RULES[kind](*betas))
        if kind in RULES
        else scale_by_adam(
            *betas,
            settings.adam_epsilon,
            eight_bit=kind.endswith("_8bit"),
            paged=kind.startswith("paged_"),
            shardings=shardings,
        )
    )
    return optax.chain(
        rule,
        optax.add_decayed_weights(settings.weight_decay, decay_mask),
        optax.scale_by_learning_rate(lambda step: scale * schedule(step)),
    )


def optimizer(
    trainable: Mapping[str, Any], table: Table, training: Any, still: Collection[str] = ()
) -> optax.GradientTransformation:
    """Return the optax transformation that trains each leaf as its row of the table says.

    Gradients are clipped by their global norm over all that trains, then go to one optimizer a
    group; its state exists for trained leaves only, in their dtype or, of the 8-bit optimizers, as
    `scale_by_adam` says. Norms and biases do not decay. Leaves that Muon does not take, see
    `optimizers.MUON`, get AdamW.

    Args:
        trainable: the first tree of `vlm_jax.split(params, table)`.
        table: ordered (regex, group) rows; the number in "full(0.1)" or "lora(2)" scales the
            learning rate, those of "full(1; layers 0*8, 1*24)" each layer's: 0 freezes it, though
            it has a state.
        training: a mapping or object with TrainingArguments' names, see `OptimizerSettings`.
        still: paths without a gradient, which do not decay: torch skips such a parameter.

    Raises:
        UserError: where nothing trains, or a group or the optimizer is unknown.
    """
    settings, flat = OptimizerSettings.of(training), flatten(trainable)
    texts = match(table, flat, "training table", unused="allow")
    groups = {path: Group.parse(text) for path, text in texts.items()}
    if not groups:
        raise UserError("Nothing is left to train: the training table freezes every parameter.")
    for path, group in groups.items():
        shape = flat[path].shape
        refuse(
            (
                group.frozen,
                f"The training table freezes '{path}', which is among the trainable leaves. Pass "
                f"the first tree of vlm_jax.split(params, table) with the same table.",
            ),
            (
                is_quantized(flat[path]),
                f"The training table trains '{path}', which is stored in 4 bits: codes have no "
                f"gradient. Freeze it and train LoRA beside it, or load the base without quantize.",
            ),
            (
                group.layers is not None and shape[:1] != (len(group.layers),),
                f"The training table has the group {texts[path]!r} for '{path}', which is of shape "
                f"{shape}: it needs one number for each of its {shape[0] if shape else 0} layers.",
            ),
        )

    def decay_mask(tree: Any) -> Any:
        flags = match(DECAY, flatten(tree), "decay table", unused="allow")
        # Inside multi_transform the leaves of other groups are empty nodes, which stay.
        return map_leaves(
            lambda path, leaf: (
                leaf if isinstance(leaf, optax.MaskedNode) else flags[path] and path not in still
            ),
            tree,
        )

    shardings = {
        path: None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        for path, leaf in flat.items()
    }
    kind = optimizer_name(settings.optim)
    kinds = {path: kind if takes(kind, path) else "adamw" for path in flat}
    # A group that two optimizers share has two names; checkpoints know the others by their own.
    names = {path: text if kinds[path] == kind else f"{text} adamw" for path, text in texts.items()}
    transforms = {
        name: one_group(settings, kinds[path], groups[path].scale, decay_mask, shardings)
        for path, name in names.items()
    }
    groups_tx = optax.multi_transform(
        transforms, map_leaves(lambda path, _: names[path], trainable)
    )
    # Without a limit it is infinite: the state keeps one structure whatever the settings.
    norm = settings.max_grad_norm
    clip = clip_by_global_norm(norm if norm > 0 else math.inf)
    layers = {path: group.layers for path, group in groups.items() if group.layers is not None}
    if layers:  # neither of these has a state, so checkpoints keep their names
        # Gradients of frozen layers are zeros, which the clipped norm does not see.
        trains = {path: [float(f > 0) for f in fs] for path, fs in layers.items() if 0 in fs}
        clip = optax.chain(scale_layers(trains), clip)
        inner, scaled = groups_tx, scale_layers(layers)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            updates, state = inner.update(updates, state, params)
            return scaled.update(updates, optax.EmptyState(), params)[0], state

        groups_tx = optax.GradientTransformation(inner.init, update)
    return optax.chain(clip, groups_tx)


def scale_layers(factors: Mapping[str, Sequence[float]]) -> optax.GradientTransformation:
    """Multiply the leaf of each path by its factors, one for each layer of the stack.

    A factor of 0 gives -0.0: as an update it leaves even the sign of a zero as it was.
    """

    def one(path: str, leaf: Any) -> Any:
        if path not in factors or isinstance(leaf, optax.MaskedNode):
            return leaf
        factor = jnp.asarray(factors[path], leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(factor == 0, jnp.asarray(-0.0, leaf.dtype), factor * leaf)

    return optax.stateless(lambda updates, _: map_leaves(one, updates))
