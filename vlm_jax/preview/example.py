"""One row of a batch, decoded: tokens, targets, positions and pictures of its examples.

Everything is read from the arrays of the batch, so that what is shown is what the model sees.
Letters: T tokens and P patches of a row, C values a patch.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.data.encode import Encoder
from vlm_jax.data.media.processors import value_table

LONGEST_CHARACTER = 8  # tokens that may share one character, at most


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token, or `count` placeholders of one image or video.

    kind: text, loss, image, video. weight: of the token itself, as labels are. start: its place
    in the example. position: its position ids. token: its id. number: of the picture, from 1.
    """

    kind: str
    text: str
    weight: float
    start: int
    position: str
    token: int
    count: int = 1
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image, or a video's frames: uint8 [F, height, width, 3] as the model sees them.

    cell: side in pixels of what one token sees. original: (height, width) of the file.
    """

    kind: str
    frames: np.ndarray
    cell: int
    tokens: int
    patches: int
    original: tuple[int, int] | None = None

    @property
    def height(self) -> int:
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        return self.frames.shape[2]


@dataclasses.dataclass(frozen=True)
class Target:
    """A stretch of tokens that carry one weight, decoded: what the model learns to write."""

    text: str
    weight: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Example:
    """One segment of a row. id, place, notes: of its record; patches: how many of the row's."""

    pieces: list[Piece]
    targets: list[Target]
    pictures: list[Picture]
    tokens: int
    loss_tokens: int
    patches: int
    id: str = ""
    place: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def runs(self) -> list[tuple[str, str]]:
        """(tokens, position ids) of each stretch of text and each picture."""
        found: list[tuple[str, str]] = []
        for number, group in itertools.groupby(self.pieces, key=lambda piece: piece.number):
            stretch = list(group)
            first, last = stretch[0], stretch[-1]
            tokens = _span(first.start, last.start + last.count - 1)
            found.append(
                (
                    f"{tokens} {first.kind}" if number else tokens,
                    _span(first.position, last.position),
                )
            )
        return found


