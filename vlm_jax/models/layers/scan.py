"""Stack: equal blocks with stacked parameters, run by one `lax.scan` under a remat policy."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
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
    def __call__(self, x: Any, context: Any, per_layer: Any = None, upto: int | None = None):
        """Return `(x, outs)`, outs stacked by layer; `upto` runs only the first layers."""
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
            return x, outs
        drops = self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), self.length) if drops else None
        layers = (dict(self.variables["params"]), keys, per_layer)
        if upto is not None:
            layers = jax.tree.map(lambda leaf: leaf[:upto], layers)

        def body(x: Any, layer: Any) -> Any:
            params, key, extra = layer
            # Inside of what is recomputed: gathered again for the backward pass, and never kept.
            params = gathered_layer("/".join(self.path), params)
            x = checkpoint_name(jax.tree.map(constrain_rows, x), BLOCK_INPUT)
            rngs = None if key is None else {"dropout": key}
            return block.apply({"params": params}, x, context, extra, rngs=rngs)

        if self.remat != "none" or weights_are_spread():
            # prevent_cse is for code outside a scan; inside, the loop itself prevents it.
            body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[self.remat])
        return jax.lax.scan(body, x, layers)
