"""The interceptor: Linen's layers as matrix products, and additions to their outputs.

An addition is a leaf of its own beside the layer's kernel, put there for the length of one `apply`.
So `nn.scan` and `nn.vmap` slice it with the kernel, `nn.remat` and `nn.jit` carry it, whether or
not they know of any collection; and its numbers are part of its type, so that no cache of a traced
layer takes one adapter for another. Another kind of addition is one more pytree with a `change`.
"""

import dataclasses
import math
import string
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from opt_einsum.parser import parse_einsum_input

from vlm_jax.errors import UserError
from vlm_jax.linen.parts import as_weight
from vlm_jax.models.layers.dropout import dropped
from vlm_jax.models.layers.linear import lora_update, matmul
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit, dense


@dataclasses.dataclass(frozen=True)
class Product:
    """y = einsum(x, kernel): the letters of the axes of each, and the kernel's shape."""

    x: str
    kernel: str
    y: str
    shape: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The kernel's axes that are summed."""
        return tuple(i for i, axis in enumerate(self.kernel) if axis not in self.y)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The kernel's axes that x has not."""
        return tuple(i for i, axis in enumerate(self.kernel) if axis not in self.x)

    @property
    def fault(self) -> str | None:
        """Why this is no product of two matrices, or None."""
        both = ", ".join(axis for axis in self.kernel if axis in self.x and axis in self.y)
        repeated = any(len(set(axes)) < len(axes) for axes in (self.x, self.kernel, self.y))
        faults = {
            f"it has a kernel of its own for each index of a batch axis ({both})": both,
            "it sums over an axis that its kernel alone has": set(self.kernel) - {*self.x, *self.y},
            "it takes a diagonal": repeated,
            "it sums over no axis, or over all of its kernel's": not (self.inputs and self.outputs),
        }
        return next((fault for fault, applies in faults.items() if applies), None)

    def rows(self, x: jax.Array) -> jax.Array:
        """Return x as [rows ..., in]."""
        summed = "".join(self.kernel[i] for i in self.inputs)
        kept = "".join(axis for axis in self.x if axis in self.y)
        x = jnp.einsum(f"{self.x}->{kept}{summed}", x)
        return x.reshape(*x.shape[: len(kept)], math.prod(x.shape[len(kept) :]))

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """Return [rows ..., out] as y."""
        made = "".join(self.kernel[i] for i in self.outputs)
        kept = "".join(axis for axis in self.x if axis in self.y)
        sizes = (self.shape[i] for i in self.outputs)
        return jnp.einsum(f"{kept}{made}->{self.y}", rows.reshape(*rows.shape[:-1], *sizes))


def _dense(module: nn.Dense, x: jax.Array) -> Product:
    rows = string.ascii_letters[: x.ndim - 1]
    return Product(rows + "Y", "YZ", rows + "Z", (x.shape[-1], module.features))


