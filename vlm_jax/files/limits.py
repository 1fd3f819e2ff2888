"""Limits on untrusted files (size, depth, time, finiteness, place), and their reasons.

What is read from a file that somebody else wrote is held against these before it is used. Each is
far above what real files need and far below what stops a machine.
"""

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.files.file_types import lost

# Settings, weights and patterns.
JSON_BYTES = 1 << 26  # an index of 90,000 tensors, the longest that is known, has 9 MB
CONFIG_BYTES = 1 << 18  # a run's config has a few thousand; YAML is read at 100 kB a second
DEPTH = 50  # objects and lists in each other: settings have fewer than ten
VALUES = 2_000_000  # in one file, each alias of YAML counted as what it stands for
PATTERNS = 10_000  # regexes of one adapter: one for each module of 126 layers is 882
PATTERN_LETTERS = 10_000  # of one regex; the longest that tools write has some hundred
PATTERN_WAYS = 300_000  # of matching one name: some milliseconds
PATTERN_SECONDS = 2  # of one processor, for all regexes of a file on all names of a model
SIZE = 2**31 - 1  # what an index of an array holds
NUMBER = 1e30  # what is computed with has to be a float32
# Key of a config.json or of image settings -> its most, where less than SIZE.
LARGEST: dict[str, float] = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1 << 14),  # 126; 12,000 are planned for
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim"), 1 << 18),  # 53,248
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 1 << 12),  # 128
    **{"head_dim": 1 << 12, "mlp_ratio": 1_000},  # 512, 5.4
    **{"image_size": 1 << 12, "patch_size": 1 << 8},  # 1,540 and 32 pixels
    **dict.fromkeys(("in_channels", "in_chans", "num_channels", "temporal_patch_size"), 16),  # 3, 2
    **dict.fromkeys(("spatial_merge_size", "merge_size"), 16),  # 4
    **{"patch_values": 1 << 16},  # 2 frames of 3 x 28 x 28 pixels are 4,704
    **dict.fromkeys(("num_frames", "min_frames", "max_frames"), 1 << 20),  # 768
}
IMAGE_PIXELS = 1 << 24  # what images are enlarged to, 4,096 squared: towers see 1,540 squared

# Pictures and videos

# Pillow tells a format by content, whatever a file is called, and has plug-ins for some forty: one
# starts a program (EPS: Ghostscript, which has had escapes from its sandbox), others are old, rare
# and little tested. These are what cameras, phones, browsers and scanners write. HEIF is added
# where pillow-heif is installed.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# FFmpeg's demuxers likewise: containers and plain streams. Playlists (hls, dash, concat, sdp, image
# sequences) open what they name, other files and addresses.
VIDEO_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "mxf", "ivf"),
    *("h264", "hevc", "m4v", "mjpeg", "dv"),
)
# Twice Pillow's Image.MAX_IMAGE_PIXELS, above which Pillow itself refuses: 13,377 pixels squared.
# The default of data.max_image_pixels. (A text chunk of a PNG may have 1 MiB, all of them 64, by
# Pillow's own limits.)
MAX_IMAGE_PIXELS = 178_956_970
# Frames of an animation come one after another, each drawn upon the last: 17 minutes at 10 a
# second, and in pixels 8,000 frames of 1920 x 1080, a few minutes of decoding.
MAX_ANIMATION_FRAMES = 10_000
MAX_ANIMATION_PIXELS = 2**34
MAX_VIDEO_FRAMES = 10_000_000  # 92 hours at 30 a second
FETCH_SECONDS = 30  # without a byte of an address's answer
FETCH_BYTES = 256 * 2**20
# Chat templates: a checkpoint's own code, kept from files by its sandbox but not from the clock.
TEMPLATE_SOURCE = 2**20  # characters; the longest in use (tools, thoughts, media) have 30,000
TEMPLATE_SECONDS = 5.0  # for one rendering; a conversation of 10,000 turns takes a tenth of one
TEMPLATE_CHARACTERS = 64 * 2**20  # of a text on its way, a prompt of 64 MB is none
TEMPLATE_NUMBER = 2**20  # an argument (a width, a count), and the bits of a number that is computed

# CSV and TSV: a quote that nothing closes would make one row of all that follows.
CSV_ROW_BYTES = 64 * 2**20  # a row may hold a picture in base64


