"""Stack: equal blocks with stacked parameters, run by one `lax.scan` under a remat policy."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.layers.partition import constrain_rows, gathered_layer, weights_are_spread
from vlm_jax.models.layers.remat import BLOCK_INPUT, REMAT


class Stack(nn.Module):
    """`length` blocks one after another; every parameter of a block leads with the layer axis.

    make_block: makes one unbound block; `block(x, context, layer) -> (x, out)`, where `context` is
    the same for all and `layer` is one layer's slice of `per_layer`.
    """

    make_block: Callable[..., nn.Module]
    length: int
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Any,
        context: Any,
        per_layer: Any = None,
        *,
        upto: int | None = None,
        added: jax.Array | None = None,
        kept: tuple[int, ...] = (),
    ):
        """Return `(x, outs)`, outs stacked by layer; `upto` runs only the first layers.

        added: [A, *x.shape], added to what the first A layers give. kept: the layers, ascending,
        whose x is returned too, as ((x, states [len(kept), *x.shape]), outs).
        """
        block = self.make_block(parent=None)
        if self.is_initializing():
            # The values are made inside the scan, so that a block is traced once.
            def make(x: Any, layer: Any) -> Any:
                key, extra = layer
                (x, out), made = block.init_with_output(key, x, context, extra)
                return x, (out, made["params"])

            init_keys = jax.random.split(self.make_rng("params"), self.length)
            x, (outs, made) = jax.lax.scan(make, x, (init_keys, per_layer))
            for name, leaves in made.items():
                self.param(name, lambda _, leaves=leaves: leaves)
            return ((x, jnp.stack([x] * len(kept))) if kept else x), outs
        drops = self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), self.length) if drops else None
        # Where a layer's x goes among those kept; that of the others to a place that is dropped.
        places = [kept.index(n) if n in kept else len(kept) for n in range(self.length)]
        of_layers = (dict(self.variables["params"]), keys, per_layer)
        layers = (of_layers, jnp.asarray(places, jnp.int32) if kept else None)

        def run(x: Any, layer: Any) -> Any:
            params, key, extra = layer
            # Inside of what is recomputed: gathered again for the backward pass, and never kept.
            params = gathered_layer("/".join(self.path), params)
            x = checkpoint_name(jax.tree.map(constrain_rows, x), BLOCK_INPUT)
            rngs = None if key is None else {"dropout": key}
            return block.apply({"params": params}, x, context, extra, rngs=rngs)

        if self.remat != "none" or weights_are_spread():
            # prevent_cse is for code outside a scan; inside, the loop itself prevents it.
            run = jax.checkpoint(run, prevent_cse=False, policy=REMAT[self.remat])

        def body(carry: Any, layer: Any) -> Any:
            (x, states), ((layer, place), more) = carry, layer
            x, out = run(x, layer)
            if more is not None:
                x = x + more
            if states is not None:
                states = jax.lax.dynamic_update_index_in_dim(states, x, place, 0)
            return (x, states), out

        carry = x, jnp.zeros((len(kept) + 1, *x.shape), x.dtype) if kept else None
        if added is None:
            carry, outs = jax.lax.scan(body, carry, (_part(layers, None, upto), None))
        else:  # two loops: what adds nothing in most layers would still take their time
            first = len(added)
            carry, outs = jax.lax.scan(body, carry, (_part(layers, None, first), added))
            carry, others = jax.lax.scan(body, carry, (_part(layers, first, upto), None))
            outs = jax.tree.map(lambda *x: jnp.concatenate(x), outs, others)
        x, states = carry
        return (x if states is None else (x, states[:-1])), outs


def _part(layers: Any, start: int | None, stop: int | None) -> Any:
    """Return the layers from start up to stop; all of them where neither is given."""
    whole = start is None and stop is None
    return layers if whole else jax.tree.map(lambda leaf: leaf[start:stop], layers)
