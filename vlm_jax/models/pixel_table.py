"""uint8 pixels to float on the device: a quarter of the transfer.

A pixel is one of 256 values a channel, so normalising is a table (`processors.value_table`).
Letters: B rows, P patches a row, C values a patch, c channels, f frames, v pixels of one frame.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.models.family import Family


@dataclasses.dataclass(frozen=True)
class LookUp:
    """Called with a batch whose patches are uint8, returns it with their float32 values [B, P, C].

    They are bit for bit those that the processor gives, and 0 where no pixel is, as `collate`
    leaves them. It can be compiled. The bytes are [B, P, C] or, of still images alone,
    [B, P, C / f]: a still image fills all frames of its patches, and travels as one.
    table: float32 [c, 256], see `data.media.processors.value_table`.
    """

    table: np.ndarray
    family: Family

    def __call__(self, batch: Batch) -> Batch:
        (B, P, C), (c, f, v) = batch.patches.shape, self.family.patch_axes
        # How many frames travelled follows from C: of no patches reshape could not tell.
        bytes_BPcfv = batch.patches.reshape(B, P, c, C // (c * v), v).astype(jnp.int32)
        first_cfv = 256 * jnp.arange(c, dtype=jnp.int32)[:, None, None]
        values_BPcfv = jnp.asarray(self.table.reshape(-1))[bytes_BPcfv + first_cfv[None, None]]
        values_BPcfv = jnp.broadcast_to(values_BPcfv, (B, P, c, f, v))
        held_BP = (batch.patch_segments > 0) & self.family.holds_pixels(batch.patch_positions)
        values_BPC = values_BPcfv.reshape(B, P, c * f * v)
        return dataclasses.replace(batch, patches=jnp.where(held_BP[:, :, None], values_BPC, 0.0))
