"""Puts batches on the mesh: their patches as bytes, which get their values there."""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.data import Encoder
from vlm_jax.sharding import BATCH, shard_batch


class Feed:
    """Called with a host's batch, returns it on the mesh, rows over data x fsdp.

    bytes_only: whether the batch's patches must be bytes, as `Pipeline.batches` gives them then.
    """

    def __init__(self, encoder: Encoder, mesh: Any):
        self.mesh, look_up = mesh, encoder.look_up
        self.bytes_only = look_up is not None
        self.look_up: Any = None
        if look_up is not None:
            rows = NamedSharding(mesh, PartitionSpec(BATCH))
            self.look_up = jax.jit(lambda batch: look_up(batch).patches, out_shardings=rows)

    def __call__(self, batch: Batch) -> Batch:
        batch = shard_batch(batch, self.mesh)
        if self.look_up is None:
            return batch
        return dataclasses.replace(batch, patches=self.look_up(batch))
