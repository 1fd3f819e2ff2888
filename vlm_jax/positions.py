"""Positions of tokens and patches: M-RoPE of a row; (height, width) and frames of patches.

Plain numpy over one unpadded example; models and data share it, so that a position is computed
by one function only. Letters: T tokens, P patches. A grid is (frames, height, width), counted in
patches before merging; `merge` by `merge` patches become one token.
"""

from collections.abc import Sequence

import numpy as np

from vlm_jax.errors import UserError

Grids = Sequence[Sequence[int]] | np.ndarray | None


def grid_list(grids: Grids) -> list[tuple[int, int, int]]:
    """Return the grids as a list of three-integer tuples; None gives no grid."""
    rows = np.asarray(() if grids is None else grids, np.int64).reshape(-1, 3)
    return [(int(t), int(h), int(w)) for t, h, w in rows]


def mrope(
    tokens: np.ndarray,
    image_grid_thw: Grids,
    video_grid_thw: Grids,
    merge: int,
    image_token_id: int | None,
    video_token_id: int | None,
    intervals: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Return int32 [3, T]: the (time, height, width) rotary position of every token.

    Text counts up in all three rows alike. The tokens of an image start where the text before
    them ended and spread over their merged grid, frame by frame and row by row; the text after
    them continues `max(height, width) // merge` later, whatever the number of frames:

        tokens  a  b  [2 x 2 image ]  c
        time    0  1   2  2  2  2     4
        height  0  1   2  2  3  3     4
        width   0  1   2  3  2  3     4

    intervals: of each video, how far a frame lies behind the one before, rounded down after the
    product with its number; None: 1. The text behind a video is placed as if they were 1.

    Equals `Qwen2VLModel.get_rope_index` of transformers, and also takes two images with no text
    in between, which that function cannot tell apart. Images and videos are each taken in the
    order of their placeholders. The first position after the row is `mrope(...).max() + 1`.
    Qwen2-VL, section 2.1, https://arxiv.org/abs/2409.12191. Raises `UserError` where
    placeholders and grids do not pair up.
    """
    tokens = np.asarray(tokens)
    length = len(tokens)
    blocks = []  # (first token, tokens, grid, interval) of every image and video
    for name, token_id, grid_thw in (
        ("image", image_token_id, image_grid_thw),
        ("video", video_token_id, video_grid_thw),
    ):
        grids, places = grid_list(grid_thw), np.flatnonzero(tokens == token_id)
        sizes = [t * (h // merge) * (w // merge) for t, h, w in grids]
        if len(places) != sum(sizes):
            raise UserError(
                f"A row of {length} tokens holds {len(places)} {name} placeholders, but its "
                f"{len(grids)} {name} grids {grids} make {sum(sizes)} features. There must be one "
                f"placeholder for each feature: was the row truncated, or its template expanded "
                f"for other {name} sizes?"
            )
        start, steps = 0, [1.0] * len(grids)
        if name == "video" and intervals is not None:
            steps = [float(step) for step in intervals]
        for grid, size, step in zip(grids, sizes, steps, strict=True):
            if places[start + size - 1] - places[start] != size - 1:
                raise UserError(
                    f"The placeholders of a {name} of grid {grid} do not stand together: token "
                    f"{places[start]} begins it and token {places[start + size - 1]} ends it, for "
                    f"{size} features. Do the grids come in the order of the placeholders?"
                )
            blocks.append((int(places[start]), size, grid, step))
            start += size

    positions = np.empty((3, length), np.int32)
    token = position = 0
    for first, size, (t, h, w), step in sorted(blocks):
        positions[:, token:first] = position + np.arange(first - token)
        position += first - token
        token = first + size
        offsets = np.indices((t, h // merge, w // merge)).reshape(3, size)
        if step != 1:
            offsets[0] = (offsets[0].astype(np.float32) * np.float32(step)).astype(np.int64)
        positions[:, first:token] = position + offsets
        position += max(h, w) // merge
    positions[:, token:] = position + np.arange(length - token)
    return positions


def vision_positions(grid_thw: Grids, merge: int) -> np.ndarray:
    """Return int32 [P, 2]: the (height, width) of every patch of the images, one after another.

    Patches come as Qwen2-VL's image processor lays them out: the `merge` by `merge` patches that
    become one token stand together, blocks run row by row, and frames repeat the same positions.
    A 2 x 4 image with merge 2: (0,0) (0,1) (1,0) (1,1) | (0,2) (0,3) (1,2) (1,3).
    """
    parts = [np.zeros((0, 2), np.int32)]
    for t, h, w in grid_list(grid_thw):
        cells = np.indices((h, w)).reshape(2, h // merge, merge, w // merge, merge)
        parts += [cells.transpose(1, 3, 2, 4, 0).reshape(h * w, 2).astype(np.int32)] * t
    return np.concatenate(parts)


def vision_segments(grid_thw: Grids) -> np.ndarray:
    """Return int32 [P]: one id for each frame of each image, from 1.

    A vision tower attends inside a segment. It is a frame rather than a video because the
    reference restarts attention at each frame of the temporal grid.
    """
    sizes = [h * w for t, h, w in grid_list(grid_thw) for _ in range(t)]
    return np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)


def vision_windows(grid_thw: Grids, merge: int, cells: int) -> np.ndarray:
    """Return int32 [P]: one id for each window of each frame, from 1, in `vision_positions`' order.

    A window is `cells` by `cells` tokens of `merge` by `merge` patches; those at the right and at
    the lower edge are smaller. Qwen2.5-VL, section 2.1.1, https://arxiv.org/abs/2502.13923.
    """
    parts, count = [np.zeros(0, np.int32)], 0
    for t, h, w in grid_list(grid_thw):
        rows, columns = (vision_positions([(1, h, w)], merge) // (merge * cells)).T
        across = -(-w // (merge * cells))
        windows = rows * across + columns + 1
        for _ in range(t):
            parts.append((windows + count).astype(np.int32))
            count += int(windows.max(initial=0))
    return np.concatenate(parts)


def interpolation(grid_thw: Grids, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (taps int32 [P, 4], weights float32 [P, 4]) of a learned table of side x side rows.

    The table, stretched over an image corner to corner, is read bilinearly at its patches, which
    come in `vision_positions`' order. Sums in float32, as `torch.nn.functional.interpolate` has
    them with align_corners.
    """
    positions = vision_positions(grid_thw, merge)
    sizes = np.concatenate(
        [np.zeros((0, 2), np.int64)]
        + [np.tile((h, w), (t * h * w, 1)) for t, h, w in grid_list(grid_thw)]
    )
    place = positions.astype(np.float32) * np.float32(side - 1)
    place = place / np.maximum(sizes - 1, 1).astype(np.float32)  # [P, 2]
    low = np.floor(place)
    taps = low.astype(np.int32)[:, :, None] + np.arange(2, dtype=np.int32)  # [P, 2, 2]
    weights = 1 - np.abs(place[:, :, None] - taps.astype(np.float32))
    (rows, columns), (down, across) = (
        np.moveaxis(x, 1, 0) for x in (np.minimum(taps, side - 1), np.maximum(weights, 0))
    )
    both = rows[:, :, None] * side + columns[:, None, :]
    shares = down[:, :, None] * across[:, None, :]
    return both.reshape(-1, 4).astype(np.int32), shares.reshape(-1, 4).astype(np.float32)
