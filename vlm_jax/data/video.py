"""Reads the frames of a video that are sampled, and before that their number and size alone.

Which frames: those of Qwen's own utilities (`qwen-vl-utils`, `smart_nframes` and the `linspace`
behind it, https://github.com/QwenLM/Qwen2.5-VL): fps frames a second, at least min_frames, at most
max_frames and never more than there are, in multiples of the temporal patch, spread evenly from
the first frame to the last.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageSequence

from vlm_jax.data.access import Access, check_pixels, find
from vlm_jax.data.images import DAMAGED, image_size, open_image, read_image, to_rgb
from vlm_jax.errors import UserError, nearest

# What a video dict may say beside its source; the names are those of Qwen's utilities.
SAMPLING = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
PIXELS = ("min_pixels", "max_pixels")
SOURCES = ("video", "path", "bytes", "url")
STILLS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
INSTALL = "pip install 'vlm_jax[video]'"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames are taken. nframes, if set, replaces fps; video_start and video_end are seconds.

    factor: what the number of frames is a multiple of, the frames of one patch.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    nframes: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    factor: int = 2

    def indices(self, total: int, rate: float) -> np.ndarray:
        """Return which of `total` frames at `rate` frames a second are taken, in order.

        A video with fewer frames than one patch gives all it has.
        """
        first, last = 0, total - 1
        if self.video_start is not None:
            first = max(0, math.ceil(self.video_start * rate))
        if self.video_end is not None:
            last = min(last, math.floor(self.video_end * rate))
        if first > last:
            raise UserError(
                f"video_start = {self.video_start} and video_end = {self.video_end} leave none of "
                f"its {total} frames ({total / rate:.2f} seconds)."
            )
        total = last - first + 1
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
            wanted = min(max(total / rate * self.fps, least), most, total)
            count = math.floor(wanted / self.factor) * self.factor
            if count < 1:
                raise UserError(f"max_frames is {self.max_frames}: give {self.factor} or more.")
        return spread(first, last, count)


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

    pixels: the record's own min_pixels and max_pixels. Frames are uint8 [H, W, 3].
    """

    count: int
    height: int
    width: int
    frames: Callable[[], Iterator[np.ndarray]]
    pixels: Mapping[str, int]


def open_video(source: Any, folder: str | Path | None, access: Access, sampling: Sampling) -> Video:
    """Return the video with only headers read.

    source: a path or an address, bytes, a list of frame images (each as `read_image` takes it,
    all taken, the last repeated to fill a patch), an array [frames, H, W, 3], or a dict of one of
    these as "video" and any of `SAMPLING` and `PIXELS`. An animated GIF is a video.
    Raises `UserError` that says what is wrong; the caller adds whose video it is.
    """
    options: dict[str, Any] = {}
    if isinstance(source, Mapping):
        source, options = _unpack(source)
    pixels = {key: int(options.pop(key)) for key in PIXELS if key in options}
    if "fps" in options:  # the checkpoint's own number of frames, if it sets one, gives way
        sampling = dataclasses.replace(sampling, nframes=None)
    sampling = dataclasses.replace(sampling, **options)
    if isinstance(source, np.ndarray) and source.ndim == 4:
        source = list(source)
    if isinstance(source, list | tuple):
        return _open_frames(list(source), folder, access, sampling, options, pixels)
    name, file = _find(source, folder, access)
    if _is_gif(file):
        return _open_gif(file, name, access, sampling, pixels)
    return _open_file(file, name, access, sampling, pixels)


