"""`adapt`: LoRA and 4-bit weights on any Linen module, without a change to it."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from vlm_jax.errors import UserError, nearest
from vlm_jax.layers.linear import fresh_a, weight_update
from vlm_jax.linen.additions import GIVE_RNG, LEAF, NO_DROPOUT, LowRank, interceptor, nnx_text
from vlm_jax.linen.find import Layer, Other, joined, layers_of, unboxed
from vlm_jax.linen.targets import chosen
from vlm_jax.lora import check_numbers
from vlm_jax.methods import LoRA
from vlm_jax.quantization import NAMES, Quantization
from vlm_jax.trees import flatten, unflatten
from vlm_jax.weights import FourBit, dense
from vlm_jax.weights.quantize import quantize

LORA = "lora"  # the collection


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: hashable, so jit takes it as static
class Adapted:
    """A Linen module with an adapter beside it: `apply` is the module's, with additions.

    module: untouched. lora: what was asked for, or None. layers: those that have LoRA.
    quantized: those whose kernels are in 4 bits.
    """

    module: nn.Module
    lora: LoRA | None
    layers: tuple[Layer, ...]
    quantized: tuple[Layer, ...]

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `module.apply` returns, with LoRA; it takes all that `module.apply` takes.

        variables: {"params": ..., "lora": ...} and whatever other collections the module has. Pure
        and differentiable in "lora". LoRA's dropout acts where `rngs` has "dropout", so give that
        in training alone. Raises `UserError` for matrices of another base or rank.
        """
        rngs = kwargs.get("rngs")
        if rngs is not None and not isinstance(rngs, Mapping):  # Linen: one key for every stream
            rngs = kwargs["rngs"] = {"params": rngs, "dropout": rngs}
        dropout = rngs is not None and "dropout" in rngs
        rest = {name: value for name, value in variables.items() if name != LORA}
        params = dict(flatten(rest.get("params", {})))
        if self.lora is not None:
            params |= self._additions(params, variables, self.lora, dropout)
        with nn.intercept_methods(interceptor()):
            out = self.module.apply({**rest, "params": unflatten(params)}, *args, **kwargs)
        if kwargs.get("mutable", False) is False and not kwargs.get("capture_intermediates", False):
            return out
        result, state = out
        return result, {name: _without_additions(value) for name, value in state.items()}

    def _additions(
        self, params: Mapping[str, Any], variables: Mapping[str, Any], lora: LoRA, dropout: bool
    ) -> dict[str, LowRank]:
        """Return {path: addition} to lie beside the kernels, checked against these."""
        made = {}
        scale = lora.scale.scale(lora.rank)
        for layer, (a, b) in self.pairs(params, variables):
            if layer.stack is not None:  # sliced along the same axis as the kernel
                a, b = (jnp.moveaxis(leaf, 0, layer.stack) for leaf in (a, b))
            rate = float(lora.dropout) if dropout and layer.hears else 0.0  # else `adapt` told it
            made[joined(layer.path, LEAF)] = LowRank(a, b, scale, rate)
        return made

    def pairs(
        self, params: Mapping[str, Any], variables: Mapping[str, Any]
    ) -> list[tuple[Layer, tuple[Any, Any]]]:
        """Return each layer with its A and B, checked; params: by path."""
        if self.lora is None:
            return []
        if LORA not in variables:
            raise UserError(
                f"The variables have no collection '{LORA}', only {', '.join(variables)}. Give "
                f"{{'params': ..., '{LORA}': ...}}, as adapt and load_lora return them; for the "
                f"base alone call the module's own apply."
            )
        matrices, rank = flatten(variables[LORA]), self.lora.rank
        wanted = {joined(layer.path, f"lora_{x}") for layer in self.layers for x in "AB"}
        for path in matrices.keys() ^ wanted:
            where = "lack" if path in wanted else "hold"
            raise UserError(
                f"The LoRA matrices {where} '{path}', unlike the adapted module, whose targets are "
                f"{', '.join(layer.name for layer in self.layers[:6])}"
                f"{' ...' if len(self.layers) > 6 else ''}. They were made for another base or for "
                f"other targets: take those that came with this module from adapt or load_lora."
            )
        pairs = []
        for layer in self.layers:
            if layer.leaf not in params:
                raise UserError(
                    f"The parameters hold no '{layer.leaf}', which has LoRA. Are they another "
                    f"module's?"
                )
            a, b = (unboxed(matrices[joined(layer.path, f"lora_{x}")]) for x in "AB")
            inside, outside = layer.size
            expected = (*layer.layers, inside, rank), (*layer.layers, rank, outside)
            if (a.shape, b.shape) != expected:
                raise UserError(
                    f"The LoRA matrices of '{layer.name}' are {list(a.shape)} and {list(b.shape)}; "
                    f"rank {rank} and its {layer.weight} ask for {list(expected[0])} and "
                    f"{list(expected[1])}. They were made for another base or another rank."
                )
            pairs.append((layer, (a, b)))
        return pairs


