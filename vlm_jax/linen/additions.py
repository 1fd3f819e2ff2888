"""What is added to a layer's output, and the interceptor that adds it.

An addition is a leaf of its own beside the layer's kernel, put there for the length of one `apply`.
So `nn.scan` and `nn.vmap` slice it with the kernel, `nn.remat` and `nn.jit` carry it, whether or
not they know of any collection; and its numbers are part of its type, so that no cache of a traced
layer takes one adapter for another. Another kind of addition is one more pytree with a `change`.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.layers.linear import dropped, lora_update, matmul
from vlm_jax.linen.layers import ATTEND, CALLS, EMBED, Product, first, product
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit, dense

LEAF = "vlm_jax_addition"  # the leaf's name; no module of anybody's has one such
NNX = "flax.nnx."
UNKNOWN = (
    "uses its weights in a way that is not known here, so that LoRA or 4-bit weights would do "
    "nothing. They go on nn.Dense, nn.DenseGeneral, nn.Einsum and nn.Embed, and on subclasses that "
    "call super(). Leave it out of the targets, or build it of these."
)


class Call(NamedTuple):
    """A call of a module's method. within: the methods of the same module that it runs inside."""

    context: Any  # Linen's, of an interceptor
    args: tuple
    kwargs: dict
    within: tuple[str, ...]


class Addition(Protocol):
    """A pytree that changes a layer's output. idle: what is wrong where it changed nothing."""

    idle: ClassVar[str]

    def change(self, call: Call, y: Any) -> Any:
        """Return the new output, or None where this method of the layer is not one to change."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """LoRA: a [in, R], b [R, out] of a layer whose kernel is the matrix [in, out]."""

    idle: ClassVar[str] = UNKNOWN

    a: Any
    b: Any
    scale: float
    dropout: float

    def change(self, call: Call, y: Any) -> Any:
        module, method = call.context.module, call.context.orig_method.func
        if method not in (EMBED, ATTEND, *CALLS):
            return None
        x = first(call.args, call.kwargs)
        if method is EMBED:  # without dropout, as in PEFT: there is no input to drop
            low = dense(self.a, y.dtype)[x] * jnp.asarray(self.scale, y.dtype)
            return y + matmul(low, dense(self.b, y.dtype))
        if method is ATTEND:  # the tied head: x W' transposed
            low = matmul(x.astype(y.dtype), dense(self.b, y.dtype).T)
            return y + matmul(low * jnp.asarray(self.scale, y.dtype), dense(self.a, y.dtype).T)
        layer = product(CALLS[method], module, call.args, call.kwargs)
        rows = layer.rows(jnp.asarray(x).astype(y.dtype))
        if self.dropout > 0 and not module.has_rng("dropout"):
            tell_no_dropout("LoRA", self.dropout, [name_of(module)])
        rows = dropped(module, rows, self.dropout)
        return y + layer.from_rows(lora_update(rows, self.a, self.b, self.scale))


jax.tree_util.register_dataclass(LowRank, data_fields=["a", "b"], meta_fields=["scale", "dropout"])


def tell_no_dropout(what: str, rate: float, names: Sequence[str]) -> None:
    """Warn of modules on which dropout cannot act."""
    warnings.warn(
        f"The {what} dropout of {rate} does not act on layers in an nn.scan or nn.vmap that passes "
        f"no 'dropout' rng on: {', '.join(names)}. Give that one split_rngs={{'dropout': True}}, "
        f"or take dropout=0.",
        stacklevel=4,
    )


def tell_deaf(what: str, rate: float, parts: Iterable[Any]) -> None:
    """Warn of modules and layers on which dropout cannot act."""
    deaf = [part.name for part in parts if not part.hears]
    if rate > 0 and deaf:
        tell_no_dropout(what, rate, deaf)


def name_of(module: nn.Module) -> str:
    """Return a module's dotted name."""
    return ".".join(module.path) or type(module).__name__


def own(module: nn.Module, name: str) -> Any:
    """Return a leaf beside a module's parameters, or None."""
    if module.scope is None or not module.scope.has_variable("params", name):
        return None
    return module.scope.get_variable("params", name)


def _decoded(module: nn.Module, layer: type[nn.Module], args: tuple, kwargs: dict) -> Any:
    """Return the output of a linear layer whose kernel is in 4 bits.

    Linen's own `self.param` refuses such a leaf. The backward pass decodes again, and keeps no
    dense weight.
    """
    how = product(layer, module, args, kwargs)
    leaf, bias = own(module, "kernel"), own(module, "bias")
    given, rest = first(args, kwargs), args[1:]
    dtype = getattr(module, "dtype", None) or jnp.result_type(given, leaf.dtype)
    more = {key: value for key, value in kwargs.items() if value is not given}

    @jax.checkpoint
    def run(x: Any, leaf: FourBit, bias: Any) -> Any:
        variables = {"kernel": from_matrix(dense(leaf, dtype), how)}
        if bias is not None:
            variables["bias"] = bias
        plain = module.clone(parent=None)
        method: Any = layer.__call__
        return plain.apply({"params": variables}, x, *rest, method=method, **more)

    return run(given, leaf, bias)


def from_matrix(matrix: jax.Array, how: Product) -> jax.Array:
    """Return a matrix [in, out] as the layer's own kernel."""
    order = (*how.inputs, *how.outputs)
    back = sorted(range(len(order)), key=order.__getitem__)
    return matrix.reshape([how.shape[i] for i in order]).transpose(back)


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
            _check_bridge(module)
        addition: Addition | None = own(module, LEAF)
        codes = isinstance(own(module, "kernel"), FourBit)
        if addition is None and not codes:
            return next_method(*args, **kwargs)
        path = module.scope.path
        outermost = path not in running  # else: a method that another one of the same module calls
        needed = {addition.idle} if addition is not None else set()
        methods, unused = running.setdefault(path, ([], needed | ({UNKNOWN} if codes else set())))
        call = Call(context, args, kwargs, tuple(methods))
        methods.append(context.method_name)
        try:
            if codes and function in CALLS:
                y = _decoded(module, CALLS[function], args, kwargs)
                unused.discard(UNKNOWN)
            else:
                y = next_method(*args, **kwargs)
            changed = None if addition is None else addition.change(call, y)
            if addition is not None and changed is not None:
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


def _check_bridge(module: nn.Module) -> None:
    for path, leaf in flatten(module.variables.get("params", {})).items():
        if path.split("/")[-1] == LEAF or isinstance(leaf, FourBit):
            raise UserError(nnx_text(name_of(module)))


def nnx_text(name: str) -> str:
    """Return the sentence that refuses NNX."""
    return (
        f"'{name}' is an NNX module: its layers are no Linen modules, so no method of theirs can "
        f"be intercepted. Adapt a Linen module: of an nnx.bridge.ToNNX give `.to_nnx__module` and "
        f"its Linen parameters; layers that are written in NNX have to be written in Linen."
    )
