"""A kernel on the devices that rows are spread over: each computes its rows, heads and queries."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from vlm_jax.models.layers import partition
from vlm_jax.models.layers.attention.mask import Form, Mask, Side

HEADS = "tensor"  # the mesh axis that heads lie on
Kernel = Callable[[jax.Array, jax.Array, jax.Array, Mask, Form], jax.Array]


def spread(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    form: Form,
) -> jax.Array:
    """Return what a kernel gives, called on each device with its rows, heads and queries.

    Keys and values are gathered where a row's tokens are spread. Heads are spread where those of
    keys divide. Outside of `rows_over` it is the kernel's own call.
    """
    mesh = partition.mesh()
    if mesh is None or mesh.size == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask, form)
    B, T = q_BTNH.shape[:2]
    rows, places = partition.axes_of(B, T)
    if B % math.prod(mesh.shape[name] for name in rows or ()):
        rows = None
    heads = HEADS if k_BSKH.shape[2] % mesh.shape[HEADS] == 0 else None
    queries, keys = PartitionSpec(rows, places, heads), PartitionSpec(rows, None, heads)

    def side(of: Side, over: Any) -> Side:
        return jax.tree.map(lambda x: PartitionSpec(*(rows, over)[-x.ndim :]), of)

    leaves, tree = jax.tree.flatten(mask)
    window: Any = None if mask.window is None else PartitionSpec()
    specs = jax.tree.leaves(Mask(side(mask.q, places), side(mask.k, None), window))

    def on_one_device(q: jax.Array, k: jax.Array, v: jax.Array, *own: jax.Array) -> jax.Array:
        return kernel(q, k, v, jax.tree.unflatten(tree, own), form)

    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(queries, keys, keys, *specs),
        out_specs=queries,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, *leaves)
