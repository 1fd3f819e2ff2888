"""Batch: the arrays that one step consumes, laid out for packing.

Letters: B rows, T tokens a row, P patches a row, C values a patch.
A row owns its images, so sharding rows shards everything. A text-only row among others carries an
empty, masked image part, so that every device runs the same program. Where no row of a batch has
images P may be 0: nothing runs the tower then, and its gradients are zero.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = Any


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's input; every leaf leads with B. A pytree of JAX, which `models.vlm` tells it.

    tokens int32 [B, T]: input ids; placeholders stand where image features go.
    targets int32 [B, T]: the token to predict at each position (`tokens` shifted left by one).
    weights float32 [B, T]: loss weight of predicting `targets`; 0 on prompt, padding, images.
    segments int32 [B, T]: which packed example a token belongs to, from 1; 0 is padding.
        Attention stays inside a segment.
    positions int32 [B, T], or [B, 3, T] (time, height, width) for M-RoPE.
    image_index int32 [B, T]: which image feature of the row replaces this token; -1 for none, and
        below -1 a learned row that the family puts behind them, from the end (-2: the last).
    patches float32 [B, P, C]: pixels of each patch, flattened as the family's towers expect; on
        their way to the device they may be uint8 and of one frame, see `models.pixel_table`.
    patch_segments int32 [B, P]: which image (or video frame) a patch belongs to; 0 is padding.
    patch_positions int32 [B, P] or [B, P, 2]: where in its image a patch lies.

    None where a family's towers have no use for it:
    patch_windows int32 [B, P]: which part of its image a patch belongs to, numbered through the row
        as `patch_segments` are, where some blocks attend inside such parts.
    patch_taps int32 [B, P, 4], patch_tap_weights float32 [B, P, 4]: the rows of a learned table of
        positions that a patch's own is interpolated from, and their weights.
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
    patch_windows: Array | None = None
    patch_taps: Array | None = None
    patch_tap_weights: Array | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, P): what a compilation depends on."""
        return (*self.tokens.shape, self.patches.shape[1])


# One example before padding: tokens int [T], weights float [T] (of token t itself, as labels are),
# and a family's layout: positions, image_index, patches, patch_segments, patch_positions, and what
# else its towers use.
Example = dict[str, np.ndarray]
# Of each patch, beside its pixels; numbered through a row: those that count parts of an example.
OF_PATCHES = (
    "patch_segments", "patch_positions", "patch_windows", "patch_taps", "patch_tap_weights",
)  # fmt: skip
NUMBERED = ("patch_segments", "patch_windows")


def shift(tokens: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (targets, weights) of one example: position t predicts token t + 1.

    The first token of an example is predicted by nothing, so its weight is dropped.
    """
    targets, shifted = np.zeros_like(tokens), np.zeros_like(weights)
    targets[:-1], shifted[:-1] = tokens[1:], weights[1:]
    return targets, shifted


def collate(
    rows: Sequence[Sequence[Example]],
    length: int,
    patches: int,
    like: Example,
    features: Callable[[int], int],
    pixels: Any = np.float32,
    padded: bool = True,
) -> Batch:
    """Return a numpy `Batch` of len(rows) rows of `length` tokens and `patches` patches.

    A row's examples are packed one after another; segments and images are numbered through the
    row. `like` is any example of the same family: it gives the shapes of an empty row. `features`
    gives how many image features so many patches make (`Family.features`). `pixels` is the dtype
    of the examples' patches: uint8 before `models.pixel_table`. Without `padded` the batch's
    patches are [N, C], those of all rows one after another, until `pad_patches`.
    Raises `ValueError` where a row does not fit: nothing is ever cut.
    """
    B = len(rows)
    C = like["patches"].shape[1]
    of_patches = [name for name in OF_PATCHES if name in like]
    held = sum(len(example["patches"]) for examples in rows for example in examples)
    batch = Batch(
        tokens=np.zeros((B, length), np.int32),
        targets=np.zeros((B, length), np.int32),
        weights=np.zeros((B, length), np.float32),
        segments=np.zeros((B, length), np.int32),
        positions=np.zeros((B, *like["positions"].shape[:-1], length), np.int32),  # () or (3,)
        image_index=np.full((B, length), -1, np.int32),
        patches=np.zeros((B, patches, C), pixels) if padded else np.empty((held, C), pixels),
        **{
            name: np.zeros((B, patches, *like[name].shape[1:]), like[name].dtype)
            for name in of_patches
        },
    )
    slots, taken = batch.patches.reshape(-1, C), 0
    for row, examples in enumerate(rows):
        t = p = 0
        counts = dict.fromkeys(NUMBERED, 0)
        for number, example in enumerate(examples, start=1):
            n, m = len(example["tokens"]), len(example["patches"])
            if t + n > length or p + m > patches:
                raise ValueError(
                    f"Row {row} needs {t + n} tokens and {p + m} patches, but the batch has "
                    f"{length} and {patches}."
                )
            here, there = slice(t, t + n), slice(p, p + m)
            tokens, weights = example["tokens"], example["weights"]
            batch.tokens[row, here] = tokens
            batch.targets[row, here], batch.weights[row, here] = shift(tokens, weights)
            batch.segments[row, here] = number
            batch.positions[row, ..., here] = example["positions"]
            index = example["image_index"]
            batch.image_index[row, here] = np.where(index >= 0, index + features(p), index)
            if m and example["patches"].dtype != pixels:
                raise ValueError(f"Patches are {example['patches'].dtype}, not {pixels}.")
            start = row * patches + p if padded else taken
            if m:
                slots[start : start + m] = example["patches"]
            for name in of_patches:
                values = example[name]
                if name in NUMBERED:
                    values = np.where(values > 0, values + counts[name], 0)
                    counts[name] = int(values.max(initial=counts[name]))
                getattr(batch, name)[row, there] = values
            t, p = t + n, p + m
            taken += m
    return batch


def pad_patches(batch: Batch) -> Batch:
    """Return a numpy batch that `collate` made without padding with its patches in their slots."""
    patches = np.zeros((*batch.patch_segments.shape, batch.patches.shape[1]), batch.patches.dtype)
    filled = batch.patch_segments > 0
    if filled.sum() != len(batch.patches):
        raise ValueError(f"There are {len(batch.patches)} patches for {filled.sum()} slots.")
    patches[filled] = batch.patches
    return dataclasses.replace(batch, patches=patches)
