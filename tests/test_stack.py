"""A stack of blocks by one loop: what is added after layers, and what of them is kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models.layers.scan import Stack


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, context, layer):
        w = self.param("w", nn.initializers.normal(1.0), (x.shape[-1],))
        return jnp.sin(x * w[None]) + context[None], layer * x.sum()


LAYERS = 5
KEYS = jax.random.split(jax.random.key(0), 4)
X, MORE = jax.random.normal(KEYS[0], (2, 3)), jax.random.normal(KEYS[1], (2, 2, 3))
CONTEXT, PER_LAYER = jax.random.normal(KEYS[2], (3,)), jnp.arange(1.0, LAYERS + 1)


def one_by_one(params, x, added, kept, upto=LAYERS):
    states, outs = [], []
    for n in range(upto):
        x, out = Block().apply({"params": {"w": params["w"][n]}}, x, CONTEXT, PER_LAYER[n])
        x = x + added[n] if n < len(added) else x
        states += [x] if n in kept else []
        outs.append(out)
    return x, states, jnp.stack(outs)


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize(("added", "kept"), [(0, ()), (2, ()), (0, (1, 4)), (2, (0, 1, 3))])
def test_is_its_blocks_one_by_one(remat, added, kept):
    stack = Stack(Block, LAYERS, remat)
    params = stack.init(KEYS[3], X, CONTEXT, PER_LAYER)["params"]
    assert params["w"].shape == (LAYERS, 3)

    def ours(params, x, more):
        given = more[:added] if added else None
        x, outs = stack.apply({"params": params}, x, CONTEXT, PER_LAYER, added=given, kept=kept)
        x, states = x if kept else (x, ())
        return x, list(states), outs

    def theirs(params, x, more):
        return one_by_one(params, x, more[:added], kept)

    def total(run, *arguments):
        x, states, outs = run(*arguments)
        return sum(jnp.sum(jnp.cos((n + 1) * one)) for n, one in enumerate([x, outs, *states]))

    for one, other in zip(
        *(jax.tree.leaves(f(params, X, MORE)) for f in (ours, theirs)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    gradients = (jax.grad(total, (1, 2, 3))(run, params, X, MORE) for run in (ours, theirs))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_upto_runs_the_first_ones():
    stack = Stack(Block, LAYERS)
    params = stack.init(KEYS[3], X, CONTEXT, PER_LAYER)["params"]
    x, outs = stack.apply({"params": params}, X, CONTEXT, PER_LAYER, upto=3, added=MORE)
    expected, _, others = one_by_one(params, X, MORE, (), upto=3)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    np.testing.assert_allclose(outs, others, rtol=1e-6)
