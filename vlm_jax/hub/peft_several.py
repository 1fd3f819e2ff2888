"""Several PEFT adapters on one base: switching and weighted sums.

All of them get one shape: the leaves that any adapter has, of the largest rank, each with its
scales as the leaf `lora_scale`; what an adapter lacks is zero. A jitted function that takes
parameters as an argument thus serves all of them with one program, and leaves of the base are the
same arrays in each.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.adapters.lora import left_out
from vlm_jax.adapters.targets import scales, slots
from vlm_jax.errors import UserError, nearest
from vlm_jax.hub.peft_load import load_peft
from vlm_jax.model import Model
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.models.methods import LoRA
from vlm_jax.names import layer_names
from vlm_jax.trees import flatten, unflatten


def load_peft_adapters(
    model: Model, params: Mapping[str, Any], directories: Mapping[str, str | Path]
) -> tuple[Model, dict[str, dict[str, Any]]]:
    """Return the model and {name: the base's parameters with that adapter}, all of one shape.

    directories: {name: PEFT directory}. `model.apply({"params": adapters[name]}, batch)` has the
    logits that `load_peft` gives of that directory alone. Adapters may differ in rank, targets,
    scales and modules_to_save. Raises `UserError` where some are DoRA's and some are not, where one
    has new tokens, and as `load_peft` does.
    """
    if not directories:
        raise UserError("load_peft_adapters was given no adapter: pass {name: PEFT directory}.")
    base, first = flatten(params), next(iter(directories))
    dora: dict[str, bool] = {}
    trees: dict[str, dict[str, Any]] = {}
    for name, directory in directories.items():
        adapted, tree = load_peft(model, params, directory)
        flat = flatten(tree)
        added = [path for path in flat if path.endswith("/added")]
        if added and added[0] not in base:
            raise UserError(
                f"The adapter '{name}' in '{directory}' has more tokens than the base ('"
                f"{added[0]}'), so it cannot share one shape with others. Load it by load_peft."
            )
        assert adapted.lora is not None
        dora[name] = adapted.lora.dora
        if dora[name] != dora[first]:
            raise UserError(
                f"Of the adapters '{first}' and '{name}' one is DoRA's and the other is not: they "
                f"have different programs. Load them apart, or merge one into the base."
            )
        trees[name] = flat | {
            path.replace("/lora_A", "/lora_scale"): scales(slots(adapted, adapted.lora, path))
            for path in flat
            if path.endswith("/lora_A")
        }
    shapes: dict[str, tuple[int, ...]] = {}
    own: set[str] = set()
    for tree in trees.values():
        for path, leaf in tree.items():
            if is_lora(path):
                shapes[path] = tuple(map(max, leaf.shape, shapes.get(path, leaf.shape)))
            elif leaf is not base[path]:
                own.add(path)
    dense = {path: jnp.asarray(base[path], jnp.float32) for path in own}
    adapters = {
        name: unflatten(
            {
                **{path: dense.get(path, leaf) for path, leaf in base.items()},
                **{path: tree[path] for path in own if tree[path] is not base[path]},
                **{path: _filled(tree.get(path), shape) for path, shape in shapes.items()},
            }
        )
        for name, tree in trees.items()
    }
    ranks = [shape[-1] for path, shape in shapes.items() if path.endswith("/lora_A")]
    rank = max(ranks, default=1)  # of a projector alone there are no matrices
    return (
        dataclasses.replace(model, lora=LoRA(rank, rank, targets=(), dora=dora[first])),
        adapters,
    )


def _filled(leaf: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return a leaf with zeros up to a shape, all zeros where there is none."""
    zeros = jnp.zeros(shape, jnp.float32)
    return zeros if leaf is None else zeros.at[tuple(map(slice, leaf.shape))].set(leaf)


def _rank(tree: Mapping[str, Any], path: str) -> int:
    """Return the rank of an adapter's leaf without the zeros that `_filled` put behind it."""
    a, b = tree[path], tree[path.replace("/lora_A", "/lora_B")]
    used = jnp.any(a.reshape(-1, a.shape[-1]) != 0, axis=0)
    used |= jnp.any(jnp.moveaxis(b, -2, -1).reshape(-1, b.shape[-2]) != 0, axis=0)
    return int(jnp.max(jnp.where(used, jnp.arange(1, a.shape[-1] + 1), 0)))


def combine_peft_adapters(
    model: Model,
    adapters: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, float],
    kind: str = "cat",
    rank: int | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Return the model and parameters of a weighted sum of adapters, as one LoRA for `save_peft`.

    Args:
        model, adapters: of `load_peft_adapters`.
        weights: {name: weight}, of either sign.
        kind: as in PEFT's add_weighted_adapter. "cat": the exact sum, of as much rank as all
            together. "svd": its best approximation of `rank`. "linear": A added to A and B to B,
            each with the root of its weight; cheap, another function, and for equal ranks only.
        rank: of "svd"; the default is the largest rank among the adapters.

    Raises:
        UserError: for DoRA, modules that adapters hold in full, adapters without LoRA factors, and
            unknown names and kinds.
    """
    if kind not in COMBINATIONS:
        raise UserError(
            f"Adapters cannot be combined by '{kind}'{nearest(kind, COMBINATIONS)}. Known: "
            f"{', '.join(COMBINATIONS)}."
        )
    for name in weights:
        if name not in adapters:
            raise UserError(
                f"There is no adapter '{name}' to combine{nearest(name, adapters)}. Loaded: "
                f"{', '.join(adapters)}."
            )
    if not weights:
        raise UserError("No adapter is named to be combined: pass {name: weight}.")
    trees = [flatten(adapters[name]) for name in weights]
    first = trees[0]
    if any(path.endswith("/lora_magnitude") for path in first):
        raise UserError(
            "DoRA's adapters cannot be summed: each has norms beside its factors. Combine adapters "
            "without DoRA."
        )
    combined = {path: leaf for path, leaf in first.items() if not is_lora(path)}
    for path, leaf in combined.items():
        if any(tree[path] is not leaf for tree in trees):
            raise UserError(
                f"The adapters {', '.join(map(repr, weights))} differ in '{path}', which one "
                f"of them holds in full (modules_to_save, bias): only LoRA is combined."
            )
    ranks = {
        path: [_rank(tree, path) for tree in trees] for path in first if path.endswith("/lora_A")
    }
    if not ranks:
        raise UserError(
            f"The adapters {', '.join(map(repr, weights))} hold no LoRA factors: there is nothing "
            f"to combine."
        )
    uneven = [path for path, own in ranks.items() if len({*own} - {0}) > 1]
    if kind == "linear" and uneven:
        raise UserError(
            f"The adapters {', '.join(map(repr, weights))} have the ranks {ranks[uneven[0]]} in "
            f"'{uneven[0].rsplit('/', 1)[0]}'; 'linear' adds factors, which needs one rank, as "
            f"in PEFT. Use 'cat' or 'svd'."
        )
    hits: dict[str, list[bool]] = {}
    factors: dict[str, tuple[jax.Array, jax.Array]] = {}
    rank = rank or max(map(max, ranks.values()))
    for path in ranks:
        base = path.removesuffix("lora_A")
        parts = [
            (tree[path], tree[f"{base}lora_B"], weight * tree[f"{base}lora_scale"])
            for tree, weight in zip(trees, weights.values(), strict=True)
        ]
        factors[path] = COMBINATIONS[kind](parts, rank)
        on = jnp.stack([scale != 0 for *_, scale in parts]).any(0)
        if on.any():
            hits[path] = [bool(one) for one in jnp.atleast_1d(on)]
        if on.any() and not on.all():
            combined[f"{base}lora_scale"] = on.astype(jnp.float32)
    largest = max(a.shape[-1] for a, _ in factors.values())
    for path in hits:
        a, b = factors[path]
        combined |= {
            path: _filled(a, (*a.shape[:-1], largest)),
            path.replace("/lora_A", "/lora_B"): _filled(b, (*b.shape[:-2], largest, b.shape[-1])),
        }
    ends = {name.split(".")[-1] for path in hits for name in layer_names(model, path)}
    lora = LoRA(largest, largest, targets=tuple(sorted(ends)), left_out=left_out(model, hits))
    return dataclasses.replace(model, lora=lora), unflatten(combined)


Part = tuple[jax.Array, jax.Array, jax.Array]  # A [.., in, R], B [.., R, out], weight x scale [..]


def _cat(parts: list[Part], rank: int) -> tuple[jax.Array, jax.Array]:
    a = jnp.concatenate([a * scale[..., None, None] for a, _, scale in parts], axis=-1)
    return a, jnp.concatenate([b for _, b, _ in parts], axis=-2)


def _linear(parts: list[Part], rank: int) -> tuple[jax.Array, jax.Array]:
    roots = [jnp.sqrt(jnp.abs(scale))[..., None, None] for *_, scale in parts]
    signs = [jnp.sign(scale)[..., None, None] for *_, scale in parts]  # on one side alone
    a = sum(a * root * sign for (a, *_), root, sign in zip(parts, roots, signs, strict=True))
    return jnp.asarray(a), jnp.asarray(
        sum(p[1] * root for p, root in zip(parts, roots, strict=True))
    )


def _svd(parts: list[Part], rank: int) -> tuple[jax.Array, jax.Array]:
    """The sum's largest singular vectors, found in the small space of all ranks together."""
    a, b = _cat(parts, rank)
    left, small_a = jnp.linalg.qr(a)
    right, small_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    core = jnp.matmul(small_a, jnp.swapaxes(small_b, -1, -2), precision=jax.lax.Precision.HIGHEST)
    u, values, v = jnp.linalg.svd(core, full_matrices=False)
    a = jnp.matmul(left, u, precision=jax.lax.Precision.HIGHEST)[..., :rank]
    b = jnp.matmul(v, jnp.swapaxes(right, -1, -2), precision=jax.lax.Precision.HIGHEST)
    return a, (values[..., :, None] * b)[..., :rank, :]


COMBINATIONS = {"cat": _cat, "linear": _linear, "svd": _svd}
