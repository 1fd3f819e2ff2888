"""LoRA's product with its own derivative, against the plain formula; a gated MLP's product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.models.layers import activations
from vlm_jax.models.layers.activations import ACTIVATIONS, gated, gated_once
from vlm_jax.models.layers.dropout import hashed_keep
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.models.layers.lora_dot import lora_dot
from vlm_jax.models.layers.partition import rows_over
from vlm_jax.sharding import make_mesh
from vlm_jax.weights import FORMATS, dense
from vlm_jax.weights.quantize import quantize

SEED = jnp.array([3, 4], jnp.uint32)


def drawn(*shapes):
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def plain(x, kernel, a, b, scale, rate=0.0):
    kept = jnp.where(hashed_keep(SEED, x.shape, rate), x / (1 - rate), 0) if rate else x
    return x @ dense(kernel, x.dtype) + scale * (kept @ a) @ b


def check_same(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


def both(function, x, kernel, a, b, dy, quantized=False):
    """Return the product and its gradients by x, A, B and a dense kernel."""
    of = (0, 1, 2) if quantized else (0, 1, 2, 3)
    whole = lambda x, a, b, kernel: function(x, kernel, a, b)  # noqa: E731
    y, pull = jax.vjp(whole, x, a, b, kernel)
    return y, [pull(dy)[at] for at in of]


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (3, 1, 2), ()])
@pytest.mark.parametrize(("inside", "rank", "out"), [(11, 3, 5), (5, 1, 13)])
def test_values_and_gradients(lead, rate, inside, rank, out):
    x, kernel, a, b, dy = drawn(
        (*lead, inside), (inside, out), (inside, rank), (rank, out), (*lead, out)
    )
    ours = lambda *args: lora_dot(*args, 2.5, rate, SEED)  # noqa: E731
    theirs = lambda *args: plain(*args, 2.5, rate)  # noqa: E731
    check_same(both(ours, x, kernel, a, b, dy), both(theirs, x, kernel, a, b, dy))


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_kernels(double):
    x, kernel, a, b, dy = drawn((2, 3, 64), (64, 24), (64, 3), (3, 24), (2, 3, 24))
    kernel = quantize(FORMATS["nf4"], kernel, double=double)
    ours = lambda *args: lora_dot(*args, 2.5, 0.3, SEED)  # noqa: E731
    theirs = lambda *args: plain(*args, 2.5, 0.3)  # noqa: E731
    check_same(
        both(ours, x, kernel, a, b, dy, quantized=True),
        both(theirs, x, dense(kernel, jnp.float32), a, b, dy, quantized=True),
    )


def test_a_layer_s_own_scale_is_traced_and_does_not_train():
    x, kernel, a, b = drawn((4, 6), (6, 5), (6, 2), (2, 5))
    layer = Linear(5, False, jnp.float32, LoRAScale(3))

    @jax.jit
    def total(scale):
        leaves = {"kernel": kernel, "lora_A": a, "lora_B": b, "lora_scale": scale}
        return layer.apply({"params": leaves}, x).sum()

    for scale in (0.0, 0.75):
        expected = (x @ kernel + scale * (x @ a) @ b).sum()
        assert float(total(scale)) == pytest.approx(float(expected), rel=1e-6)
    assert float(jax.grad(total)(0.75)) == 0


def test_sums_over_rows_are_float32():
    """Of ones: 4,097 is no bfloat16."""
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)  # noqa: E731
    factors = (jnp.ones((2, 1)), jnp.ones((1, 2)))
    product = lambda a, b: lora_dot(ones(4097, 2), ones(2, 2), a, b, 0.5)  # noqa: E731
    da, db = jax.vjp(product, *factors)[1](ones(4097, 2))
    np.testing.assert_array_equal(da, np.full((2, 1), 4097))
    np.testing.assert_array_equal(db, np.full((1, 2), 4097))


def test_it_keeps_its_inputs_and_the_low_rank_product_alone():
    x, kernel, a, b = drawn((4, 6), (6, 5), (6, 2), (2, 5))
    _, pull = jax.vjp(lambda *args: lora_dot(*args, 1.0, 0.5, SEED), x, kernel, a, b)
    kept = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert sorted(kept) == sorted([(4, 6), (4, 2), (6, 5), (6, 2), (2, 5), (), (2,)])


def test_a_frozen_kernel_costs_no_gradient():
    """In a scan of recomputed layers: three products of [64, 64], not four."""
    x, kernels, a, b = drawn((64, 64), (2, 64, 64), (2, 64, 1), (2, 1, 64))

    def total(factors, kernels):
        def body(x, layer):
            kernel, (a, b) = layer
            return jnp.tanh(lora_dot(x, kernel, a, b, 1.0, 0.5, SEED)), None

        return jax.lax.scan(jax.checkpoint(body), x, (kernels, factors))[0].sum()

    def products(of):
        compiled = jax.jit(jax.grad(total, argnums=of)).lower((a, b), kernels).compile()
        return compiled.cost_analysis()["flops"] / (2 * 64**3)

    # At most: the sums around them are no products.
    assert products((0, 1)) - products(0) == pytest.approx(1, abs=0.1)


def test_rows_and_their_tokens_on_several_devices():
    mesh = make_mesh(data=2, fsdp=2, context=2)
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
    x, kernel, a, b, dy = drawn((4, 6, 10), (10, 8), (10, 2), (2, 8), (4, 6, 8))
    layer = Linear(8, False, jnp.float32, LoRAScale(3, 0.5))

    def value(x, kernel, a, b):
        leaves = {"kernel": kernel, "lora_A": a, "lora_B": b}
        return layer.apply({"params": leaves}, x, rngs={"dropout": jax.random.key(1)})

    run = lambda x: both(value, x, kernel, a, b, dy)  # noqa: E731
    alone = jax.jit(run)(x)
    with rows_over(spread):
        compiled = jax.jit(run).lower(jax.device_put(x, spread)).compile()
        together = compiled(jax.device_put(x, spread))
    assert "all-gather" not in compiled.as_text()  # rows are not merged with their tokens
    check_same(together, alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_product_made_once(activation):
    gate, up, dy = drawn((3, 7), (3, 7), (3, 7))
    plain = lambda gate, up: ACTIVATIONS[activation](gate) * up  # noqa: E731
    ours, pull = jax.vjp(lambda *args: gated_once(*args, activation), gate, up)
    theirs, pull_plain = jax.vjp(plain, gate, up)
    check_same((ours, pull(dy)), (theirs, pull_plain(dy)))


@pytest.mark.parametrize(("platform", "barriers"), [("tpu", 2), ("gpu", 0), ("cpu", 0)])
def test_barriers_on_a_tpu_alone(monkeypatch, platform, barriers):
    monkeypatch.setattr(activations, "platform", lambda: platform)
    gate = jnp.ones(3, jnp.bfloat16)
    total = lambda gate, up: gated(gate, up, "silu").sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.value_and_grad(total, argnums=(0, 1)))(gate, gate))
    assert text.count("optimization_barrier") == barriers
