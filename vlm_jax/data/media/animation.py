"""The frames of an animated picture (GIF, WebP, APNG, AVIF), by Pillow alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlm_jax.data.media.access import Access
from vlm_jax.data.media.frame_sampling import Sampling, Video
from vlm_jax.data.media.images import DAMAGED, damaged, open_image, to_rgb, upright_size
from vlm_jax.errors import UserError
from vlm_jax.files.limits import MAX_ANIMATION_FRAMES, MAX_ANIMATION_PIXELS

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # the pages of a TIFF and the views of an MPO are no film
MILLISECONDS = 100  # a frame that has no duration, as browsers have it


def open_animation(
    file: Path | bytes,
    still: str,
    access: Access,
    sampling: Sampling,
    pixels: Mapping[str, int],
) -> Video:
    """Return an animation as a video; still: what is said where it is a single picture.

    Its rate is that of its first frame. A GIF may have one frame: that is still given as a video.
    """
    with open_image(file, None, access) as image:
        try:
            numbers = _numbers(image)
            if len(numbers) < 2 and image.format != "GIF":
                raise UserError(still)
            height, width = upright_size(image)
            _check_work(len(numbers), height, width)
            image.seek(numbers[0])
            image.load()  # some formats tell how long a frame is shown only with it
            milliseconds = image.info.get("duration") or MILLISECONDS
        except DAMAGED as error:
            raise damaged(error) from error
    wanted = sampling.indices(len(numbers), 1000 / milliseconds)

    def read() -> Iterator[np.ndarray]:
        with open_image(file, None, access) as opened:
            try:
                for number in wanted:  # Pillow goes through all that lie between
                    opened.seek(numbers[number])
                    yield np.array(to_rgb(ImageOps.exif_transpose(opened)))
            except DAMAGED as error:
                raise damaged(error) from error

    return Video(len(wanted), height, width, read, pixels)


def _numbers(image: Image.Image) -> range:
    """Return Pillow's numbers of the frames that are shown."""
    if image.format not in ANIMATED:
        return range(1)
    # The picture that programs show which know no animation may be none of its frames.
    return range(bool(image.info.get("default_image")), getattr(image, "n_frames", 1))


def _check_work(frames: int, height: int, width: int) -> None:
    if frames > MAX_ANIMATION_FRAMES or frames * height * width > MAX_ANIMATION_PIXELS:
        raise UserError(
            f"it is an animation of {frames} frames of {width} x {height} pixels, more than "
            f"{MAX_ANIMATION_FRAMES} frames or {MAX_ANIMATION_PIXELS} pixels in all. Write it as a "
            f"video, as MP4 for example."
        )