def _dense_general(module: nn.DenseGeneral, x: jax.Array) -> Product:
    def as_tuple(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    features = as_tuple(module.features)
    axes = string.ascii_letters[: x.ndim]
    made = string.ascii_letters[x.ndim : x.ndim + len(features)]
    batch, summed = (  # the kernel has them sorted, whatever order they are given in
        sorted(axis % x.ndim for axis in as_tuple(given))
        for given in (module.batch_dims, module.axis)
    )
    lead = "".join(axes[i] for i in batch)
    rest = "".join(axes[i] for i in range(x.ndim) if i not in batch and i not in summed)
    kernel = lead + "".join(axes[i] for i in summed) + made
    shape = tuple(x.shape[i] for i in (*batch, *summed)) + features
    return Product(axes, kernel, lead + rest + made, shape)


def _einsum(module: nn.Einsum, x: jax.Array, einsum_str: str | None = None) -> Product:
    shape = tuple(module.shape)
    text = (module.einsum_str or einsum_str or "").replace(" ", "")
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    operands, y, _ = parse_einsum_input((text, jax.ShapeDtypeStruct(x.shape, x.dtype), kernel))
    left, right = operands.split(",")
    return Product(left, right, y, shape)


# How a linear layer multiplies, from the module and the arguments of its call.
LINEAR: dict[type[nn.Module], Callable[..., Product]] = {
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Einsum: _einsum,
}


def function(method: Any) -> Any:
    """Return the function that `orig_method.func` of an interceptor's context is."""
    return method.__wrapped__


# The same by the very function that runs: a subclass that calls super() is met there, once.
CALLS: dict[Any, type[nn.Module]] = {function(cls.__call__): cls for cls in LINEAR}
EMBED, ATTEND = function(nn.Embed.__call__), function(nn.Embed.attend)


def product(layer: type[nn.Module], module: nn.Module, args: tuple, kwargs: dict) -> Product:
    """Return how this call of a linear layer multiplies; layer: its entry of `LINEAR`."""
    rest = {name: value for name, value in kwargs.items() if name != "inputs"}
    return LINEAR[layer](module, jnp.asarray(first(args, kwargs)), *args[1:], **rest)


def first(args: tuple, kwargs: dict) -> Any:
    """Return the array that a layer was called with."""
    return args[0] if args else kwargs["query" if "query" in kwargs else "inputs"]


LEAF = "vlm_jax_addition"  # the leaf's name, which no module has
NNX = "flax.nnx."
UNKNOWN = (
    "uses its weights in a way that is not known here, so that LoRA or 4-bit weights would do "
    "nothing. They are for nn.Dense, nn.DenseGeneral, nn.Einsum and nn.Embed, and for subclasses "
    "that call super(). Leave it out of the targets, or build it of these."
)


class Addition(Protocol):
    """A pytree that changes a layer's output. idle: what is wrong where it changed nothing."""

    idle: ClassVar[str]

    def change(self, y: Any, args: tuple, kwargs: dict, context: Any, within: list[str]) -> Any:
        """Return the new output, or None where this method of the layer is not one to change.

        Args:
            y: the output.
            args, kwargs, context: of the call, as Linen gives them to an interceptor.
            within: the methods of the same module that it runs inside.
        """


@dataclasses.dataclass(frozen=True)
class LowRank:
    """LoRA: a [in, R], b [R, out] of a layer whose kernel is the matrix [in, out].

    rng: a key of `layers.dropout.KEEP`.
    """

    idle: ClassVar[str] = UNKNOWN

    a: Any
    b: Any
    scale: float
    dropout: float
    rng: str

    def change(self, y: Any, args: tuple, kwargs: dict, context: Any, within: list[str]) -> Any:
        module, method = context.module, context.orig_method.func
        if method not in (EMBED, ATTEND, *CALLS):
            return None
        x = first(args, kwargs)
        if method is EMBED:  # without dropout, as in PEFT: there is no input to drop
            low = dense(self.a, y.dtype)[x] * jnp.asarray(self.scale, y.dtype)
            return y + matmul(low, dense(self.b, y.dtype))
        if method is ATTEND:  # the tied head: x W' transposed
            low = matmul(x.astype(y.dtype), dense(self.b, y.dtype).T)
            return y + matmul(low * jnp.asarray(self.scale, y.dtype), dense(self.a, y.dtype).T)
        layer = product(CALLS[method], module, args, kwargs)
        rows = layer.rows(jnp.asarray(x).astype(y.dtype))
        if not module.has_rng("dropout"):
            warn_without_dropout("LoRA", self.dropout, [name_of(module)])
        rows = dropped(module, rows, self.dropout, self.rng)
        return y + layer.from_rows(lora_update(rows, self.a, self.b, self.scale))


jax.tree_util.register_dataclass(
    LowRank, data_fields=["a", "b"], meta_fields=["scale", "dropout", "rng"]
)


def warn_without_dropout(what: str, rate: float, names: Sequence[str]) -> None:
    """Warn of modules and layers, by name, on which a dropout of this rate cannot act."""
    if rate > 0 and names:
        warnings.warn(
            f"The {what} dropout of {rate} does not act on layers in an nn.scan or nn.vmap that "
            f"passes no 'dropout' rng on: {', '.join(names)}. Give that one "
            f"split_rngs={{'dropout': True}}, or set dropout=0.",
            stacklevel=3,
        )


def name_of(module: nn.Module) -> str:
    """Return a module's dotted name."""
    return ".".join(module.path) or type(module).__name__


def own(module: nn.Module, name: str) -> Any:
    """Return a leaf beside a module's parameters, or None."""
    return None if module.scope is None else module.scope.get_variable("params", name)


def _decoded(module: nn.Module, layer: type[nn.Module], args: tuple, kwargs: dict) -> Any:
    """Return the output of a linear layer whose kernel is in 4 bits.

    Linen's own `self.param` refuses such a leaf. The backward pass decodes again, and keeps no
    dense weight.
    """
    how = product(layer, module, args, kwargs)

    params = {name: leaf for name, leaf in module.variables["params"].items() if name != LEAF}
    given, method = first(args, kwargs), cast(Any, layer.__call__)
    dtype = getattr(module, "dtype", None) or jnp.result_type(given, params["kernel"].dtype)
    more = {key: value for key, value in kwargs.items() if value is not given}

    @jax.checkpoint
    def run(x: Any, params: dict[str, Any]) -> Any:
        kernel = as_weight(dense(params["kernel"], dtype), how.shape, (*how.inputs, *how.outputs))
        variables = {"params": {**params, "kernel": kernel}}
        return module.clone(parent=None).apply(variables, x, *args[1:], method=method, **more)

    return run(given, params)


def interceptor() -> Callable[..., Any]:
    """Return a method interceptor for one `apply`: decodes 4-bit kernels, makes additions.

    Raises `UserError` where a layer with an addition, or with a 4-bit kernel, is none that is
    known: nothing is left out silently.
    """
    # Modules at work, by path: the methods that run, and what of them was not seen to be used yet.
    running: dict[tuple[str, ...], tuple[list[str], set[str]]] = {}

    def intercept(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, function = context.module, context.orig_method.func
        if context.method_name == "setup":
            return next_method(*args, **kwargs)
        if type(module).__module__.startswith(NNX):
            held = flatten(module.variables.get("params", {})).items()
            if any(path.split("/")[-1] == LEAF or isinstance(x, FourBit) for path, x in held):
                raise UserError(nnx_text(name_of(module)))
        addition: Addition | None = own(module, LEAF)
        codes = isinstance(own(module, "kernel"), FourBit)
        if addition is None and not codes:
            return next_method(*args, **kwargs)
        path = module.scope.path
        outermost = path not in running  # else: a method that another one of the same module calls
        needed = {addition.idle} if addition is not None else set()
        methods, unused = running.setdefault(path, ([], needed | ({UNKNOWN} if codes else set())))
        methods.append(context.method_name)
        try:
            if codes and function in CALLS:
                y = _decoded(module, CALLS[function], args, kwargs)
                unused.discard(UNKNOWN)
            else:
                y = next_method(*args, **kwargs)
            if addition is not None:
                changed = addition.change(y, args, kwargs, context, methods[:-1])
                if changed is not None:
                    y = changed
                    unused.discard(addition.idle)
        finally:
            methods.pop()
            if outermost:
                del running[path]
        for why in unused if outermost else ():
            raise UserError(
                f"'{name_of(module)}' is a {type(module).__name__}, whose {context.method_name} "
                f"{why}"
            )
        return y

    return intercept


def nnx_text(name: str) -> str:
    """Return the sentence that refuses NNX."""
    return (
        f"'{name}' is an NNX module: its layers are not Linen modules, so no method of theirs can "
        f"be intercepted. Adapt a Linen module: of an nnx.bridge.ToNNX give `.to_nnx__module` and "
        f"its Linen parameters; layers that are written in NNX have to be written in Linen."
    )