def _without_additions(collection: Any) -> Any:
    if not isinstance(collection, Mapping):
        return collection
    flat = flatten(collection)
    if not any(path.split("/")[-1] == LEAF for path in flat):
        return collection
    return unflatten({path: x for path, x in flat.items() if path.split("/")[-1] != LEAF})


def adapt(
    module: nn.Module,
    params: Mapping[str, Any],
    *methods: LoRA | Quantization,
    key: jax.Array | None = None,
    inputs: Any = None,
) -> tuple[Adapted, dict[str, Any]]:
    """Return the adapted module and its variables, {"params": ..., "lora": ...}.

    module: any Linen module. params: its "params" collection. methods: `LoRA(...)`,
    `Quantization("nf4-dq")`, or both. The variables hold A [in, R] and B [R, out], float32, under
    the module's own names, a stack's with a leading layer axis, and the same params, or with
    4-bit kernels; `adapted.apply(variables, ...)` is differentiable in `variables["lora"]`.
    A is kaiming-uniform and B zero, of an embedding A zero and B normal, as in PEFT: it starts
    equal to the base. key: for these (the default is `jax.random.key(0)`).
    inputs: what the module is called with behind the variables (an array, a tuple, or a dict of
    named arguments), of which shapes alone are used: a call is traced to see what each layer is.
    Without, calls that the parameters suggest are tried.
    Raises `UserError` for a target that matches nothing, and for what cannot be done here.
    """
    check_module(module)
    unknown = [method for method in methods if not isinstance(method, LoRA | Quantization)]
    kinds = [type(method) for method in methods]
    if unknown or not methods or len(set(kinds)) < len(kinds):
        raise UserError(
            f"adapt was given the methods ({', '.join(map(repr, methods))}); expected LoRA(...), "
            f"Quantization('nf4-dq'), or one of each."
        )
    flat = flatten(params)
    held = [path for path in flat if path.endswith(("lora_A", "lora_B"))]
    if held:
        raise UserError(f"These parameters hold LoRA matrices already ('{held[0]}').")
    found = layers_of(module, params, flat, inputs)
    lora = next((method for method in methods if isinstance(method, LoRA)), None)
    layers: tuple[Layer, ...] = ()
    if lora is not None:
        check_supported(lora)
        layers = tuple(chosen(found, lora.targets))
        tell_dropout(layers, lora)
    before = {one.path: one for one in found if isinstance(one, Layer)}
    quantized = [one for one in before.values() if isinstance(flat[one.leaf], FourBit)]
    for method in methods:
        if isinstance(method, Quantization):
            wanted = _quantized_layers(found, flat, method)
            flat = flat | {layer.leaf: _quantized(layer, flat, method) for layer in wanted}
            quantized += wanted
    variables: dict[str, Any] = {"params": unflatten(flat)}
    if lora is not None:
        key = jax.random.key(0) if key is None else key
        variables[LORA] = _fresh(layers, lora.rank, key)
    adapted = Adapted(module, lora, layers, tuple(quantized))
    return adapted, variables


def check_module(module: Any) -> None:
    if isinstance(module, Adapted):
        raise UserError(
            "This module is adapted already. Give adapt the plain one, `adapted.module`, and all "
            "methods at once."
        )
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise UserError(f"adapt was given the class {module.__name__}; give an instance of it.")
    if isinstance(module, nn.Module):
        return
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
    default = LoRA()
    lacking = {
        "dora": "DoRA",
        "modules_to_save": "saving further modules in full (train them as leaves of 'params')",
        "components": "looking into components of a vision-language model",
        "rank_pattern": "a rank that differs from layer to layer",
        "alpha_pattern": "an alpha that differs from layer to layer",
        "layers_to_transform": "choosing layers by number (a regex of targets can)",
        "layers_pattern": "choosing layers by number (a regex of targets can)",
        "exclude_modules": "leaving modules out (a regex of targets can)",
        "bias": "training biases beside the matrices (train them as leaves of 'params')",
        "init": "a start other than PEFT's usual one",
    }
    for name, what in lacking.items():
        if getattr(lora, name) != getattr(default, name):
            raise UserError(
                f"LoRA has {name}={getattr(lora, name)!r}, but {what} is not supported by adapt. "
                f"Leave it out."
            )


