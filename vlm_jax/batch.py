"""Batch: the arrays that one step consumes, laid out for packing.

Letters: B rows, T tokens a row, P patches a row, C values a patch.
A row owns its images, so sharding rows shards everything. A text-only row carries an empty,
masked image part, so that every device runs the same program.
"""

import dataclasses
from typing import Any

import jax

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's input; every leaf leads with B.

    tokens int32 [B, T]: input ids; placeholders stand where image features go.
    targets int32 [B, T]: the token to predict at each position (`tokens` shifted left by one).
    weights float32 [B, T]: loss weight of predicting `targets`; 0 on prompt, padding, images.
    segments int32 [B, T]: which packed example a token belongs to, from 1; 0 is padding.
        Attention stays inside a segment.
    positions int32 [B, T], or [B, 3, T] (time, height, width) for M-RoPE.
    image_index int32 [B, T]: which image feature of the row replaces this token; -1 for none.
    patches float32 [B, P, C]: pixels of each patch, flattened as the family's towers expect.
    patch_segments int32 [B, P]: which image (or video frame) a patch belongs to; 0 is padding.
    patch_positions int32 [B, P] or [B, P, 2]: where in its image a patch lies.
    """

    tokens: Array
    targets: Array
    weights: Array
    segments: Array
    positions: Array
    image_index: Array
    patches: Array
    patch_segments: Array
    patch_positions: Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, P): what a compilation depends on."""
        return (*self.tokens.shape, self.patches.shape[1])
