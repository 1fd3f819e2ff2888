"""`preprocessor_config.json` to an image processor."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.media.fixed_size import Fixed
from vlm_jax.data.media.processors import Patches
from vlm_jax.errors import UserError, explained, nearest
from vlm_jax.files.limits import LARGEST, SIZE, finite, read_json
from vlm_jax.models.family import Family

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COMMON: dict[str, Any] = {
    "do_resize": True,
    "default_to_square": False,  # what a bare integer as size means
    "resample": 3,  # bicubic
    "do_center_crop": False,
    "crop_size": None,
    "do_pad": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "do_convert_rgb": True,
}
CLIP = {
    **COMMON,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}
ImageProcessor = Patches | Fixed  # what the rest of the package uses of them, both have
# image_processor_type -> (what makes the processor, the defaults of keys a file leaves out).
PROCESSORS: dict[str, tuple[Callable[..., ImageProcessor], dict[str, Any]]] = {
    "Qwen2VLImageProcessor": (
        Patches.from_settings,
        {
            **COMMON,
            "size": None,
            "min_pixels": None,
            "max_pixels": None,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
    ),
    "CLIPImageProcessor": (Fixed.from_settings, CLIP),
    "LlavaImageProcessor": (Fixed.from_settings, CLIP),
    "SiglipImageProcessor": (
        Fixed.from_settings,
        {
            **COMMON,
            "size": {"height": 224, "width": 224},
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
        },
    ),
    "Gemma3ImageProcessor": (
        Fixed.from_settings,
        {
            **COMMON,
            "size": {"height": 224, "width": 224},
            "default_to_square": True,
            "resample": 2,  # bilinear
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
        },
    ),
}
# Keys that settings files carry and that change no pixel of a still image here.
IGNORED = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "return_tensors",
    "data_format",
    "input_data_format",
    "device",
    "disable_grouping",
    "image_seq_length",
    "_valid_processor_keys",
    # Of Gemma 3's crops, without which (do_pan_and_scan) they change nothing.
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
}
# (file, key within it), in the order of transformers, whose release 5 writes the nested one.
IMAGE_FILES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", ""))


def read_settings(*directories: str | Path) -> dict[str, Any] | None:
    """Return the image settings of the first directory that has some, or None.

    `processor_config.json` with a nested "image_processor" (transformers 5 writes it) comes before
    `preprocessor_config.json`, as in transformers.
    """
    return read_first(directories, IMAGE_FILES)


def read_first(
    directories: Sequence[str | Path], files: Sequence[tuple[str, str]]
) -> dict[str, Any] | None:
    """Return the settings of the first (file, key within it) that a directory has, or None.

    All files of the first directory come before those of the next one.
    """
    for directory, (name, key) in itertools.product(directories, files):
        path = Path(directory, name)
        settings: Any = read_json(path) if path.is_file() else None
        if settings is not None and key:
            settings = settings.get(key)
        if isinstance(settings, Mapping):
            return dict(settings)
        if settings is not None:
            raise UserError(
                f"The image settings in '{path}' are not a JSON object: {settings!r:.80}."
            )
    return None


def check_keys(
    kind: str, raw: Mapping[str, Any], name: str, known: Collection[str], without_effect: Set[str]
) -> None:
    """Raise `UserError` for a key of image or video settings whose effect is not known."""
    for key, value in raw.items():
        if key not in {*known, *without_effect} and value not in (None, False):
            raise UserError(
                f"The {kind} settings have {key}={value!r:.80}, whose effect on {name} is not known"
                f"{nearest(key, known)}. Known keys: {', '.join(known)}."
            )


def make_processor(
    raw: Mapping[str, Any],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    image_resolution: int | None = None,
) -> ImageProcessor:
    """Return the image processor that settings (`preprocessor_config.json`) describe.

    min_pixels, max_pixels: replace the file's limits (dynamic resolution only). image_resolution:
    the side of a square; where resolution is dynamic it is rounded to whole merge blocks and its
    area becomes both limits, so that an image keeps its aspect ratio, as it does when served; a
    tower of fixed size takes only its own side. Raises `UserError` for an unknown type or an
    unsupported key.
    """
    named = raw.get("image_processor_type") or raw.get("feature_extractor_type")
    name = str(named or "").removesuffix("Fast").removesuffix("Pil")
    name = name.replace("FeatureExtractor", "ImageProcessor")
    if name not in PROCESSORS:
        raise UserError(
            f"The image settings (preprocessor_config.json) have image_processor_type {named!r}, "
            f"which is not supported{nearest(name, PROCESSORS)}. "
            f"Supported: {', '.join(PROCESSORS)}."
        )
    if raw.get("do_pan_and_scan"):
        raise UserError(
            "The image settings have do_pan_and_scan=true: crops beside an image are not supported "
            "yet. Set it to false, so that an image is resized as a whole."
        )
    make, defaults = PROCESSORS[name]
    check_keys("image", raw, name, defaults, IGNORED)
    if name != "LlavaImageProcessor" and raw.get("do_pad"):
        raise UserError(f"The image settings have do_pad=true, which {name} is not known to do.")
    given = {key: raw[key] for key in defaults if raw.get(key) is not None}
    for key, value in given.items():
        if expected := _misfit(key, value, defaults[key]):
            raise UserError(
                f"The image settings have {key}={value!r:.80}; expected {expected}. They stand "
                f"in preprocessor_config.json or processor_config.json."
            )
    settings = {**defaults, **given, "image_processor_type": name}
    return make(settings, min_pixels, max_pixels, image_resolution)


def _misfit(key: str, value: Any, default: Any) -> str | None:
    """Return what was expected of a setting where its value is of another kind, else None."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and finite(value)

    def count(value: Any) -> bool:
        return number(value) and isinstance(value, int) and 1 <= value <= LARGEST.get(key, SIZE)

    numbers = value if isinstance(value, list | tuple) else [value] * 3
    three = len(numbers) == 3 and all(map(number, numbers))
    sides = value.values() if isinstance(value, Mapping) else [value]
    fits, expected = next(
        (fits, expected)
        for applies, fits, expected in (
            (isinstance(default, bool), isinstance(value, bool), "true or false"),
            # Which is divided by.
            (key == "image_std", three and 0 not in numbers, "three numbers that are not 0"),
            (isinstance(default, tuple), three, "three numbers"),
            (isinstance(default, float), number(value), "a number"),
            (key == "resample", value in range(6), "one of Pillow's filters, 0 to 5"),
            (
                key in ("size", "crop_size"),
                all(side is None or count(side) for side in sides),
                f"an object of whole numbers up to {SIZE:,} such as height and width",
            ),
            (True, count(value), f"a whole number of 1 to {LARGEST.get(key, SIZE):,}"),
        )
        if applies
    )
    return None if fits else expected


def check_processor(processor: ImageProcessor, config: Family, directory: str) -> None:
    """Raise `UserError` where the processor's pixels are not what the model takes."""
    side, merged = math.isqrt(processor.merged), config.patch_unit if config.HAS_GRIDS else 1
    grid = None if processor.largest is None else (1, side, side)  # of one image feature
    # No pixel is made: settings may ask for any number.
    pixels = {"pixel_values": np.zeros(processor.empty([grid]).shape, np.float32)}
    if grid is not None:
        pixels["image_grid_thw"] = np.array([grid], np.int64)
    with explained(
        UserError,
        lambda error: (
            f"The image settings of '{directory}' (preprocessor_config.json) do not fit "
            f"its config.json: {error}"
        ),
    ):
        if processor.merged != merged:
            raise UserError(f"merge_size squared is {processor.merged}, but must be {merged}.")
        config.layout(np.full(config.image_tokens(grid), config.image_token_id), pixels)