def _unpack(source: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    options = {key: value for key, value in source.items() if value is not None}
    given = [options.pop(key) for key in SOURCES if key in options]
    known = (*SOURCES, *SAMPLING, *PIXELS)
    unknown = sorted(map(str, options.keys() - {*known, "type"}))
    options.pop("type", None)
    if unknown or not given:
        what = f"has '{unknown[0]}'{nearest(unknown[0], known)}" if unknown else "has no 'video'"
        raise UserError(f"the video {what}; expected 'video' and any of {', '.join(known[4:])}.")
    for key, value in options.items():
        least = 0 if key in ("video_start", "video_end") else 1e-9
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = key in ("fps", "video_start", "video_end") or isinstance(value, int)
        if not (number and whole and least <= value < math.inf):
            raise UserError(f"its {key} is {value!r}; expected a positive number.")
    if "fps" in options and "nframes" in options:
        raise UserError("it has both fps and nframes, which exclude each other. Leave one out.")
    return given[0], options


def _find(source: Any, folder: str | Path | None, access: Access) -> tuple[str, Path | bytes]:
    if isinstance(source, bytes | bytearray):
        return f"the {len(source)} bytes", bytes(source)
    if not isinstance(source, str | Path):
        raise UserError(
            f"a video is a path, bytes, a list of frames, or a dict with 'video', not "
            f"{type(source).__name__}."
        )
    text = str(source)
    if text.lower().endswith(STILLS):
        raise UserError(f"'{text}' is a still image; a video of frame files is a list of them.")
    found = find(text, folder, access)
    if found is None:
        raise UserError(f"there is no file '{str(Path(folder or '', text))[:300]}'.")
    return f"'{text}'", found


def _is_gif(file: Path | bytes) -> bool:
    if isinstance(file, bytes):
        return file[:4] == b"GIF8"
    with open(file, "rb") as opened:
        return opened.read(4) == b"GIF8"


def _open_frames(
    frames: list[Any],
    folder: str | Path | None,
    access: Access,
    sampling: Sampling,
    options: dict[str, Any],
    pixels: dict[str, int],
) -> Video:
    """A list of frames is taken whole; `fps` tells how it was sampled and changes nothing."""
    if not frames:
        raise UserError("the list of frames is empty.")
    for key in ("video_start", "video_end"):
        if key in options:
            raise UserError(f"it has {key}, but a list of frames has no seconds. Take it out.")
    if sampling.nframes is not None:
        frames = [frames[i] for i in sampling.indices(len(frames), 1.0)]
    if len(frames) > sampling.max_frames:
        raise UserError(
            f"it lists {len(frames)} frames, more than max_frames = {sampling.max_frames}. List "
            f"fewer, give nframes, or raise data.video_max_frames."
        )
    sizes = [image_size(frame, folder, access) for frame in frames]
    for number, size in enumerate(sizes):
        if size != sizes[0]:
            raise UserError(
                f"frame {number} has {size[0]} x {size[1]} pixels and frame 0 has {sizes[0][0]} x "
                f"{sizes[0][1]}: the frames of a video must have one size."
            )

    def read() -> Iterator[np.ndarray]:
        return (read_image(frame, folder, access) for frame in frames)

    return Video(len(frames), *sizes[0], read, pixels)


def _open_gif(
    file: Path | bytes, name: str, access: Access, sampling: Sampling, pixels: dict[str, int]
) -> Video:
    image = open_image(file, None, access)
    try:
        total = getattr(image, "n_frames", 1)
        milliseconds = image.info.get("duration") or 100  # what browsers take for none
    except DAMAGED as error:
        raise UserError(f"{name} is a damaged GIF ({error}).") from error
    finally:
        image.close()
    wanted = sampling.indices(total, 1000 / milliseconds)

    def read() -> Iterator[np.ndarray]:
        with open_image(file, None, access) as opened:
            try:
                for number, frame in enumerate(ImageSequence.Iterator(opened)):
                    for _ in range(int((wanted == number).sum())):
                        yield np.array(to_rgb(frame))
            except DAMAGED as error:
                raise UserError(f"{name} is damaged or truncated ({error}).") from error

    return Video(len(wanted), image.size[1], image.size[0], read, pixels)


@contextlib.contextmanager
def _container(file: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """Give (container, video stream); what PyAV raises inside becomes a `UserError`."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"Reading {name} needs PyAV, which is not installed: {INSTALL}. A list of frame images "
            f"or an animated GIF needs nothing."
        ) from error
    try:
        with av.open(io.BytesIO(file) if isinstance(file, bytes) else str(file)) as container:
            if not container.streams.video:
                raise UserError(f"{name} holds no video stream.")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise UserError(f"{name} is not a readable video ({error}).") from error


def _open_file(
    file: Path | bytes, name: str, access: Access, sampling: Sampling, pixels: dict[str, int]
) -> Video:
    with _container(file, name) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        # Some containers (Matroska) do not say: their packets are counted, not decoded.
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        rate = float(stream.average_rate or stream.guessed_rate or 0)
    if total < 1 or rate <= 0 or width < 1 or height < 1:
        raise UserError(
            f"{name} does not say how long it is ({total} frames at {rate} a second, {width} x "
            f"{height} pixels). Write it again, as MP4 for example."
        )
    check_pixels(width, height, access)
    wanted = sampling.indices(total, rate)

    def read() -> Iterator[np.ndarray]:
        given = 0
        with _container(file, name) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                times = int((wanted == number).sum())
                for _ in range(times):
                    check_pixels(frame.width, frame.height, access)
                    # A phone's video lies on its side and says by how much to turn it.
                    turns = round(frame.rotation / 90)
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                given += times
                if given == len(wanted):
                    return
        raise UserError(
            f"{name} is damaged or truncated: its header promises {total} frames, but only "
            f"{given} of the {len(wanted)} sampled ones are there. Write it again."
        )

    return Video(len(wanted), height, width, read, pixels)