class Reader:
    """Reads rows of batches that an encoder made."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.config = encoder.config
        self.backend = encoder.tokenizer.backend_tokenizer
        # Decoders of the SentencePiece kind drop a leading space: one token always goes ahead.
        self.anchor = self.backend.encode("a", add_special_tokens=False).ids[-1:]
        self.ahead = len(self._decode(self.anchor))
        settings = {"image": encoder.image_settings(), "video": encoder.video_settings()}
        self.tables = {kind: value_table(raw) for kind, raw in settings.items() if raw is not None}

    def row(self, batch: Batch, row: int) -> list[Example]:
        """Return the examples of one row."""
        segments = np.asarray(batch.segments[row])
        return [
            self._example(batch, row, np.flatnonzero(segments == number))
            for number in range(1, int(segments.max(initial=0)) + 1)
        ]

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens, special ones included."""
        return self._decode([*self.anchor, *tokens])[self.ahead :]

    def _decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.backend.decode([int(t) for t in tokens], skip_special_tokens=False)

    def _example(self, batch: Batch, row: int, here: np.ndarray) -> Example:
        tokens = np.asarray(batch.tokens[row])[here]
        # weights[t] is of predicting token t + 1; the first token is predicted by nothing.
        weights = np.concatenate([[0.0], np.asarray(batch.weights[row])[here][:-1]])
        positions = np.asarray(batch.positions[row])[..., here].reshape(-1, len(here))
        kinds, numbers, pictures = self._pictures(batch, row, here, tokens)
        pieces: list[Piece] = []
        for t, text in enumerate(self._spell(tokens, numbers)):
            if numbers[t] and t and numbers[t] == numbers[t - 1]:
                continue
            count = int((numbers == numbers[t]).sum()) if numbers[t] else 1
            pieces.append(
                Piece(
                    kind=kinds[t] or ("loss" if weights[t] else "text"),
                    text=text,
                    weight=float(weights[t]),
                    start=t,
                    position=_position(positions[:, t : t + count]),
                    token=int(tokens[t]),
                    count=count,
                    number=int(numbers[t]),
                )
            )
        return Example(
            pieces=pieces,
            targets=self._targets(tokens, weights),
            pictures=pictures,
            tokens=len(tokens),
            loss_tokens=int(np.count_nonzero(weights)),
            patches=sum(picture.patches for picture in pictures),
        )

    def _spell(self, tokens: np.ndarray, numbers: np.ndarray) -> list[str]:
        """Return each token's text; tokens that share a character with the one before have ""."""
        texts = [""] * len(tokens)
        start = 0  # of the tokens that share a character
        for t, number in enumerate(numbers):
            if number:  # a placeholder
                texts[t] = self._decode(tokens[t : t + 1])
            else:
                texts[start] = self.text(tokens[start : t + 1])
            if number or "\ufffd" not in texts[start] or t + 1 - start == LONGEST_CHARACTER:
                start = t + 1
        return texts

    def _targets(self, tokens: np.ndarray, weights: np.ndarray) -> list[Target]:
        """Return the stretches of equal weight above 0."""
        edges = np.flatnonzero(np.diff(weights)) + 1
        return [
            Target(self.text(tokens[part]), float(weights[part[0]]), len(part))
            for part in np.split(np.arange(len(tokens)), edges)
            if len(part) and weights[part[0]]
        ]

    def _pictures(
        self, batch: Batch, row: int, here: np.ndarray, tokens: np.ndarray
    ) -> tuple[list[str], np.ndarray, list[Picture]]:
        """Return each token's kind ("" for text), the number of its picture (0), the pictures."""
        index = np.asarray(batch.image_index[row])[here]
        of_patch = np.asarray(batch.patch_segments[row])  # [P], and P may be 0
        seen = index >= 0
        segment = np.zeros(len(index), of_patch.dtype)
        segment[seen] = of_patch[[self.config.patches_of(int(i)) for i in index[seen]]]
        names = {self.config.image_token_id: "image", self.config.video_token_id: "video"}
        kinds = [
            names[token] if s else "" for token, s in zip(tokens.tolist(), segment, strict=True)
        ]
        begins = [  # a video's frames are segments of their own; two videos never touch
            kind != ""
            and not (
                t > 0 and kinds[t - 1] == kind and (kind == "video" or segment[t] == segment[t - 1])
            )
            for t, kind in enumerate(kinds)
        ]
        numbers = np.cumsum(begins) * (segment != 0)
        places = [np.flatnonzero(numbers == n) for n in range(1, sum(begins) + 1)]
        pictures = [self._picture(batch, row, kinds[at[0]], segment[at]) for at in places]
        return kinds, numbers, pictures

    def _picture(self, batch: Batch, row: int, kind: str, segments: np.ndarray) -> Picture:
        of_patch = np.asarray(batch.patch_segments[row])
        frames, patches = [], 0
        for segment in dict.fromkeys(segments.tolist()):
            places = np.flatnonzero(of_patch == segment)
            found = self.config.pixels(
                np.asarray(batch.patches[row])[places],
                np.asarray(batch.patch_positions[row])[places],
            )
            frames.append(found if kind == "video" else found[:1])
            patches += len(places)
        return Picture(
            kind,
            to_bytes(np.concatenate(frames), self.tables[kind]),
            self.config.cell,
            len(segments),
            patches,
        )


def to_bytes(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return uint8 pixels of normalised values [..., 3]: the nearest entries of a `value_table`."""
    pixels = np.empty(values.shape, np.uint8)
    for channel in range(3):
        edges = (table[channel, 1:] + table[channel, :-1]) / 2
        pixels[..., channel] = np.searchsorted(edges, values[..., channel])
    return pixels


def _position(positions: Any) -> str:
    """Return position ids [1 or 3, n] in words: one number where all axes agree."""
    if positions.shape[1] == 1 and len(np.unique(positions)) == 1:
        return str(int(positions[0, 0]))
    names = ("t", "h", "w") if len(positions) == 3 else ("",)
    return " ".join(
        f"{name} {_span(int(axis.min()), int(axis.max()))}".strip()
        for name, axis in zip(names, positions, strict=True)
    )


def _span(first: int | str, last: int | str) -> str:
    return str(first) if first == last else f"{first}–{last}"
