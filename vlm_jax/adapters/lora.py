"""LoRA on a parameter tree: new factors A and B, and merging them into the kernels.

LoRA (https://arxiv.org/abs/2106.09685) adds to a frozen kernel W [in, out] the product of two small
factors, y = x W + (alpha / rank) x A B. `add_lora` puts them beside the kernel, each with the layer
axis L of a stack first; B starts at zero, so that the model starts equal to its base:

    vlm_jax.add_lora(model, params, LoRA(rank=16, targets=("q_proj",)), key=jax.random.key(0))

    before                           after
    layers/self_attn/                layers/self_attn/
      q_proj/kernel  [L, D, D]         q_proj/kernel  [L, D, D]    frozen
                                       q_proj/lora_A  [L, D, 16]   trained, float32
                                       q_proj/lora_B  [L, 16, D]   trained, float32
      o_proj/kernel  [L, D, D]         o_proj/kernel  [L, D, D]    frozen

`vlm_jax.merge` returns the tree on the left, with W + (alpha / rank) A B as the kernel.

Layers of a stack may differ in rank and scale. Their factors then have the largest rank, and a
layer of a smaller one has zeros in its last columns of A and rows of B: each is the other's
gradient, so they stay zero under any optimizer. `lora_scale` [L], float32 and never trained, holds
the scales where they differ from the one that `LoRA` states; 0 is a layer without LoRA.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.adapters import lora_init
from vlm_jax.adapters.added_tokens import is_added
from vlm_jax.adapters.bottleneck import check_no_adapter
from vlm_jax.adapters.modules_to_save import bias_leaves, saved_leaves
from vlm_jax.adapters.targets import (
    Slot,
    embedding_leaf,
    is_uniform,
    rank_mask,
    scales,
    slots,
    target_modules,
)
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError, refuse
from vlm_jax.model import Model
from vlm_jax.models.layers.linear import column_norms, fresh_a, is_lora, less_start, weight_update
from vlm_jax.models.methods import LoRA
from vlm_jax.names import current_name, layer_names, to_tree
from vlm_jax.trees import flatten, unflatten
from vlm_jax.weights import FourBit, dense
from vlm_jax.weights.quantize import lying_as, requantized

BIASES = ("none", "all", "lora_only")  # PEFT's words for which biases train


def _check_overlap(
    model: Model, flat: Mapping[str, Any], lora: LoRA, kernels: Iterable[str]
) -> None:
    in_full = {
        *saved_leaves(model, flat, lora.modules_to_save),
        *(path.replace("/added", "/kernel") for path in flat if is_added(path)),
        *(path.replace("/added", "/embedding") for path in flat if is_added(path)),
    }
    codes = [path for path in in_full if isinstance(flat.get(path), FourBit)]
    if codes:
        raise UserError(
            f"modules_to_save, {list(lora.modules_to_save)}, trains '{min(codes)}' in full, which "
            f"is stored in 4 bits: codes have no gradient. Remove the module from modules_to_save, "
            f"or exclude it from quantization (components, skipped modules)."
        )
    both = [path for path in kernels if path in in_full]
    if both:
        raise UserError(
            f"'{both[0]}' is both a LoRA target and in modules_to_save, or has rows of added "
            f"tokens: remove it from one of the two."
        )


def check_numbers(lora: LoRA) -> None:
    """Raise `UserError` for a rank, dropout or word that means nothing."""
    words = ", ".join(BIASES)
    refuse(
        (lora.rank < 1, f"The LoRA rank is {lora.rank}; it must be 1 or more."),
        (not 0 <= lora.dropout < 1, f"The LoRA dropout is {lora.dropout}; it must be in [0, 1)."),
        (lora.bias not in BIASES, f"LoRA.bias is {lora.bias!r}; it must be one of {words}."),
    )


def usual_start(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], embedding: bool
) -> dict[str, jax.Array]:
    """Return A and B as PEFT starts them, one of the two zero; shapes: {name: shape} of both.

    A is uniform within 1/sqrt(in). Of an embedding, whose A is looked up, B is normal instead.
    """
    (a, shape_a), (b, shape_b) = shapes.items()
    return (
        {a: jnp.zeros(shape_a, jnp.float32), b: jax.random.normal(key, shape_b, jnp.float32)}
        if embedding
        else {a: fresh_a(key, shape_a), b: jnp.zeros(shape_b, jnp.float32)}
    )


def add_lora(
    model: Model, params: Mapping[str, Any], lora: LoRA, key: jax.Array
) -> tuple[Model, dict[str, Any]]:
    """Return the model and a new tree with the leaves `lora_A` [in, R] and `lora_B` [R, out].

    A is kaiming-uniform with a = sqrt(5), that is uniform within 1/sqrt(in), and B zero, as in
    PEFT: the adapted model starts equal to the base. Of the embedding A is zero and B normal. Both
    are float32, with the layer axis of a stack first. lora.dora adds `lora_magnitude` [out], the
    norms of the kernel's columns. Layers of unlike rank or scale: see the top of this file.

    Args:
        model: the model without LoRA and adapters.
        params: its tree; it stays as it was.
        lora: rank, alpha, targets and initialisation.
        key: for initialisation.

    Raises:
        UserError: for a target or module that matches nothing, and where the tree holds LoRA.
    """
    flat = flatten(params)
    if any(is_lora(path) for path in flat):
        raise UserError("These parameters hold LoRA factors already; merge them first.")
    check_no_adapter(flat, "LoRA goes on a base without")
    check_numbers(lora)
    name, _ = lora_init.kind_of(lora.init)
    hits = target_modules(model, params, lora)
    _check_overlap(model, flat, lora, hits)
    if lora.dora and embedding_leaf(model) in hits:
        raise UserError(
            "DoRA is asked for on 'embed_tokens', but an embedding has no columns whose norms "
            "DoRA's learned ones could replace here. Remove it from the targets, or set dora=False."
        )
    lora = dataclasses.replace(lora, left_out=left_out(model, hits))
    for path, one in zip(hits, jax.random.split(key, len(hits)), strict=True):
        held = slots(model, lora, path)
        *layers, inputs, outputs = flat[path].shape
        rank = max(slot.rank for slot in held)
        base = path.rsplit("/", 1)[0]
        embedding = path == embedding_leaf(model)
        if embedding and name not in ("true", "gaussian"):
            raise UserError(
                f"init_lora_weights={lora.init!r} is not defined for an embedding, nor "
                f"in PEFT: remove 'embed_tokens' from the targets, or initialise at random "
                "(true)."
            )
        if embedding or name == "true":
            shapes = {"lora_A": (*layers, inputs, rank), "lora_B": (*layers, rank, outputs)}
            start = usual_start(one, shapes, embedding)
        else:
            start = _initial(model, lora, path, flat[path], one)
        if layers:
            start["lora_A"] *= rank_mask(held)[..., None, :]
        flat |= {f"{base}/{leaf}": value for leaf, value in start.items()}
        if lora.dora:
            filled = name in lora_init.FROM_LOSS or "kernel" in start  # it starts at their norms
            norms = _sum_norms(flat, base, held) if filled else _norms(flat[path])
            # None of a layer left out.
            flat[f"{base}/lora_magnitude"] = norms * rank_mask(held)[:, :1] if layers else norms
        if not is_uniform(lora, held):
            flat[f"{base}/lora_scale"] = scales(held)
    model, params = dataclasses.replace(model, lora=lora), unflatten(flat)
    bias_leaves(model, params)
    return model, params


def _initial(model: Model, lora: LoRA, path: str, kernel: Any, key: jax.Array) -> dict[str, Any]:
    """Return the leaves of an initialisation from the kernel, the changed kernel among them.

    See lora_init.py. Layer by layer, on the device where the kernel is.
    """
    name, iterations = lora_init.kind_of(lora.init)
    held, four = slots(model, lora, path), isinstance(kernel, FourBit)
    if name in lora_init.FROM_LOSS and not four:
        raise UserError(
            f"init_lora_weights={lora.init!r} makes up for 4-bit rounding, but '{path}' is dense: "
            f"quantize the base (model.quantize=nf4), or use 'pissa'."
        )
    takes = name in lora_init.FROM_KERNEL
    read = _originals(model, path, kernel) if takes or name in lora_init.FROM_LOSS else None
    *_, inputs, outputs = kernel.shape
    rank = max(slot.rank for slot in held)
    made = []
    for slot, one in zip(held, jax.random.split(key, len(held)), strict=True):
        old = _one(kernel, slot.layer)
        if slot.rank == 0:
            a, b = jnp.zeros((inputs, rank)), jnp.zeros((rank, outputs))
        elif read is None:
            a, b = lora_init.random_start(name, one, inputs, slot.rank, outputs)
        elif slot.scale == 0:
            raise UserError(f"init_lora_weights={lora.init!r} needs an alpha above 0.")
        else:
            weight = read(slot)
            source = weight if takes else weight - dense(old, jnp.float32)
            a, b = lora_init.factors(name, source, slot.rank, slot.scale, iterations, one)
            if takes and four:
                residual = weight - slot.scale * a @ b
                old = requantized(old, residual, f"'{path}' after its initialisation")
        lacking = rank - a.shape[1]
        made.append(
            {
                "lora_A": jnp.pad(a, ((0, 0), (0, lacking))),
                "lora_B": jnp.pad(b, ((0, lacking), (0, 0))),
                **({"kernel": old} if takes and four else {}),
            }
        )
    leaves = (
        made[0] if held[0].layer is None else jax.tree.map(lambda *layers: jnp.stack(layers), *made)
    )
    if "kernel" in leaves:
        leaves["kernel"] = lying_as(leaves["kernel"], kernel)
    elif takes:
        leaves |= {"start_A": leaves["lora_A"], "start_B": leaves["lora_B"]}
    return leaves


def _originals(model: Model, path: str, kernel: Any) -> Callable[[Slot], jax.Array]:
    """Return a function to a kernel's layers in float32, before they were put in 4 bits."""
    if not isinstance(kernel, FourBit) or isinstance(kernel.codes, jax.core.Tracer):
        return lambda slot: dense(_one(kernel, slot.layer), jnp.float32)
    source = model.source
    names = {current_name(model, name): name for name in source.tensors} if source else {}
    first = names.get(f"{layer_names(model, path)[0]}.weight")
    if (
        model.files is None
        or source is None
        or first is None
        or any(n.startswith(first) for n in source.beside)
    ):
        raise UserError(
            f"'{path}' is stored in 4 bits in the base's files, without the weights that "
            f"init_lora_weights needs here. Load a base in 16 or 32 bits with "
            f"model.quantize, or initialise at random (true)."
        )
    if processes.count() > 1:
        raise UserError(
            "Initialisation from 4-bit kernels (init_lora_weights) works in one process only. "
            "Initialise there and save the adapter, or initialise at random (true)."
        )
    read = model.files.tensors(model)
    return lambda slot: jnp.asarray(to_tree(path, read(f"{slot.module}.weight")), jnp.float32)