def tell_dropout(layers: tuple[Layer, ...], lora: LoRA) -> None:
    """Warn of layers on which dropout cannot act."""
    deaf = [layer.name for layer in layers if not layer.hears]
    if lora.dropout > 0 and deaf:
        warnings.warn(
            f"The LoRA dropout of {lora.dropout} {NO_DROPOUT}: {', '.join(deaf)}. {GIVE_RNG}",
            stacklevel=3,
        )


def _fresh(layers: tuple[Layer, ...], rank: int, key: jax.Array) -> dict[str, Any]:
    made = {}
    for layer, one in zip(layers, jax.random.split(key, len(layers)), strict=True):
        (inside, outside), lead = layer.size, layer.layers
        a, b = (*lead, inside, rank), (*lead, rank, outside)
        if layer.weight == "embedding":  # A's rows are looked up: it starts at zero instead
            made[joined(layer.path, "lora_A")] = jnp.zeros(a, jnp.float32)
            made[joined(layer.path, "lora_B")] = jax.random.normal(one, b, jnp.float32)
        else:
            made[joined(layer.path, "lora_A")] = fresh_a(one, a)
            made[joined(layer.path, "lora_B")] = jnp.zeros(b, jnp.float32)
    return unflatten(made)


def _quantized_layers(
    found: list[Layer | Other], flat: Mapping[str, Any], method: Quantization
) -> list[Layer]:
    """Return the linear layers that become 4-bit: all but those of `skip`."""
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
        try:
            skipped |= {layer.path for layer in chosen(found, (name,))}
        except UserError as error:
            raise UserError(f"In Quantization.skip: {error}") from error
    layers = [layer for layer in chosen(found, "all-linear") if layer.path not in skipped]
    for layer in layers:
        if layer.stack not in (None, 0):
            raise UserError(
                f"The layers of '{layer.name}' are stacked along axis {layer.stack}; 4-bit codes "
                f"need them along axis 0: nn.scan(..., variable_axes={{'params': 0}}). Or name it "
                f"in Quantization.skip."
            )
    return [layer for layer in layers if not isinstance(flat[layer.leaf], FourBit)]


def _quantized(layer: Layer, flat: Mapping[str, Any], method: Quantization) -> FourBit:
    storage = NAMES[method.storage]
    matrix = layer.matrix(unboxed(flat[layer.leaf]))
    return quantize(storage.format, matrix, storage.block, storage.double, f"'{layer.leaf}'")


def merge_adapted(
    adapted: Adapted, variables: Mapping[str, Any], requantize: bool = False
) -> dict[str, Any]:
    """Return params for the module's own `apply`: no LoRA, and nothing in 4 bits.

    variables: {"params": ..., "lora": ...}. Sums are formed in float32 and stored in the weight's
    dtype; a 4-bit kernel becomes dense, in the dtype that was quantized.
    """
    if requantize:
        raise UserError(
            "requantize=True keeps 4-bit kernels, which a Linen module cannot apply by itself. "
            "Merge without it, and give the result to adapt with a Quantization."
        )
    flat = flatten(variables["params"])
    merged = dict(flat)
    for layer in adapted.quantized:
        leaf = flat[layer.leaf]
        merged[layer.leaf] = layer.unmatrix(dense(leaf, leaf.dtype))
    if adapted.lora is not None:
        lora = adapted.lora
        scale = lora.scale.scale(lora.rank)
        for layer, (a, b) in adapted.pairs(flat, variables):
            box, leaf = flat[layer.leaf], unboxed(flat[layer.leaf])
            matrix = dense(leaf, jnp.float32)
            if not isinstance(leaf, FourBit):
                matrix = layer.matrix(matrix)
            summed = layer.unmatrix(matrix + weight_update(a, b, scale)).astype(leaf.dtype)
            boxed = isinstance(box, meta.AxisMetadata)
            merged[layer.leaf] = box.replace_boxed(summed) if boxed else summed
    return unflatten(merged)
