"""Bottleneck adapters beside a block's sums: nothing is computed where the tree holds none.

Houlsby: https://arxiv.org/abs/1902.00751. Pfeiffer: https://arxiv.org/abs/2005.00247. Parallel:
https://arxiv.org/abs/2110.04366. Letters: D width of the block, W of the bottleneck.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.layers.activations import ACTIVATIONS
from vlm_jax.layers.linear import Linear
from vlm_jax.layers.norm import LayerNorm

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
    or the block's "input" to that part, before its norm.
    """

    reads: str
    non_linearity: str
    scaling: float = 1.0
    dropout: float = 0.0


class Residual(nn.Module):
    """x + h of [..., D], and beside it scaling * up(f(down(what the adapter reads))).

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
        if self.has_variable("params", "adapter_norm_before"):
            read = LayerNorm(NORM_EPSILON, self.dtype, name="adapter_norm_before")(read)
        width = self.variables["params"]["adapter_down"]["kernel"].shape[-1]
        low = Linear(width, True, self.dtype, name="adapter_down")(read)
        low = ACTIVATIONS[form.non_linearity](low)
        up = Linear(x.shape[-1], True, self.dtype, name="adapter_up")(low)
        up = up * jnp.asarray(form.scaling, up.dtype)
        if form.dropout > 0 and self.has_rng("dropout"):
            keep = 1.0 - form.dropout
            mask = jax.random.bernoulli(self.make_rng("dropout"), keep, up.shape)
            up = jnp.where(mask, up / keep, 0).astype(up.dtype)
        return total + up
