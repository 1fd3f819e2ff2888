"""Under fsdp a layer's weights are gathered whole, its gradients scattered, and neither is kept."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax import plan
from vlm_jax.models.layers.block import Compute, GatedMLP
from vlm_jax.models.layers.partition import rows_over
from vlm_jax.models.layers.scan import Stack
from vlm_jax.sharding import BATCH, make_mesh

LAYERS, WIDTH, HIDDEN = 3, 512, 1536
# As the decoder's table of logical axes has them.
SPREAD = {
    "gate_proj": PartitionSpec(None, "fsdp", "tensor"),
    "up_proj": PartitionSpec(None, "fsdp", "tensor"),
    "down_proj": PartitionSpec(None, "tensor", "fsdp"),
}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, context, layer):
        return x + GatedMLP(HIDDEN, "silu", Compute(x.dtype), use_bias=False, name="mlp")(x), None


class Model(nn.Module):
    remat: str

    @nn.compact
    def __call__(self, x):
        return Stack(Layer, LAYERS, self.remat, name="layers")(x, None)[0]


def gradient(remat, params, x):
    """Return the gradients of a number made of a stack's output."""
    value = lambda params: jnp.sum(Model(remat).apply({"params": params}, x) ** 2)  # noqa: E731
    return jax.grad(value)(params)


def placed(mesh, dtype, rows, tokens):
    """Return shapes of parameters and rows on a mesh."""
    x = jax.ShapeDtypeStruct(
        (rows, tokens, WIDTH), dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH))
    )
    made = jax.eval_shape(Model("none").init, jax.random.key(0), x)["params"]
    modules = made["layers"]["mlp"]
    shapes = {
        name: {
            "kernel": jax.ShapeDtypeStruct(
                leaves["kernel"].shape, dtype, sharding=NamedSharding(mesh, SPREAD[name])
            )
        }
        for name, leaves in modules.items()
    }
    return {"layers": {"mlp": shapes}}, x


def compiled(mesh, remat, dtype, rows, tokens):
    params, x = placed(mesh, dtype, rows, tokens)
    with rows_over(NamedSharding(mesh, PartitionSpec(BATCH, None)), params):
        return jax.jit(functools.partial(gradient, remat)).lower(params, x).compile()


@pytest.mark.parametrize("remat", ["products", "none"])
def test_a_tpu_multiplies_by_whole_kernels(remat):
    """By its compiler, which else passes shards on from device to device between products."""
    mesh = make_mesh(devices=plan.devices("v5e:2x2"), data=1, fsdp=4)
    program = compiled(mesh, remat, jnp.bfloat16, 4, 4096)
    kinds = [one.kind for one in plan.collectives(program)]
    assert "collective-permute" not in kinds
    # Forward and for the backward pass, whatever is kept; gradients onto their shards.
    assert kinds.count("all-gather") == 2 * len(SPREAD)
    assert "calls=%all-reduce-scatter" in program.as_text()


def test_what_the_tensor_axis_spreads_stays_so():
    mesh = make_mesh(devices=jax.devices()[:4], data=1, fsdp=2, tensor=2)
    program = compiled(mesh, "products", jnp.float32, 4, 8)
    gathered = {one.shape[-2:] for one in plan.collectives(program) if one.kind == "all-gather"}
    assert gathered == {(WIDTH, HIDDEN // 2), (HIDDEN // 2, WIDTH)}
