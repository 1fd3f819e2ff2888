"""Draws seeded scenes of flat coloured shapes, from which the tiny base model learns to see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# Each colour is a pair of RGB corners; a shape's colour is drawn from the box between them.
COLORS = {
    "red": ((205, 0, 0), (255, 50, 45)),
    "green": ((0, 130, 0), (60, 255, 60)),
    "blue": ((0, 0, 185), (50, 75, 255)),
    "yellow": ((230, 215, 0), (255, 255, 70)),
    "teal": ((0, 110, 110), (30, 145, 145)),
    "gray": ((105, 105, 105), (150, 150, 150)),
    "black": ((0, 0, 0), (35, 35, 35)),
    "brown": ((115, 40, 10), (165, 70, 50)),
    "orange": ((240, 115, 0), (255, 160, 30)),
    "purple": ((100, 0, 125), (150, 45, 205)),
    "pink": ((240, 95, 150), (255, 160, 205)),
    "white": ((243, 243, 243), (255, 255, 255)),
}
GRAYS = {"gray", "black", "white"}  # one value for all three channels, or they would be tinted

# The diameter in pixels below which a kind cannot be told from its neighbours.
KINDS = {
    "circle": 6,
    "square": 6,
    "rectangle": 6,
    "triangle": 6,
    "cross": 7,
    "diamond": 7,
    "ring": 9,
    "star": 10,
}
BACKGROUNDS = ("pastel", "pastel", "light", "dark", "gradient")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
GAP = 2  # pixels between the boxes of two shapes
CONTRAST = 90  # sum over channels by which a shape differs from what is behind it


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    width: float
    height: float
    row: int  # third of the picture, from the top
    column: int  # and from the left

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def area(self) -> float:
        return self.width * self.height


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    shapes: tuple[Shape, ...]  # in reading order: by thirds from the top, then from the left


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    count: int,
    smallest: float = 6,
    largest: float = 0.55,
    backgrounds: tuple[str, ...] = BACKGROUNDS,
) -> Scene:
    """Return a picture of `count` shapes that do not overlap, fewer where they find no room.

    smallest: diameter in pixels. largest: of the first, as a share of the picture's shorter side.
    """
    background = draw_background(rng, width, height, backgrounds)
    shapes: list[Shape] = []
    for _ in range(count):
        # The later ones are small enough to find a place beside the first.
        most = min(width, height) * (min(largest, 0.4) if shapes else largest)
        shape = place_shape(rng, background, shapes, smallest, most)
        if shape is not None:
            shapes.append(shape)
    if not shapes:
        return draw_scene(rng, width, height, count, smallest, largest, backgrounds)
    # Half of the pictures have soft edges, as most drawing programs make them.
    scale = 4 if rng.random() < 0.5 else 1
    canvas = Image.fromarray(background)
    if scale > 1:
        canvas = canvas.resize((width * scale, height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        draw_shape(rng, pen, shape, scale, canvas)
    if scale > 1:
        canvas = canvas.reduce(scale)
    shapes.sort(key=lambda shape: (shape.row, shape.column, shape.x))
    return Scene(canvas, tuple(shapes))


def draw_background(
    rng: np.random.Generator, width: int, height: int, styles: tuple[str, ...]
) -> np.ndarray:
    """Return uint8 [height, width, 3]."""
    style = styles[rng.integers(len(styles))]
    low, high = {"pastel": (215, 256), "light": (170, 256), "dark": (0, 70)}.get(style, (0, 256))
    first, second = rng.integers(low, high, (2, 3))
    if style != "gradient":
        return np.broadcast_to(first.astype(np.uint8), (height, width, 3)).copy()
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width]
    slope = x / width * math.cos(angle) + y / height * math.sin(angle)
    slope = (slope - slope.min()) / np.ptp(slope)
    second = np.clip(first + np.clip(second - first, -90, 90), 0, 255)
    return (first + slope[..., None] * (second - first)).astype(np.uint8)


def place_shape(
    rng: np.random.Generator,
    background: np.ndarray,
    others: list[Shape],
    smallest: float,
    largest: float,
) -> Shape | None:
    """Return a shape that touches no other and stands out, or None after too many tries."""
    height, width = background.shape[:2]
    for _ in range(20):
        # Uniform in the logarithm: half of the shapes are below 15 pixels in a picture of 64.
        size = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        kind = list(KINDS)[rng.integers(len(KINDS))]
        if size < KINDS[kind]:
            continue
        wide = tall = size
        if kind == "rectangle":
            narrow = max(4.0, size * rng.uniform(0.35, 0.75))
            wide, tall = (size, narrow) if rng.random() < 0.5 else (narrow, size)
        x = rng.uniform(wide / 2, width - wide / 2)
        y = rng.uniform(tall / 2, height - tall / 2)
        if any(
            abs(x - other.x) < (wide + other.width) / 2 + GAP
            and abs(y - other.y) < (tall + other.height) / 2 + GAP
            for other in others
        ):
            continue
        color = list(COLORS)[rng.integers(len(COLORS))]
        rgb = draw_color(rng, color)
        left, top = int(x - wide / 2), int(y - tall / 2)
        behind = background[top : int(y + tall / 2) + 1, left : int(x + wide / 2) + 1].reshape(
            -1, 3
        )
        if np.abs(behind.astype(int) - rgb).sum(-1).min() < CONTRAST:
            continue
        row, column = min(2, int(3 * y / height)), min(2, int(3 * x / width))
        return Shape(kind, color, rgb, x, y, wide, tall, row, column)
    return None


def draw_color(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    low, high = COLORS[color]
    mix = rng.random() if color in GRAYS else rng.random(3)
    red, green, blue = (np.array(low) + mix * (np.array(high) - np.array(low))).round().astype(int)
    if color == "green":  # a lime green has no more red or blue than a dark one
        red, blue = int(red * 0.9), int(blue * 0.9)
    return int(red), int(green), int(blue)


def draw_shape(
    rng: np.random.Generator,
    pen: ImageDraw.ImageDraw,
    shape: Shape,
    scale: int,
    canvas: Image.Image,
) -> None:
    x, y = shape.x * scale, shape.y * scale
    half_width, half_height = shape.width * scale / 2, shape.height * scale / 2
    box = (x - half_width, y - half_height, x + half_width - 1, y + half_height - 1)
    if shape.kind == "circle":
        pen.ellipse(box, fill=shape.rgb)
    elif shape.kind in ("square", "rectangle"):
        pen.rectangle(box, fill=shape.rgb)
    elif shape.kind == "ring":
        thickness = max(2 * scale, int(half_width * rng.uniform(0.25, 0.5)))
        pen.ellipse(box, outline=shape.rgb, width=thickness)
    else:
        turn = 0.0
        if shape.kind in ("triangle", "star") and rng.random() < 0.4:
            turn = rng.uniform(0, 2 * math.pi)
        corners = outline(shape.kind) @ np.array(
            [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
        )
        pen.polygon([(x + u * half_width, y + v * half_height) for u, v in corners], fill=shape.rgb)


def outline(kind: str) -> np.ndarray:
    """Return the corners [n, 2] of a kind within the square from -1 to 1, y pointing down."""
    if kind == "triangle":
        return np.array([(0, -1), (1, 0.85), (-1, 0.85)])
    if kind == "diamond":
        return np.array([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)])
    if kind == "cross":
        a = 0.33
        return np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
            + [(a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )
    angle = np.arange(10) * 2 * math.pi / 10
    radius = np.where(np.arange(10) % 2, 0.42, 1.0)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], -1)