def shallow(tree: Any, file: Any, hint: str = "") -> None:
    """Raise `UserError` where settings are nested too deep, too many, or hold NaN or infinity.

    file: what errors name. hint: what they say of a number that is none.
    """
    waiting, seen = [("", tree, 1)], 0
    while waiting:
        key, value, depth = waiting.pop()
        seen += 1
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{name}", one, depth + 1) for name, one in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{key}[{i}]", one, depth + 1) for i, one in enumerate(value)]
        elif isinstance(value, int | float) and not finite(value):
            raise UserError(
                f"'{file}' has {key.lstrip('.')} = {number_word(value)}; expected a finite number."
                f"{hint}"
            )
        if depth > DEPTH or seen > VALUES:
            much = f"more than {VALUES:,} values" if seen > VALUES else f"more than {DEPTH} levels"
            raise UserError(
                f"'{file}' nests or repeats {much} of objects and lists: it is not a config, but "
                f"damaged or made to stop what reads it."
            )


def finite(value: float) -> bool:
    """Return whether a number is one that a float holds."""
    return abs(value) <= sys.float_info.max  # a whole number may have more than 308 digits


def number_word(value: float) -> str:
    """Return a number in few letters: 10 ** 400 would have 401."""
    short = finite(value) or isinstance(value, float)
    return f"{value:,}" if short else "a number of more than 308 digits"


def number(name: str, value: float, where: str, above: float | None = None) -> None:
    """Raise `UserError` for a number of settings that is not finite, too large, or not above."""
    most = LARGEST.get(name, SIZE if isinstance(value, int) else NUMBER)
    if not finite(value) or abs(value) > most or (above is not None and value <= above):
        expected = "a finite number" if not finite(value) else f"at most {most:,}"
        if above is not None and value <= above:
            expected = f"more than {above:g}"
        raise UserError(f"The {where} has {name} = {number_word(value)}; expected {expected}.")


def read_text(path: Path, most: int, what: str) -> str:
    """Return a file's text; raise `UserError` where it is too large for what it should be."""
    size = path.stat().st_size
    if size > most:
        raise UserError(
            f"'{path}' has {size:,} bytes; {what} has at most {most:,}. It is another file than "
            f"its name says, or damaged."
        )
    return path.read_text(encoding="utf-8")


