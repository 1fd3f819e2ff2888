"""`adapt`: LoRA, bottleneck adapters and 4-bit weights on any Linen module, unchanged."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from vlm_jax.adapters.bottleneck import fresh
from vlm_jax.adapters.lora import check_numbers, usual_start
from vlm_jax.adapters.lora import merge as merge_lora
from vlm_jax.errors import UserError, explained, nearest, refuse
from vlm_jax.linen.adapted import ADAPTER, LORA, Adapted
from vlm_jax.linen.discover import look
from vlm_jax.linen.intercept import nnx_text, warn_without_dropout
from vlm_jax.linen.parts import Layer, Other, unboxed
from vlm_jax.linen.targets import (
    check_adapter,
    check_lacking,
    chosen,
    chosen_sites,
    site_shapes,
)
from vlm_jax.model import Model
from vlm_jax.models.layers.linear import weight_update
from vlm_jax.models.methods import Adapter, LoRA
from vlm_jax.quantization import NAMES, Quantization
from vlm_jax.trees import flatten, unflatten
from vlm_jax.weights import FourBit, dense
from vlm_jax.weights.quantize import quantize


def adapt(
    module: nn.Module,
    params: Mapping[str, Any],
    *methods: LoRA | Adapter | Quantization,
    key: jax.Array | None = None,
    inputs: Any = None,
) -> tuple[Adapted, dict[str, Any]]:
    """Return the adapted module and its variables, {"params": ..., "lora" or "adapter": ...}.

    Args:
        module: any Linen module.
        params: its "params" collection.
        methods: `LoRA(...)` or `Adapter(kind, targets=...)`, `Quantization("nf4-dq")`, or one of
            the former two with it.
        key: for initialisation; the default is `jax.random.key(0)`.
        inputs: what `module.apply` takes after the variables (an array, a tuple, or a dict of named
            arguments); only shapes are used, by the trace that finds the layers. Without it, calls
            that the parameters suggest are tried.

    Returns:
        The adapted module, whose `adapted.apply(variables, ...)` is differentiable in the
        variables, and these: float32 leaves under the module's own names, with a leading layer
        axis in a stack.
        "params": the same, or with 4-bit kernels.
        "lora": lora_A [in, R] and lora_B [R, out] of each layer. A is kaiming-uniform and B zero,
        of an embedding A zero and B normal, as in PEFT: it starts equal to the base.
        "adapter": adapter_down {kernel [D, W], bias [W]} and adapter_up {kernel [W, E], bias [E]}
        of each module with an output y [..., E], W = E / reduction_factor: y becomes y + A(y)
        ("houlsby", https://arxiv.org/abs/1902.00751) or, of its first argument x, y + A(x)
        ("parallel", https://arxiv.org/abs/2110.04366). With the default init_weights it starts
        equal to the base.

    Raises:
        UserError: for a target that matches nothing, and for whatever is not supported here.
    """
    check_module(module)
    lora, adapter, quantization = _sorted(methods)
    flat = flatten(params)
    held = [path for path in flat if path.endswith(("lora_A", "lora_B"))]
    if held:
        raise UserError(f"These parameters hold LoRA factors already ('{held[0]}').")
    if lora is not None:
        check_supported(lora)
    if adapter is not None:
        check_adapter(adapter)
    found = look(module, params, flat, inputs)
    layers = tuple(chosen(found.layers.values(), lora.targets)) if lora else ()
    sites = chosen_sites(found.sites, adapter) if adapter else ()
    made: dict[str, Any] = {}
    key = jax.random.key(0) if key is None else key
    if lora is not None:
        warn_without_dropout(
            "LoRA", lora.dropout, [layer.name for layer in layers if not layer.takes_dropout]
        )
        made[LORA] = _fresh(layers, lora.rank, key)
    if adapter is not None:
        warn_without_dropout(
            "adapter", adapter.dropout, [site.name for site in sites if not site.takes_dropout]
        )
        shapes = {p: shape for site in sites for p, shape in site_shapes(site, adapter).items()}
        made[ADAPTER] = unflatten(fresh(adapter, shapes, key))
    quantized = [
        one
        for one in found.layers.values()
        if isinstance(one, Layer) and isinstance(flat[one.leaf], FourBit)
    ]
    if quantization is not None:
        new = _quantized(found.layers.values(), flat, quantization)
        flat = flat | {layer.leaf: leaf for layer, leaf in new.items()}
        quantized += new
    return (
        Adapted(module, lora, layers, tuple(quantized), adapter, sites),
        {"params": unflatten(flat), **made},
    )


def _sorted(methods: tuple) -> tuple[LoRA | None, Adapter | None, Quantization | None]:
    """Return the methods by their kind, or raise `UserError`."""
    held = {type(method): method for method in methods}
    refuse(
        (
            not methods or len(held) < len(methods) or held.keys() - {LoRA, Adapter, Quantization},
            f"adapt was given the methods ({', '.join(map(repr, methods))}); expected LoRA(...) or "
            f"Adapter(...), Quantization('nf4-dq'), or one of each.",
        ),
        (
            LoRA in held and Adapter in held,
            "adapt was given a LoRA and an Adapter; a run trains one of the two. Leave one out, or "
            "adapt with LoRA, merge, and adapt the result with the Adapter.",
        ),
    )
    return held.get(LoRA), held.get(Adapter), held.get(Quantization)


def check_module(module: Any) -> None:
    if isinstance(module, Adapted):
        raise UserError(
            "This module is adapted already. Give adapt the plain one, `adapted.module`, and all "
            "methods at once."
        )
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise UserError(f"adapt was given the class {module.__name__}; give an instance of it.")
    if not isinstance(module, nn.Module):
        name = type(module).__name__
        if any(cls.__module__.startswith("flax.nnx") for cls in type(module).__mro__):
            raise UserError(nnx_text(name))
        raise UserError(
            f"adapt takes a flax.linen module; this is a {name}. For this library's own models use "
            f"add_lora."
        )


def check_supported(lora: LoRA) -> None:
    """Raise `UserError` for what LoRA on foreign modules lacks."""
    check_numbers(lora)
    check_lacking(
        lora,
        dora="DoRA",
        modules_to_save="saving further modules in full (train them as leaves of 'params')",
        components="looking into components of a vision-language model",
        rank_pattern="a rank that differs from layer to layer",
        alpha_pattern="an alpha that differs from layer to layer",
        layers_to_transform="choosing layers by number (a regex of targets can)",
        layers_pattern="choosing layers by number (a regex of targets can)",
        exclude_modules="leaving modules out (a regex of targets can)",
        bias="training biases beside LoRA (train them as leaves of 'params')",
        init="a start other than PEFT's usual one",
    )


def _fresh(layers: tuple[Layer, ...], rank: int, key: jax.Array) -> dict[str, Any]:
    made: dict[str, jax.Array] = {}
    for layer, one in zip(layers, jax.random.split(key, len(layers)), strict=True):
        made |= usual_start(one, layer.matrices(rank), layer.weight == "embedding")
    return unflatten(made)


def _quantized(
    found: Collection[Layer | Other], flat: Mapping[str, Any], method: Quantization
) -> dict[Layer, FourBit]:
    """Return {layer: its 4-bit leaf} of the linear layers that are dense, but for `skip`."""
    if method.components != Quantization(method.storage).components:
        raise UserError(
            f"Quantization has components={method.components!r}, which a foreign module has not. "
            f"Leave it out; layers that stay dense are named in skip."
        )
    if method.storage not in NAMES:
        raise UserError(
            f"Quantization has the storage {method.storage!r}{nearest(method.storage, NAMES)}; "
            f"expected one of {', '.join(NAMES)}."
        )
    skipped: set[str] = set()
    for name in method.skip:
        with explained(UserError, lambda error: f"In Quantization.skip: {error}"):
            skipped |= {layer.path for layer in chosen(found, (name,))}
    layers = [layer for layer in chosen(found, "all-linear") if layer.path not in skipped]
    for layer in layers:
        if layer.stack is not None and layer.stack.axis != 0:
            raise UserError(
                f"The layers of '{layer.name}' are stacked along axis {layer.stack.axis}; 4-bit "
                f"codes need them along axis 0: nn.scan(..., variable_axes={{'params': 0}}). Or "
                f"name it in Quantization.skip."
            )
    format, double, block = NAMES[method.storage]
    dense_layers = [layer for layer in layers if not isinstance(flat[layer.leaf], FourBit)]
    return {
        layer: quantize(
            format, layer.matrix(unboxed(flat[layer.leaf])), block, double, f"'{layer.leaf}'"
        )
        for layer in dense_layers
    }


def merge(
    model: Model | Adapted, params: Mapping[str, Any], requantize: bool = False
) -> dict[str, Any]:
    """Return a new tree without LoRA whose outputs equal the adapted ones.

    See `adapters.lora.merge` for a `Model`. Of a foreign module that `adapt` returned, `params` are
    its variables, {"params": ..., "lora": ...}, and the result is for its own `apply`: no LoRA, and
    nothing in 4 bits. Sums are formed in float32 and stored in the weight's dtype; a 4-bit kernel
    becomes dense, in the dtype that was quantized.
    """
    if isinstance(model, Model):
        return merge_lora(model, params, requantize)
    adapted, variables = model, params
    refuse(
        (
            requantize,
            "requantize=True keeps 4-bit kernels, which a Linen module cannot apply by itself. "
            "Merge without it, and give the result to adapt with a Quantization.",
        ),
        (
            adapted.adapter is not None,
            "This module has bottleneck adapters, which no weight can stand for: between their two "
            "layers is a non-linearity. Keep them beside the parameters: save_adapter writes them.",
        ),
    )
    flat = flatten(variables["params"])
    merged = dict(flat)
    for layer in adapted.quantized:
        leaf = flat[layer.leaf]
        merged[layer.leaf] = layer.unmatrix(dense(leaf, leaf.dtype))
    for layer, (a, b) in adapted.pairs(flat, variables):
        assert adapted.lora is not None
        box, leaf = flat[layer.leaf], unboxed(flat[layer.leaf])
        weight = dense(leaf, jnp.float32)
        matrix = weight if isinstance(leaf, FourBit) else layer.matrix(weight)
        update = weight_update(a, b, adapted.lora.scale.scale(adapted.lora.rank))
        summed = layer.unmatrix(matrix + update).astype(leaf.dtype)
        is_boxed = isinstance(box, meta.AxisMetadata)
        merged[layer.leaf] = box.replace_boxed(summed) if is_boxed else summed
    return unflatten(merged)
