"""Statistics of a data sample: row lengths, image sizes, gain of packing."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import Encoder
from vlm_jax.data.lengths import StreamMeasures
from vlm_jax.data.measuring import Measurer, sample
from vlm_jax.data.packing import pack, patch_capacity, row_sizes
from vlm_jax.data.shapes import choose_shapes, cost, group, round_up
from vlm_jax.errors import UserError

SAMPLE = 500  # records that are measured
MOST_PIXELS = 1003520  # 1,280 tokens of 28 x 28: what Qwen advises for training
FEW_PIXELS = 200704  # 256 tokens; tried where nothing fits otherwise
LEAST_ROW = 1024  # tokens of a packed row
SAVES = 0.9  # packing is on where it leaves less of the work than this


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a sample measured at some max_pixels (None: images have one size).

    sizes int [N, 2]: tokens and patches; bad: records that cannot be read; first: why. reason: of
    max_pixels.
    """

    sizes: np.ndarray
    max_pixels: int | None
    reason: str
    bad: int
    first: str


def pixel_limits(encoder: Encoder, records: Any) -> list[tuple[int | None, str]]:
    """Return the (value, reason) of data.max_pixels to try, the best first; None: leave it out."""
    if encoder.media.pixels is None:
        return [(None, "")]
    low, high = encoder.media.pixels
    unit = encoder.config.cell**2
    areas = []
    for index in sample(len(records), SAMPLE):
        with contextlib.suppress(UserError):  # counted by `measure`
            areas += [h * w for h, w in encoder.media.headers(records[int(index)])["image"]]
    if not areas:
        return [(None, "")]
    asked = int(np.quantile(areas, 0.95))
    bounds = {
        -(-asked // unit) * unit: "95 of 100 images have no more",
        high: "the checkpoint's own limit",
        MOST_PIXELS: "of larger images little is gained",
    }
    best = min(bounds)
    few = [(FEW_PIXELS, "more does not fit the hardware")] if best > FEW_PIXELS >= low else []
    return [(max(low, best), bounds[best]), *few]


def measure(encoder: Encoder, records: Any, max_pixels: int | None, reason: str = "") -> Sizes:
    """Return the sizes of a seeded sample; raises `UserError` where none can be trained on."""
    sampled = sample(len(records), SAMPLE)
    measures = StreamMeasures(0, path="")
    measurer = Measurer(encoder, records, measures, skip_bad=True)
    measurer.measure(sampled, threads=2)
    kept = measures.kept(sampled)
    dropped = np.setdiff1d(sampled, kept)
    first = measurer.why(int(dropped[0])) if len(dropped) else ""
    if len(kept) == 0:
        raise UserError(
            f"None of the {len(sampled)} records of '{records.name}' that were looked at can be "
            f"trained on. The first: {first}"
        )
    return Sizes(measures.sizes(kept)[:, :2], max_pixels, reason, len(dropped), first)


class RowChoice(NamedTuple):
    """shape: tokens and patches of a row. density: examples a row. saved: share of the work that
    packing spares. longer: examples of the sample that do not fit as they are."""

    shape: tuple[int, int]
    packing: bool
    density: float
    saved: float
    longer: int


def choose_row(encoder: Encoder, sizes: np.ndarray) -> RowChoice:
    """Return how long rows should be, and whether several examples should share one.

    99 of 100 examples fit as they are. Packing is on where its rows cost clearly less to compute
    than padded ones.
    """
    unit = encoder.config.patch_unit
    length = round_up(int(np.quantile(sizes[:, 0], 0.99, method="higher")))
    fitting = sizes[sizes[:, 0] <= length]
    patches = round_up(int(fitting[:, 1].max()), unit)
    shapes = choose_shapes(fitting, (length, patches), 4, unit)
    rows = min(8, len(fitting))
    padded = sum(rows * cost(np.array(shape)) for _, shape in group(fitting, rows, shapes))
    packed_length = max(length, LEAST_ROW)
    most = round_up(encoder.config.patches_of(packed_length), unit)
    slots = max(patch_capacity(fitting, packed_length, most, unit), patches)
    packed = pack(fitting, (packed_length, slots))
    filled = row_sizes(packed, fitting)
    ladder = choose_shapes(filled, (packed_length, slots), 4, unit)
    dense = sum(rows * cost(np.array(shape)) for _, shape in group(filled, rows, ladder))
    saved, longer = 1 - float(dense / padded), len(sizes) - len(fitting)
    if dense < SAVES * padded and len(packed) > 1:
        return RowChoice((packed_length, slots), True, len(fitting) / len(packed), saved, longer)
    return RowChoice((length, patches), False, 1.0, saved, longer)
