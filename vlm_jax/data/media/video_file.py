"""Frames and size of a video file, upright, by PyAV."""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.media.access import Access, check_pixels
from vlm_jax.data.media.frame_sampling import Sampling, Video
from vlm_jax.errors import UserError, explained
from vlm_jax.files.limits import MAX_VIDEO_FRAMES, VIDEO_FORMATS

RULES = {"format_whitelist": ",".join(VIDEO_FORMATS), "protocol_whitelist": "file"}
INSTALL = "pip install 'vlm_jax[video]'"


def open_film(
    file: Path | bytes,
    subject: str,
    access: Access,
    sampling: Sampling,
    pixels: Mapping[str, int],
) -> Video:
    """Return the video of a file that FFmpeg reads; subject: what errors call it.

    Its size is that of its first frame as `_upright` gives it. All frames are resized to what
    becomes of that, also where a stream changes its size on the way.
    """
    with _opened(file, subject, access) as (container, stream):
        times, first = _times(container, stream)
        if first is None:
            raise UserError(f"{subject} has no frame that can be decoded: copy it again.")
        total, rate = len(times), _rate(stream, times)
        if total > MAX_VIDEO_FRAMES or rate <= 0:
            raise UserError(
                f"{subject} has {total} frames at {rate:g} a second; expected a rate above 0, and "
                f"at most {MAX_VIDEO_FRAMES} frames. Write it again, as MP4 for example."
            )
        height, width = _upright(first, access).shape[:2]
    wanted, fps = sampling.taken(total, rate)

    def read() -> Iterator[np.ndarray]:
        number = -1
        with _opened(file, subject, access) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                for _ in range((wanted == number).sum()):
                    yield _upright(frame, access)
                if number == wanted[-1]:
                    return
        raise UserError(
            f"{subject} should have {total} frames, but only {number + 1} can be decoded: it is "
            f"damaged or truncated, or begins in the middle of a scene. Write it again."
        )

    return Video(len(wanted), height, width, read, pixels, fps, [n / rate for n in wanted])


@contextlib.contextmanager
def _opened(file: Path | bytes, subject: str, access: Access) -> Iterator[tuple[Any, Any]]:
    """Give (container, video stream); what PyAV raises inside becomes a `UserError`."""
    with explained(
        ImportError,
        lambda _: (
            f"reading a video file needs PyAV, which is not installed: {INSTALL}. A list of frame "
            f"images or an animated picture (GIF, WebP) needs nothing."
        ),
    ):
        import av
    if int(av.__version__.partition(".")[0]) < 17:  # which reads a file's index
        raise UserError(f"PyAV {av.__version__} is too old to read videos here: {INSTALL}")
    given = io.BytesIO(file) if isinstance(file, bytes) else f"file:{file}"
    damaged = explained(
        av.FFmpegError,
        lambda error: (
            f"{subject} is not a video of a supported kind, or it is damaged or cut short "
            f"({error.strerror}). Copy it again, or write it as MP4."
        ),
    )
    with damaged, av.open(given, container_options=RULES) as container:
        stream: Any = container.streams.best("video")
        if stream is None or av.stream.Disposition.attached_pic in stream.disposition:
            raise UserError(f"{subject} holds no video stream, or is cut short.")
        if stream.codec_context is None:
            raise UserError(f"{subject} is coded in a way that FFmpeg does not decode here.")
        check_pixels(stream.codec_context.width, stream.codec_context.height, access)
        # A header may say less than is decoded; sides are padded there (to 128 at most).
        stream.codec_context.options = {"max_pixels": str(2 * access.max_pixels + 2**16)}
        yield container, stream


def _times(container: Any, stream: Any) -> tuple[list[int | None], Any]:
    """Return (when each frame that is shown comes, the first of them as decoded or None).

    Times are in the stream's own unit and in the order of the file; one that says nothing is None.
    An index that lists what the header counts has them. Where it does not (Matroska has none, a
    fragmented MP4 counts its first part, one that was trimmed all that was filmed), packets are
    gone through, which is fast beside decoding them.
    """
    listed = 0 < stream.frames <= MAX_VIDEO_FRAMES and stream.frames == len(stream.index_entries)
    times = [e.timestamp for e in (stream.index_entries if listed else ()) if not e.is_discard]
    first = None
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        elif listed:
            break
        if not listed and packet.size and not packet.is_discard:
            times.append(packet.dts if packet.pts is None else packet.pts)
    return times, first


def _rate(stream: Any, times: list[int | None]) -> float:
    """Return frames a second: the stream's average, or what times tell where it has none."""
    known = [time for time in times if time is not None]
    if stream.average_rate or len(known) < 2 or max(known) == min(known):
        return float(stream.average_rate or stream.guessed_rate or 0)
    return (len(known) - 1) / float((max(known) - min(known)) * stream.time_base)


def _upright(frame: Any, access: Access) -> np.ndarray:
    """Return a frame as uint8 [H, W, 3], turned and mirrored as its display matrix says.

    A phone films on its side and says how to turn it. The shape of a pixel (sample aspect ratio) is
    ignored, as by the reference's readers, and so is a "rotate" tag without a matrix, as by FFmpeg.
    """
    check_pixels(frame.width, frame.height, access)
    pixels = frame.to_ndarray(format="rgb24")
    a, b, c, d = _matrix(frame)  # a point (x, y) of the frame is shown at (a x + c y, b x + d y)
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _matrix(frame: Any) -> tuple[float, float, float, float]:
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV has no name for another of its side data (EXIF): no mirror then
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if found is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(found, np.int32, 5).tolist()
    return a, b, c, d
