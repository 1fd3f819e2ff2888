"""Frame sampling of videos, as in Qwen's own utilities and in transformers.

The former are `qwen-vl-utils`, `smart_nframes` and the `linspace` behind it
(https://github.com/QwenLM/Qwen2.5-VL): fps frames a second, at least min_frames, at most
max_frames and never more than there are, in multiples of the temporal patch, spread evenly from
the first frame to the last. `Qwen3VLVideoProcessor` takes the same without the multiples.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from vlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames are taken. nframes, if set, replaces fps; video_start and video_end are seconds.

    factor: the frames of one patch. whole: whether their number is a multiple of it.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    nframes: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    factor: int = 2
    whole: bool = True

    def taken(self, total: int, rate: float) -> tuple[np.ndarray, float]:
        """Return which of `total` frames at `rate` frames a second are taken, and at what rate.

        In order. A video with fewer frames than one patch gives all it has.
        """
        first = max(0, math.ceil((self.video_start or 0) * rate))
        end = total if self.video_end is None else math.floor(self.video_end * rate)
        last = min(total - 1, end)
        if first > last:
            raise UserError(
                f"video_start = {self.video_start} and video_end = {self.video_end} leave none of "
                f"its {total} frames ({total / rate:.2f} seconds)."
            )
        total = last - first + 1
        if not self.whole:
            least, most = self.min_frames, min(self.max_frames, total)
            own = self.nframes
            count = min(max(int(total / rate * self.fps), least), most) if own is None else own
            if not self.factor <= count <= total:
                raise UserError(
                    f"{count} frames are to be taken of {total}: give nframes, video_min_frames "
                    f"or a longer video such that there are {self.factor} or more."
                )
            return np.linspace(first, last, count).round().astype(int), count / total * rate
        if self.nframes is not None:
            count = round(self.nframes / self.factor) * self.factor
            if not self.factor <= count <= total:
                raise UserError(
                    f"nframes is {self.nframes} (in multiples of {self.factor}: {count}), but "
                    f"there are {total} frames: give {self.factor} to {total}."
                )
        elif total < self.factor:
            count = total
        else:
            least = math.ceil(self.min_frames / self.factor) * self.factor
            most = math.floor(min(self.max_frames, total) / self.factor) * self.factor
            wanted = min(max(total / rate * self.fps, least), most)
            count = math.floor(wanted / self.factor) * self.factor
            if count < 1:
                raise UserError(f"max_frames is {self.max_frames}: give {self.factor} or more.")
        return spread(first, last, count), count / total * rate


def spread(first: int, last: int, count: int) -> np.ndarray:
    """Return `torch.linspace(first, last, count).round()`, halves as they fall there.

    It computes in float32, the first half from the start on and the second from the end back.
    """
    if count == 1:
        return np.array([first])
    step = np.float32(last - first) / np.float32(count - 1)
    number = np.arange(count)
    ahead = np.float32(first) + step * number.astype(np.float32)
    back = np.float32(last) - step * number[::-1].astype(np.float32)
    return np.where(number < count // 2, ahead, back).round().astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Video:
    """A video whose header was read: sampled frames of one size, decoded when iterated over.

    pixels: the record's own min_pixels and max_pixels. fps: how many of a second were taken.
    times: at which second each was.
    Frames are uint8 [H, W, 3].
    """

    count: int
    height: int
    width: int
    frames: Callable[[], Iterator[np.ndarray]]
    pixels: Mapping[str, int]
    fps: float
    times: Sequence[float]
