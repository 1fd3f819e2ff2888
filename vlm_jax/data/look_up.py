"""Bytes to pixel values where they are used: what travels to the device is a quarter of them.

A pixel is one of 256 values a channel, so normalising is a table (`processors.value_table`).
Letters: B rows, P patches a row, C values a patch.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch


@dataclasses.dataclass(frozen=True)
class LookUp:
    """Called with a batch whose patches are uint8 [B, P, C], returns it with their float32 values.

    They are bit for bit those that the processor gives, and 0 where no pixel is, as `collate`
    leaves them. It can be compiled. table: float32 [channels, 256]. holds_pixels: patch positions
    to whether such a slot of an image holds pixels; C begins with channels.
    """

    table: np.ndarray
    holds_pixels: Callable[[jax.Array], jax.Array]

    def __call__(self, batch: Batch) -> Batch:
        B, P, C = batch.patches.shape
        channels = len(self.table)
        bytes_BPcv = batch.patches.reshape(B, P, channels, C // channels).astype(jnp.int32)
        entry_BPcv = bytes_BPcv + 256 * jnp.arange(channels, dtype=jnp.int32)[None, None, :, None]
        values_BPcv = jnp.asarray(self.table.reshape(-1))[entry_BPcv]
        held_BP = (batch.patch_segments > 0) & self.holds_pixels(batch.patch_positions)
        patches = jnp.where(held_BP[:, :, None], values_BPcv.reshape(B, P, C), 0.0)
        return dataclasses.replace(batch, patches=patches)
