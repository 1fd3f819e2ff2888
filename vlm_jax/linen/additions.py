"""What is added to a layer's output, and the interceptor that adds it.

An addition is a leaf of its own beside the layer's kernel, put there for the length of one `apply`.
So `nn.scan` and `nn.vmap` slice it with the kernel, `nn.remat` and `nn.jit` carry it, whether or
not they know of any collection; and its numbers are part of its type, so that no cache of a traced
layer takes one adapter for another. Another kind of addition is one more pytree with a `change`.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.layers.linear import lora_input, lora_update, matmul
from vlm_jax.linen.layers import ATTEND, CALLS, EMBED, Product, first, product
from vlm_jax.weights import FourBit, dense

LEAF = "vlm_jax_addition"  # the leaf's name; no module of anybody's has one such
NNX = "flax.nnx."
NO_DROPOUT = "does not act on layers in an nn.scan or nn.vmap that passes no 'dropout' rng on"
GIVE_RNG = "Give that one split_rngs={'dropout': True}, or take dropout=0."


class Addition(Protocol):
    """A pytree that changes a layer's output."""

    def change(self, context: Any, args: tuple, kwargs: dict, y: Any) -> Any:
        """Return the new output, or None where this method of the layer is not known."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """LoRA: a [in, R], b [R, out] of a layer whose kernel is the matrix [in, out]."""

    a: Any
    b: Any
    scale: float
    dropout: float

    def change(self, context: Any, args: tuple, kwargs: dict, y: Any) -> Any:
        method, x = context.orig_method.func, first(args, kwargs)
        if method is EMBED:  # without dropout, as in PEFT: there is no input to drop
            low = dense(self.a, y.dtype)[x] * jnp.asarray(self.scale, y.dtype)
            return y + matmul(low, dense(self.b, y.dtype))
        if method is ATTEND:  # the tied head: x W' transposed
            low = matmul(x.astype(y.dtype), dense(self.b, y.dtype).T)
            return y + matmul(low * jnp.asarray(self.scale, y.dtype), dense(self.a, y.dtype).T)
        if method not in CALLS:
            return None
        layer = product(CALLS[method], context.module, args, kwargs)
        rows = layer.rows(jnp.asarray(x).astype(y.dtype))
        self._say_without_dropout(context.module)
        rows = lora_input(context.module, rows, self.dropout)
        return y + layer.from_rows(lora_update(rows, self.a, self.b, self.scale))

    def _say_without_dropout(self, module: nn.Module) -> None:
        if self.dropout > 0 and not module.has_rng("dropout"):
            warnings.warn(
                f"The LoRA dropout of {self.dropout} {NO_DROPOUT}: {name_of(module)}. {GIVE_RNG}",
                stacklevel=2,
            )


jax.tree_util.register_dataclass(LowRank, data_fields=["a", "b"], meta_fields=["scale", "dropout"])


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
    running: dict[int, bool] = {}  # a module at work -> whether its weights were seen to be used

    def run(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, method = context.module, context.orig_method.func
        addition: Addition | None = own(module, LEAF)
        if method in CALLS and isinstance(own(module, "kernel"), FourBit):
            y = _decoded(module, CALLS[method], args, kwargs)
            running[id(module)] = True
        else:
            y = next_method(*args, **kwargs)
        changed = None if addition is None else addition.change(context, args, kwargs, y)
        if changed is None:
            return y
        running[id(module)] = True
        return changed

    def intercept(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name == "setup":
            return next_method(*args, **kwargs)
        if type(module).__module__.startswith(NNX):
            _check_bridge(module)
        if own(module, LEAF) is None and not isinstance(own(module, "kernel"), FourBit):
            return next_method(*args, **kwargs)
        if id(module) in running:  # a method that another one of the same module calls
            return run(next_method, args, kwargs, context)
        running[id(module)] = False
        try:
            y = run(next_method, args, kwargs, context)
            used = running[id(module)]
        finally:
            del running[id(module)]
        if not used:
            raise UserError(
                f"'{name_of(module)}' is a {type(module).__name__}, whose {context.method_name} "
                f"uses its weights in a way that is not known here, so that LoRA or 4-bit weights "
                f"would do nothing. They go on nn.Dense, nn.DenseGeneral, nn.Einsum and nn.Embed, "
                f"and on subclasses that call super(). Leave it out of the targets, or build it of "
                f"these."
            )
        return y

    return intercept


def _check_bridge(module: nn.Module) -> None:
    held = module.variables.get("params", {})
    leaves = jax.tree.leaves(held, is_leaf=lambda leaf: isinstance(leaf, FourBit | LowRank))
    if any(isinstance(leaf, FourBit | LowRank) for leaf in leaves):
        raise UserError(nnx_text(name_of(module)))


def nnx_text(name: str) -> str:
    """Return the sentence that refuses NNX."""
    return (
        f"'{name}' is an NNX module: its layers are no Linen modules, so no method of theirs can "
        f"be intercepted. Adapt a Linen module: of an nnx.bridge.ToNNX give `.to_nnx__module` and "
        f"its Linen parameters; layers that are written in NNX have to be written in Linen."
    )
