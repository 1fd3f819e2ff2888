"""Compile four scanned MLP layers for v5e chips, with weights in 4 bits and in bf16, and compare.

Needs no TPU: `pip install "vlm_jax[plan]"`, then `python scripts/prove/qlora_on_tpu.py`. Prints
temporary memory, the compiler's estimate of time, and what the chips exchange.
"""

import dataclasses
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.models.layers.scan import Stack
from vlm_jax.plan import collectives, estimated_seconds, topologies
from vlm_jax.quantization import NAMES
from vlm_jax.sharding import BATCH, leaf_sharding, make_mesh, used_on_mesh

LAYERS, WIDTH, HIDDEN, TOKENS, RANK = 4, 4096, 11008, 4096, 16
KERNELS = {
    "gate_proj": (("embed", "wide"), (WIDTH, HIDDEN)),
    "up_proj": (("embed", "wide"), (WIDTH, HIDDEN)),
    "down_proj": (("wide", "embed"), (HIDDEN, WIDTH)),
}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, context, layer):
        def linear(name: str, features: int) -> Linear:
            return Linear(features, False, jnp.bfloat16, LoRAScale(32.0), name=name)

        hidden = nn.silu(linear("gate_proj", HIDDEN)(x)) * linear("up_proj", HIDDEN)(x)
        return x + linear("down_proj", WIDTH)(hidden), None


def parameters(storage: str | None, mesh: Any) -> tuple[dict, dict]:
    """Return (LoRA, kernels) as shapes with their shardings."""

    def spread(leaf: Any, axes: tuple) -> Any:
        sharding = leaf_sharding(leaf, axes, mesh)
        return jax.tree.map(
            lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where),
            used_on_mesh({"k": leaf}, {"k": sharding})["k"], sharding,
        )  # fmt: skip

    lora: dict = {}
    kernels: dict = {}
    for name, (axes, (inputs, outputs)) in KERNELS.items():
        shape = (LAYERS, inputs, outputs)
        leaf: Any = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        if storage is not None:
            leaf = NAMES[storage].abstract(shape, "bfloat16")
        kernels[name] = {"kernel": spread(leaf, axes)}
        a = jax.ShapeDtypeStruct((LAYERS, inputs, RANK), jnp.float32)
        b = jax.ShapeDtypeStruct((LAYERS, RANK, outputs), jnp.float32)
        lora[name] = {
            "lora_A": spread(a, (axes[0], None)),
            "lora_B": spread(b, (None, axes[1])),
        }
    return lora, kernels


def program(storage: str | None, mesh: Any) -> Any:
    """Return the compiled gradient of the sum of outputs."""
    stack = Stack(Block, LAYERS, "block")

    def loss(lora: dict, kernels: dict, x: jax.Array) -> jax.Array:
        params = {name: {**kernels[name], **lora[name]} for name in kernels}
        y, _ = stack.apply({"params": params}, x, None)
        return jnp.sum(y.astype(jnp.float32))

    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16, sharding=rows)
    lora, kernels = parameters(storage, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, lora)
    return jax.jit(jax.grad(loss), out_shardings=placed).lower(lora, kernels, x).compile()


def main() -> int:
    chips = topologies.devices("v5e:2x2")
    for name, axes in (("FSDP", {"fsdp": 4}), ("TP", {"tensor": 4})):
        mesh = make_mesh(data=1, devices=chips, **axes)
        dense = None
        for storage in (None, "nf4-dq"):
            compiled = program(storage, mesh)
            usage = compiled.memory_analysis()
            seconds = estimated_seconds(compiled)
            dense = dense or seconds
            print(
                f"{name}, {storage or 'bf16'}: {usage.temp_size_in_bytes / 1e6:.0f} MB temporary, "
                f"{usage.argument_size_in_bytes / 1e6:.0f} MB arguments, {seconds * 1e3:.2f} ms "
                f"({seconds / dense:.3f} of bf16)"
            )
            if "--verbose" in sys.argv:
                for one in collectives(compiled):
                    print("   ", dataclasses.asdict(one))
    return 0


if __name__ == "__main__":
    sys.exit(main())