def left_out(model: Model, hits: Mapping[str, list[bool]]) -> tuple[str, ...]:
    """Return `LoRA.left_out` of {kernel: for each of its layers whether it is adapted}."""
    return tuple(
        module
        for path, flags in hits.items()
        for module, hit in zip(layer_names(model, path), flags, strict=True)
        if not hit
    )


def merge(model: Model, params: Mapping[str, Any], requantize: bool = False) -> dict[str, Any]:
    """Return a new tree without LoRA whose logits equal the adapted ones: W + alpha/r A B.

    Of DoRA the columns of that have the learned norms.

    The sum is formed in float32 and stored in the kernel's dtype. A quantized kernel is decoded and
    becomes dense in the model's dtype; requantize: it becomes a quantized one of the same format
    again, on the same devices, which rounds most of a small update away (`requantization_error`
    measures it). The old tree is untouched. Raises `UserError` for matrices that were made for
    another shape, and where requantize finds nothing in 4 bits.
    """
    flat = flatten(params)
    check_no_adapter(flat, "A merged model is one without")
    if requantize and not any(isinstance(leaf, FourBit) for leaf in flat.values()):
        raise UserError(
            "requantize=True makes merged kernels 4-bit again, but these parameters hold no 4-bit "
            "kernel. Load the base with quantize='nf4-dq', or merge without requantize."
        )
    return unflatten(
        {
            path: merged_leaf(model, flat, path, requantize=requantize)
            for path in flat
            if not is_lora(path)
        }
    )


