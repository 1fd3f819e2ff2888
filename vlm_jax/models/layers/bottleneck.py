"""Bottleneck adapters beside a block's sums: nothing is computed where the tree holds none.

Houlsby: https://arxiv.org/abs/1902.00751. Pfeiffer: https://arxiv.org/abs/2005.00247. Parallel:
https://arxiv.org/abs/2110.04366. Letters: D width of the block, W of the bottleneck.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.dropout import dropped
from vlm_jax.models.layers.linear import along_last, matmul
from vlm_jax.models.layers.norm import layer_norm

# What stands after a block's attention and after its MLP, as the `adapters` library calls it.
ATTENTION, OUTPUT = "attention_adapters", "output_adapters"
LEAF = re.compile(rf".*/(?:{ATTENTION}|{OUTPUT})/(adapter_(?:down|up|norm_before)/.*)")
NORM_EPSILON = 1e-5


class Kind(NamedTuple):
    """Where adapters of a kind stand, what they read (see `Bottleneck`), and its defaults."""

    places: tuple[str, ...]
    reads: str
    non_linearity: str
    reduction_factor: float
    scaling: float


KINDS = {
    "houlsby": Kind((ATTENTION, OUTPUT), "output", "swish", 16, 1.0),
    "pfeiffer": Kind((OUTPUT,), "sum", "relu", 16, 1.0),
    "parallel": Kind((OUTPUT,), "input", "relu", 2, 4.0),
}
# The `adapters` library's names of them.
LIBRARY_NAMES = {"double_seq_bn": "houlsby", "seq_bn": "pfeiffer", "par_bn": "parallel"}


def is_adapter(path: str) -> bool:
    """Return whether a leaf is a bottleneck adapter's."""
    return LEAF.fullmatch(path) is not None


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What the forward pass needs to know of an adapter beside its matrices.

    reads: "output" of the attention or MLP before it is added to the block's input, their "sum",
    or the block's "input" to that part, before its norm. rng: a key of `dropout.KEEP`.
    """

    reads: str
    non_linearity: str
    scaling: float = 1.0
    dropout: float = 0.0
    rng: str = "hashed"


def bottleneck(
    module: nn.Module, form: Bottleneck, leaves: Mapping[str, Any], z: jax.Array, dtype: Any
) -> jax.Array:
    """Return A(z) = scaling * up(f(down(z))), [..., D] to [..., E], computed in `dtype`.

    leaves: adapter_down {kernel [D, W], bias [W]}, adapter_up {kernel [W, E], bias [E]} and, where
    A norms what it reads, adapter_norm_before {scale [D], bias [D]}. module: whose "dropout" rng,
    where there is one, drops from what A gives.
    """
    norm = leaves.get("adapter_norm_before")
    if norm is not None:
        z = layer_norm(z, norm["scale"], norm["bias"], NORM_EPSILON)
    low = ACTIVATIONS[form.non_linearity](_affine(z.astype(dtype), leaves["adapter_down"]))
    up = _affine(low, leaves["adapter_up"])
    return dropped(module, up * jnp.asarray(form.scaling, up.dtype), form.dropout, form.rng)


def _affine(x: jax.Array, leaves: Mapping[str, Any]) -> jax.Array:
    y = matmul(x, leaves["kernel"])
    return y + along_last(leaves["bias"].astype(x.dtype), y)


class Residual(nn.Module):
    """x + h of [..., D], and beside it A of what the adapter reads (see `bottleneck`).

    x: what went into the block's part; h: what came out of it. The adapter's leaves lie below this
    module's name: adapter_down [D, W] and adapter_up [W, D] with biases, and where the adapter
    norms what it reads, adapter_norm_before.
    """

    form: Bottleneck | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, h: jax.Array) -> jax.Array:
        if not self.has_variable("params", "adapter_down"):
            return x + h
        form = self.form
        if form is None:
            raise ValueError(f"{self.path} has adapter leaves, but the model was built without.")
        total = x + h
        read = {"output": h, "sum": total, "input": x}[form.reads]
        return total + bottleneck(self, form, self.variables["params"], read, self.dtype)
