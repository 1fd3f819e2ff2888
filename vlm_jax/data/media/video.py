"""Opens a video from any source in a record: sampled frames, their number and size."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.media.access import Access, find, quoted
from vlm_jax.data.media.animation import open_animation
from vlm_jax.data.media.frame_sampling import Sampling, Video
from vlm_jax.data.media.images import image_size, read_image
from vlm_jax.data.media.video_file import open_film
from vlm_jax.errors import UserError, nearest, refuse
from vlm_jax.files.file_types import head_of, kind_of, sentence

# What a video dict may say beside its source; the names are those of Qwen's utilities.
SAMPLING = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
PIXELS = ("min_pixels", "max_pixels")
SOURCES = ("video", "bytes", "path", "url")  # `datasets` gives bytes and the path they had


def open_video(source: Any, folder: str | Path | None, access: Access, sampling: Sampling) -> Video:
    """Return the video with its header read, and its first frame where only that tells the size.

    source: a path or an address, bytes, a list of frame images (each as `read_image` takes it,
    all taken, the last repeated to fill a patch), an array [frames, H, W, 3], or a dict of one of
    these as "video" and any of `SAMPLING` and `PIXELS`. An animated picture is a video.
    Raises `UserError` that says what is wrong; the caller adds whose video it is.
    """
    source, options = _unpack(source) if isinstance(source, Mapping) else (source, {})
    pixels = {key: int(options.pop(key)) for key in PIXELS if key in options}
    if "fps" in options:  # the checkpoint's own number of frames, if it sets one, gives way
        options["nframes"] = None
    sampling = dataclasses.replace(sampling, **options)
    if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
        return _open_frames(list(source), folder, access, sampling, options, pixels)
    if not isinstance(source, str | Path | bytes | bytearray):
        raise UserError(
            f"a video is a path, bytes, a list of frames, or a dict with 'video', not "
            f"{type(source).__name__}."
        )
    found = find(source, folder, access)
    if found is None:
        raise UserError(f"there is no file '{str(Path(folder or '', str(source)))[:300]}'.")
    file, subject = found
    head = head_of(file)
    kind = kind_of(head)
    if kind is None or kind.medium == "video":  # some videos begin with nothing of their own
        return open_film(file, subject, access, sampling, pixels)
    if kind.medium == "image":
        return open_animation(file, sentence(kind, head, subject), access, sampling, pixels)
    raise UserError(sentence(kind, head, subject))


def _unpack(source: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    options = {k: value for k, value in source.items() if value is not None and k != "type"}
    given = [options.pop(key) for key in SOURCES if key in options]
    known = (*SOURCES, *SAMPLING, *PIXELS)
    unknown = sorted(map(str, options.keys() - set(known)))
    if unknown or not given:
        what = f"has '{unknown[0]}'{nearest(unknown[0], known)}" if unknown else "has no 'video'"
        raise UserError(f"the video {what}; expected 'video' and any of {', '.join(known[4:])}.")
    for key, value in options.items():
        least = 0 if key in ("video_start", "video_end") else 1e-9
        kind = int | float if key in ("fps", "video_start", "video_end") else int
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not (is_number and least <= value < math.inf):
            raise UserError(f"its {key} is {value!r}; expected a positive number.")
    if "fps" in options and "nframes" in options:
        raise UserError("it has both fps and nframes, which exclude each other. Leave one out.")
    return given[0], options


def _open_frames(
    frames: list[Any],
    folder: str | Path | None,
    access: Access,
    sampling: Sampling,
    options: dict[str, Any],
    pixels: dict[str, int],
) -> Video:
    """A list of frames is taken whole; `fps` tells how it was sampled."""
    timed = next((key for key in ("video_start", "video_end") if key in options), None)
    refuse(
        (not frames, "the list of frames is empty."),
        (timed, f"it has {timed}, but a list of frames has no time. Remove it."),
    )
    fps = options.get("fps", Sampling.fps)
    times = [number / fps for number in range(len(frames))]
    if sampling.nframes is not None:
        wanted, fps = sampling.taken(len(frames), fps)
        frames, times = [frames[i] for i in wanted], [times[i] for i in wanted]
    if len(frames) > sampling.max_frames:
        raise UserError(
            f"it lists {len(frames)} frames, more than max_frames = {sampling.max_frames}. List "
            f"fewer, give nframes, or raise data.video_max_frames."
        )
    sizes = list(_each(image_size, frames, folder, access))
    height, width = sizes[0]
    for number, size in enumerate(sizes):
        if size != (height, width):
            raise UserError(
                f"frame {number} has {size[0]} x {size[1]} pixels and frame 0 has {height} x "
                f"{width}: the frames of a video must have one size."
            )
    read = functools.partial(_each, read_image, frames, folder, access)
    return Video(len(frames), height, width, read, pixels, fps, times)


def _each(read: Callable[..., Any], frames: list[Any], *place: Any) -> Iterator[Any]:
    """Yield `read(frame, folder, access)` of each frame; errors name its number."""
    for number, frame in enumerate(frames):
        try:
            yield read(frame, *place)
        except UserError as error:
            raise UserError(f"frame {number}{quoted(frame)}: {error}") from error
