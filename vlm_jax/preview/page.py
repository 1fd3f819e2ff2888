"""A preview as one self-contained HTML page: no script, no font, no network."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from vlm_jax.errors import marked
from vlm_jax.preview.collect import Histogram, Preview, first_messages
from vlm_jax.preview.example import Picture, Piece

TEMPLATE = Path(__file__).parent / "page.html.jinja"
LOSSLESS = 150_000  # bytes of a PNG; what is larger becomes a JPEG
FRAMES = 32  # of one video that are shown
SHOWN = 340  # pixels that an image is wide on the page, at most
SMALL = 200  # and about at least: less is enlarged by a whole number


def render(preview: Preview) -> str:
    """Return the page; whatever comes from data is escaped, and hidden characters are marks."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: marked(value) if isinstance(value, str) else value,
    )
    environment.filters.update(
        number=lambda value: f"{value:,}",
        percent=lambda share: f"{100 * share:.1f} %",
        visible=visible,
        weight=weight,
        title=title,
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        p=preview,
        report=preview.report,
        dropped=first_messages(preview.report),
        charts=[chart(one) for one in preview.histograms],
        data_uri=data_uri,
        grid=grid,
        display_width=display_width,
        frames_shown=FRAMES,
    )


def visible(text: str) -> str:
    """Return text with what is not seen as marks: line breaks, and see `errors.marked`."""
    return marked(text.replace("\n", "↵\n").replace("\t", "⇥\t"))


def weight(piece: Piece) -> str:
    """Return a weight that is neither 0 nor 1, as the page writes it; "" for those two."""
    return "" if piece.weight in (0, 1) else f"×{piece.weight:g}"


def title(piece: Piece) -> str:
    """Return what hovering over a token tells."""
    share = f" · loss weight {piece.weight:g}" if piece.weight else ""
    return f"token {piece.start} · id {piece.token} · position {piece.position}{share}"


def data_uri(pixels: np.ndarray) -> str:
    """Return uint8 [height, width, 3] as a PNG's data URI, or a JPEG's where that is large."""
    image, buffer, kind = Image.fromarray(pixels), io.BytesIO(), "png"
    image.save(buffer, "PNG")
    if buffer.tell() > LOSSLESS:
        buffer, kind = io.BytesIO(), "jpeg"
        image.save(buffer, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def display_width(picture: Picture) -> int:
    """Return how wide the page shows a picture: small ones enlarged, so that the grid is seen."""
    if picture.kind == "video":
        return min(max(picture.width, 110), 165)
    return min(SHOWN, picture.width * max(1, round(SMALL / picture.width)))


def grid(picture: Picture) -> str:
    """Return the SVG path of the lines between the cells that one token sees each."""
    cell, height, width = picture.cell, picture.height, picture.width
    down = [f"M{x} 0V{height}" for x in range(cell, width, cell)]
    across = [f"M0 {y}H{width}" for y in range(cell, height, cell)]
    return "".join(down + across)


def chart(data: Histogram) -> dict[str, Any]:
    """Return a histogram's bars in a box of 300 x 80, and what is written under it."""
    most = max(count for _, _, count in data.bars)
    each = 300 / len(data.bars)
    bars = [
        {
            "x": round(i * each + 0.5, 2),
            "y": round(80 - 76 * count / most, 2),
            "width": round(each - 1, 2),
            "height": round(76 * count / most, 2),
            "label": f"{low:,} to {high:,}: {count:,} examples",
        }
        for i, (low, high, count) in enumerate(data.bars)
    ]
    words = [f"median {data.median:,}", f"99 % ≤ {data.high:,}", f"largest {data.largest:,}"]
    if data.limit is not None:
        words.append(f"limit {data.limit:,}")
    return {
        "name": data.name,
        "bars": bars,
        "first": data.bars[0][0],
        "last": data.bars[-1][1],
        "words": " · ".join(words),
    }
