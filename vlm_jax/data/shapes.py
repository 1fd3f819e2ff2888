"""Compiled shapes: the few (tokens, patches) that rows are padded to, and rows of a step by size.

Every shape is one compilation, so there are few; every slot that nothing fills is computed in
vain, so they are fitted to the examples. Letters: T tokens, P patches, of one row.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, int]

# What a patch costs against a token: a tower of about a tenth of the decoder's parameters, whose
# attention is quadratic within an image. Only the balance of the two kinds of padding hangs on it.
PATCH_COST = 0.2
LEAST_GAIN = 0.02  # a further shape is a further compilation: it must save this share of the work
GRAINS = ((256, 16), (1024, 64), (8192, 128))


def round_up(count: int, unit: int = 1) -> int:
    """Return a multiple of `unit` of at least `count`, in steps of 16 to 256 as counts grow.

    Round sizes suit the hardware's tiles, and make few of many. A large unit is its own grain.
    """
    if count <= 0:
        return 0
    grain = next((grain for limit, grain in GRAINS if count <= limit), 256)
    grain = unit if unit >= 64 else math.lcm(unit, grain)
    return -(-count // grain) * grain


def cost(shapes: np.ndarray) -> np.ndarray:
    """Return float [...] of sizes or shapes [..., 2]: what computing a row of it takes."""
    return shapes[..., 0] + PATCH_COST * shapes[..., 1]


def choose_shapes(sizes: np.ndarray, cap: Shape, max_shapes: int, unit: int) -> list[Shape]:
    """Return at most `max_shapes` shapes, cheapest first, that pad examples of `sizes` least.

    sizes int [N, 2]: tokens and patches of each example. cap: the last shape, which holds
    every one of them. unit: P is a multiple of it, and not 0 where `cap` has patches: a text-only
    row carries an empty image part, so that mixed data needs no program of its own for text.
    Exact for a ladder whose rungs follow one order of the examples (by cost, T, or P).
    """
    least = min(unit, cap[1])
    rounded = np.array(
        [(min(round_up(t), cap[0]), min(max(round_up(p, unit), least), cap[1])) for t, p in sizes],
        np.int64,
    ).reshape(-1, 2)
    kinds, counts = np.unique(rounded, axis=0, return_counts=True)
    prices = cost(kinds)
    orders = [np.lexsort((prices, key)) for key in (prices, kinds[:, 0], kinds[:, 1])]
    cuts = [_cut(kinds[order], counts[order], cap, max_shapes) for order in orders]
    _, ladder = min(cuts, key=lambda cut: cut[0])
    return sorted(set(ladder), key=lambda shape: (cost(np.array(shape)), shape))


def wider_shapes(cap: Shape, most: int, unit: int) -> list[Shape]:
    """Return the shapes beyond `cap`, for rows of more patches than a sample foresaw.

    They double up to `most`, what a row may have at all, so that few compilations reach any row.
    """
    (tokens, patches), shapes = cap, []
    while patches < most:
        patches = min(most, round_up(max(2 * patches, unit), unit))
        shapes.append((tokens, patches))
    return shapes


def _cut(
    kinds: np.ndarray, counts: np.ndarray, cap: Shape, max_shapes: int
) -> tuple[float, list[Shape]]:
    """Return the cheapest way to cut a list of sizes into runs that share a shape.

    Dynamic programming: paid[j] is the least cost of the first j kinds in so many runs.
    """
    if len(kinds) > 300:  # neighbours differ little: merge them, to keep the square of it small
        parts = np.array_split(np.arange(len(kinds)), 300)
        counts = np.array([counts[part].sum() for part in parts])
        kinds = np.array([kinds[part].max(0) for part in parts])
    n = len(kinds)
    sums = np.concatenate([[0], np.cumsum(counts)])
    price = np.full((n + 1, n + 1), np.inf)  # price[i, j]: kinds i..j-1 share their largest shape
    for i in range(n):
        largest = np.maximum.accumulate(kinds[i:], axis=0)
        price[i, i + 1 :] = (sums[i + 1 :] - sums[i]) * cost(largest)
    last = (sums[n] - sums) * cost(np.array(cap))  # the last run is padded to the cap
    paid = np.full(n + 1, np.inf)
    paid[0] = 0
    begins: list[tuple[int, ...]] = [()] * (n + 1)  # of the runs that paid[j] is the price of
    best: tuple[float, tuple[int, ...]] = float(last[0]), (0,)  # total; where each run begins
    for _ in range(1, max_shapes):
        steps = paid[:, None] + price
        begins = [(*begins[start], int(start)) for start in steps.argmin(0)]
        paid = steps.min(0)
        totals = paid + last
        start = int(totals.argmin())
        if totals[start] < best[0] * (1 - LEAST_GAIN):
            best = float(totals[start]), (*begins[start], start)
    runs = [tuple(kinds[a:b].max(0).tolist()) for a, b in itertools.pairwise(best[1])]
    return best[0], [*runs, cap]


def fit(size: np.ndarray, shapes: Sequence[Shape]) -> int:
    """Return which is the first (cheapest) shape that holds `size` [2]; one of them has to."""
    return next(i for i, (t, p) in enumerate(shapes) if size[0] <= t and size[1] <= p)


def size_order(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """Return the order of `sizes` [N, ...] by the shape that each needs, then by its cost."""
    needs = [fit(size, shapes) for size in sizes]
    return np.lexsort((cost(sizes), np.array(needs, np.int64)))


def group(sizes: np.ndarray, rows: int, shapes: Sequence[Shape]) -> list[tuple[np.ndarray, Shape]]:
    """Return the steps that the examples of one window make: (which examples, their shape).

    sizes int [N, 2], each of which some shape holds. Every example is in one step; a step has
    `rows` examples but for the first, which has what is left over. Like goes with like: examples
    are sorted by the shape they need and their cost.
    """
    order = size_order(sizes, shapes)
    first = len(order) % rows or rows
    parts = np.split(order, range(first, len(order), rows)) if len(order) else []
    return [(members, shapes[fit(sizes[members].max(0), shapes)]) for members in parts]


def padding(steps: Sequence[tuple[np.ndarray, Shape]], sizes: np.ndarray, rows: int) -> list[float]:
    """Return the shares of token and of patch slots that nothing fills, empty rows included."""
    used = np.sum([sizes[members].sum(0) for members, _ in steps], axis=0)
    slots = rows * np.sum([shape for _, shape in steps], axis=0)
    return [float(1 - u / s) if s else 0.0 for u, s in zip(used, slots, strict=True)]
