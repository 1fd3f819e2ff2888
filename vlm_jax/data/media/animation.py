"""The frames of an animated picture (GIF, WebP, APNG, AVIF), by Pillow alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import ImageOps

from vlm_jax.data.media.access import Access
from vlm_jax.data.media.frame_sampling import Sampling, Video
from vlm_jax.data.media.images import open_image, to_rgb, upright_size
from vlm_jax.errors import refuse
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
        numbers = (  # the picture that programs show which know no animation may be no frame
            range(bool(image.info.get("default_image")), getattr(image, "n_frames", 1))
            if image.format in ANIMATED
            else range(1)
        )
        height, width = upright_size(image)
        count = len(numbers)
        refuse(
            (count < 2 and image.format != "GIF", still),
            (
                count > MAX_ANIMATION_FRAMES or count * height * width > MAX_ANIMATION_PIXELS,
                f"it is an animation of {count} frames of {width} x {height} pixels, more than "
                f"{MAX_ANIMATION_FRAMES} frames or {MAX_ANIMATION_PIXELS} pixels in all. Write it "
                f"as a video, as MP4 for example.",
            ),
        )
        image.seek(numbers[0])
        image.load()  # some formats tell how long a frame is shown only with it
        milliseconds = image.info.get("duration") or MILLISECONDS
    rate = 1000 / milliseconds
    wanted, fps = sampling.taken(count, rate)

    def read() -> Iterator[np.ndarray]:
        with open_image(file, None, access) as opened:
            for number in wanted:  # Pillow goes through all that lie between
                opened.seek(numbers[number])
                yield np.array(to_rgb(ImageOps.exif_transpose(opened)))

    return Video(len(wanted), height, width, read, pixels, fps, [n / rate for n in wanted])