def merged_leaf(
    model: Model,
    flat: Mapping[str, Any],
    path: str,
    layer: int | None = None,
    requantize: bool = False,
) -> Any:
    """Return one leaf of a flat tree as `merge` makes it, or one layer of its stack.

    A leaf without LoRA is returned as it is.
    """
    base, kernel = path.rsplit("/", 1)[0], _one(flat[path], layer)
    if not path.endswith(("/kernel", "/embedding")) or f"{base}/lora_A" not in flat:
        return kernel
    if path == embedding_leaf(model) and model.config.text.tied:
        raise UserError(
            "The embedding has LoRA factors and this model's head is tied to it: the factors "
            "change the embedding alone, as in PEFT, so merging would untie them. Keep the "
            "adapter (save_peft), or merge it with peft, which unties the head."
        )
    summed = _merged(model, flat, base, kernel, layer)
    four = isinstance(kernel, FourBit)
    if four and requantize:
        return lying_as(requantized(kernel, summed, f"The merged kernel '{base}'"), kernel)
    return summed.astype(model.dtype if four else kernel.dtype)


def _one(leaves: Any, layer: int | None) -> Any:
    """Return one layer of stacks; None: the leaves, which are none, as they are."""
    return leaves if layer is None else jax.tree.map(lambda array: array[layer], leaves)