def parse_json(text: str, file: Any) -> Any:
    """Return what JSON text holds, within the limits; raises `UserError` that names the file."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{file}' is not valid JSON: line {error.lineno}, column {error.colno}, {error.msg}."
            f"{lost(file)}"
        ) from error
    except RecursionError:
        raise UserError(
            f"'{file}' nests objects and lists thousands deep: it is not a config, but damaged or "
            f"made to stop what reads it."
        ) from None
    except ValueError as error:  # of Python's, see sys.set_int_max_str_digits
        raise UserError(f"'{file}' holds a number of more than 4,300 digits.") from error
    shallow(tree, file, " The file is damaged, or was written by a run that diverged.")
    return tree


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; raise `UserError` where it is missing or no JSON object."""
    try:
        text = read_text(path, JSON_BYTES, "a file of settings")
    except FileNotFoundError:
        raise UserError(f"There is no file '{path}'. A checkpoint directory needs it.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"'{path}' cannot be read as JSON: {error}.") from error
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds a JSON {type(value).__name__}; expected an object.")
    return value


def parse_yaml(text: str, file: Any) -> Any:
    """Return what YAML text holds, within the limits; raises `UserError`, or yaml's own errors.

    An alias may stand for anything that holds no alias: else ten lines stand for 10 ** 10 values.
    """
    import yaml

    opened = depth = 0  # levels; how many of them began with the outermost anchor
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) and opened:
            raise UserError(
                f"'{file}', line {event.start_mark.line + 1}: the alias *{event.anchor} stands in "
                f"what has an anchor itself, which could repeat without end: it is not a config. "
                f"Write out one of the two."
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth, opened = depth + 1, opened + bool(opened or event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth, opened = depth - 1, max(0, opened - 1)
        if depth > DEPTH:
            raise UserError(
                f"'{file}', line {event.start_mark.line + 1}: more than {DEPTH} levels of maps and "
                f"lists in each other: it is not a config."
            )
    tree = yaml.safe_load(text)
    shallow(tree, file)
    return tree


def is_file_name(name: Any) -> bool:
    """Return whether a name is that of a file in the very directory of the file that names it.

    A link to elsewhere is a file of that directory: the hub's cache is made of such, and no
    download makes one.
    """
    return isinstance(name, str) and re.fullmatch(r"[^/\\\0]+", name) is not None and name != ".."


# dtype -> bits of its fraction.
FRACTIONS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
PIECE = 1 << 16  # values: what stays in a core's cache while it is looked at twice


def all_finite(array: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite; True of what holds no floats.

    By the bits: all that is not finite has the largest exponent, so as whole numbers they are the
    largest of their sign. That is several times as fast as `np.isfinite`, and makes no array.
    """
    if array.dtype.name not in FRACTIONS:
        return True
    sign = 1 << (8 * array.itemsize - 1)
    infinity = sign - (1 << FRACTIONS[array.dtype.name])  # as bits
    flat = np.ascontiguousarray(array).reshape(-1)
    signed, unsigned = flat.view(f"i{array.itemsize}"), flat.view(f"u{array.itemsize}")
    pieces = [slice(start, start + PIECE) for start in range(0, flat.size, PIECE)]
    return all(
        signed[piece].max() < infinity and unsigned[piece].max() < infinity + sign
        for piece in pieces
    )


def check_finite(array: np.ndarray, name: str, file: Any) -> None:
    """Raise `UserError` where a tensor holds NaN or infinity."""
    if not all_finite(array):
        raise UserError(
            f"The tensor '{name}' in '{file}' holds {np.count_nonzero(~np.isfinite(array)):,} of "
            f"{array.size:,} values that are NaN or infinite: every answer would be nonsense. The "
            f"file is damaged, or its training diverged: fetch it again, or use an earlier "
            f"checkpoint."
        )


# What cannot be counted: a group that is repeated, or matched again by reference, and patterns
# whose white space means nothing.
REPEATED = re.compile(r"\)[*+{]|\\[1-9]|\(\?P=|\(\?[a-zA-Z]*x")


@functools.lru_cache(maxsize=4096)
def _is_simple(pattern: str) -> bool:
    """Return whether a regex has at most `PATTERN_WAYS` ways to match a name of 60 letters."""
    loops, groups = len(re.findall(r"[*+{]", pattern)), pattern.count("(") + 1
    maybes = pattern.count("?") - pattern.count("(?")
    if REPEATED.search(pattern) or max(loops, maybes, groups) > 50:
        return False
    choices = (1 + pattern.count("|") / groups) ** groups  # at most, by any share of the "|"
    return math.comb(60 + loops, loops) * 2**maybes * choices <= PATTERN_WAYS


# Prints the number of each regex before it is tried: the last one is what took too long.
CHILD = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({PATTERN_SECONDS}, {PATTERN_SECONDS}))
patterns, texts = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    pattern = re.compile(pattern)
    for text in texts:
        pattern.fullmatch(text)
print("done", flush=True)
"""


@functools.lru_cache(maxsize=64)
def _endless(patterns: tuple[str, ...], texts: tuple[str, ...]) -> int | None:
    """Return the number of the first regex that takes too long on the texts, or None.

    They are tried in a process of its own: in this one nothing could stop them, since `re` looks
    for signals in the main thread alone.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CHILD],
        input=json.dumps([patterns, texts]), capture_output=True, text=True, check=False,
    )  # fmt: skip
    printed = done.stdout.split()
    if not printed:
        raise RuntimeError(f"The regexes {patterns} could not be tried: {done.stderr}")
    return None if printed[-1] == "done" else int(printed[-1])


def check_patterns(
    patterns: Sequence[str],
    texts: Iterable[str],
    what: str,
    expand: Callable[[str], str] = str,
) -> None:
    """Raise `UserError` for a regex that is none, or that takes too long to match any of the texts.

    what: what the regexes are, for errors. expand: gives the regex over a whole text that one
    stands for.
    """
    if len(patterns) > PATTERNS:
        raise UserError(
            f"There are {len(patterns):,} regular expressions, each a {what}; expected at most "
            f"{PATTERNS:,}."
        )
    for pattern in patterns:
        try:
            if len(pattern) > PATTERN_LETTERS:
                raise UserError(
                    f"The {what} {pattern[:60]!r}... has {len(pattern):,} letters; a regular "
                    f"expression may have {PATTERN_LETTERS:,}."
                )
            re.compile(expand(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"The {what} {pattern[:200]!r} is not a regular expression: {error}."
            ) from error
    doubtful = [pattern for pattern in patterns if not _is_simple(expand(pattern))]
    endless = _endless(tuple(map(expand, doubtful)), tuple(texts)) if doubtful else None
    if endless is not None:
        raise UserError(
            f"The {what} {doubtful[endless][:200]!r} takes more than {PATTERN_SECONDS} seconds to "
            f"match the names of this model: repeats within repeats try each way to divide a name. "
            f"Write it without, such as '.*\\.q_proj', or as the plain end of a name."
        )
