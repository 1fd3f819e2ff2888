"""Packing of examples into rows: first-fit-decreasing over one window.

Letters: N examples, T tokens and P patches of a row. Inside a row attention stays within an
example (`Batch.segments`), so packing changes no loss; it only fills slots that would be empty.
"""

from collections.abc import Sequence

import numpy as np

from vlm_jax.data.shapes import Shape, cost

# Patch slots that are tried, as shares of what keeps them in balance with the token slots.
PATCH_SHARES = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)


def pack(sizes: np.ndarray, capacity: Shape) -> list[np.ndarray]:
    """Return rows of example numbers, each in rising order; every example is in exactly one.

    sizes int [N, 2] (tokens, patches), no tokens above `capacity`; an example of more patches makes
    its row as wide as itself. First-fit-decreasing: examples come
    by the larger of their two shares of a row, largest first, and each goes to the first row that
    still has room for both its tokens and its patches (Johnson 1973; at most 11/9 of the optimum
    in one dimension). Depends on `sizes` and `capacity` alone.
    """
    shares = sizes / np.maximum(np.array(capacity, np.int64), 1)
    room = np.zeros((len(sizes), 2), np.int64)  # of the rows opened so far
    rows: list[list[int]] = []
    for example in np.lexsort((shares.sum(1), shares.max(1)))[::-1]:
        size = sizes[example]
        fits = np.flatnonzero((room[: len(rows)] >= size).all(1))
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = np.maximum(capacity, size)
        rows[row].append(int(example))
        room[row] -= size
    return [np.sort(np.array(row, np.int64)) for row in rows]


def row_sizes(rows: Sequence[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """Return int [len(rows), ...]: the sums of `sizes` [N, ...] over each row's examples."""
    return np.array([sizes[row].sum(0) for row in rows], np.int64).reshape(-1, *sizes.shape[1:])


def patch_capacity(sizes: np.ndarray, tokens: int, most: int, unit: int) -> int:
    """Return how many patches a packed row of `tokens` tokens should hold, a multiple of `unit`.

    sizes int [N, 2]: of a sample. most: what one row may ever need. Few patch slots leave rows of
    images half empty of tokens; many leave rows of text half empty of patches. The capacity is
    the one of those tried whose rows cost least to compute, and never below the largest example.
    """
    total_tokens, total_patches = (int(n) for n in sizes.sum(0))
    balance = tokens * total_patches / total_tokens
    largest = int(sizes[:, 1].max())
    tried = sorted(
        {min(most, -(-max(largest, int(share * balance)) // unit) * unit) for share in PATCH_SHARES}
    )
    return min(tried, key=lambda P: len(pack(sizes, (tokens, P))) * cost(np.array((tokens, P))))