def _norms(kernel: Any) -> jax.Array:
    """Return the norms of a kernel's columns, float32 [..., out], a layer of a stack at a time."""
    return (
        jax.lax.map(_norms, kernel)
        if len(kernel.shape) > 2
        else jnp.linalg.norm(dense(kernel, jnp.float32), axis=-2)
    )


def _sum_norms(flat: Mapping[str, Any], base: str, held: list[Slot]) -> jax.Array:
    """Return the norms of the columns of a kernel and what its matrices add, float32 [..., out]."""
    leaves = [flat[f"{base}/{name}"] for name in ("kernel", "lora_A", "lora_B")]
    layers = ((_one(leaves, slot.layer), slot.scale) for slot in held)  # one in memory at a time
    norms = [column_norms(kernel, a, b, scale) for (kernel, a, b), scale in layers]
    return norms[0] if held[0].layer is None else jnp.stack(norms)


def _merged(
    model: Model, flat: Mapping[str, Any], base: str, kernel: Any, layer: int | None
) -> jax.Array:
    """Return a kernel with its adapter in it, in float32: their sum, or DoRA's."""
    assert model.lora is not None
    a, b = (_one(flat[f"{base}/{name}"], layer) for name in ("lora_A", "lora_B"))
    *layers, inputs, outputs = kernel.shape
    rank = a.shape[-1]
    if a.shape != (*layers, inputs, rank) or b.shape != (*layers, rank, outputs):
        raise UserError(
            f"The LoRA factors of '{base}' are {list(a.shape)} and {list(b.shape)}, made for "
            f"another shape than its kernel's, {list(kernel.shape)}. Use the adapter that was "
            f"trained on this base."
        )
    if f"{base}/start_A" in flat:
        a, b = less_start(a, b, *(_one(flat[f"{base}/start_{one}"], layer) for one in "AB"))
    scale: Any = (
        _one(flat[f"{base}/lora_scale"], layer)[..., None, None]
        if f"{base}/lora_scale" in flat
        else model.lora.scale.scale(rank)
    )
    summed = dense(kernel, jnp.float32) + weight_update(a, b, scale)
    if f"{base}/lora_magnitude" not in flat:
        return summed
    magnitude = _one(flat[f"{base}/lora_magnitude"], layer)
    learned = summed * (magnitude / jnp.linalg.norm(summed, axis=-2))[..., None, :]
    return jnp.where(jnp.asarray(scale) == 0, summed, learned)  # a layer without matrices


def requantization_error(model: Model, params: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far 4-bit kernels that are merged and quantized again lie from the exact sums.

    The first is the error's norm over the norm of the weights, the second over that of the
    updates: at 1 as much is lost as was learned.
    """
    flat = flatten(params)
    error = weight = update = 0.0
    for path, kernel in flat.items():
        base = path.rsplit("/", 1)[0]
        if not isinstance(kernel, FourBit) or f"{base}/lora_A" not in flat:
            continue
        # One layer after another: a stack may have no room.
        for layer in range(kernel.shape[0]) if len(kernel.shape) > 2 else (None,):
            before = _one(kernel, layer)
            exact = _merged(model, flat, base, before, layer)
            after = dense(merged_leaf(model, flat, path, layer, requantize=True), jnp.float32)
            error += float(jnp.sum((after - exact) ** 2))
            weight += float(jnp.sum(exact**2))
            update += float(jnp.sum((exact - dense(before, jnp.float32)) ** 2))
    return math.sqrt(error / max(weight, 1e-30)), math.sqrt(error / max(update, 1e-30))
