"""Measures whether the model sees: held-out scenes, apart by colour, kind and size of shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from .questions import a, conversation, describe
from .rows import IGNORED, Encoder
from .scenes import COLORS, KINDS, Scene, draw_scene

# From the arrays of a batch, the likeliest next token at each position, [rows, length].
Predict = Callable[[dict[str, np.ndarray]], np.ndarray]

SMALL = 13  # pixels
HELD_OUT = 10**9  # no training step has a seed like this
TALK = 80  # tokens of a row that asks one question


class Probe:
    """Captions of one shape word by word, and single questions whose whole answer must be right."""

    def __init__(self, encoder: Encoder, scenes: int = 128):
        rng = np.random.default_rng(HELD_OUT)
        self.words = {
            "color": {encoder.ids(f" {word}")[0] for word in COLORS},
            "kind": {encoder.ids(f" {word}")[0] for word in KINDS},
        }
        self.captions = {}
        for side in (48, 64):
            drawn = [draw_scene(rng, side, side, 1) for _ in range(scenes)]
            texts = [describe(rng, scene)[1] for scene in drawn]
            self.captions[side] = encoder.encode([scene.image for scene in drawn], texts, 32)

        self.topics: list[list[str]] = []
        images, talks = [], []
        for index in range(2 * scenes):
            scene = draw_scene(rng, 64, 64, 1)
            shape, topic = scene.shapes[0], ("color", "kind")[index % 2]
            answer = shape.color if topic == "color" else a(shape.kind)
            ask = {"color": "Name the color of the shape.", "kind": "Name the shape."}[topic]
            talks.append([(ask, f"It is {answer}.")])
            images.append(scene.image)
            small = max(shape.width, shape.height) < SMALL
            self.topics.append([topic, f"{topic} of small"] if small else [topic])
        for index in range(2 * scenes):
            scene = draw_scene(rng, 64, 64, 1 + index % 4)
            talks.append(conversation(rng, scene, 1, 0.0))
            images.append(scene.image)
            self.topics.append(["any", f"any {talks[-1][0][1].split()[0]}"])
        self.talks = [
            encoder.encode(images[start : start + scenes], talks[start : start + scenes], TALK)
            for start in range(0, len(images), scenes)
        ]

    def measure(self, predict: Predict, talk: bool) -> dict[str, float]:
        """Return the share of right words in captions, and of right answers by topic if `talk`.

        An answer all of whose tokens are the likeliest is the answer that greedy generation gives.
        """
        seen: dict[str, float] = {}
        for side, arrays in self.captions.items():
            labels, said = arrays["labels"][:, 1:], predict(arrays)[:, :-1]
            for topic, words in self.words.items():
                here = np.isin(labels, list(words))
                seen[f"caption {side} {topic}"] = float((said == labels)[here].mean())
        if not talk:
            return seen
        found = defaultdict(list)
        topics = iter(self.topics)
        for arrays in self.talks:
            labels = arrays["labels"][:, 1:]
            right = (predict(arrays)[:, :-1] == labels) | (labels == IGNORED)
            for exact in right.all(-1):
                for topic in next(topics):
                    found[topic].append(exact)
        return seen | {topic: float(np.mean(values)) for topic, values in sorted(found.items())}


# A question about something that is there in every other picture; True: "yes" says that it is.
WHETHER = (
    ("Do you see a {}?", True),
    ("Is there no {} in this picture?", False),
)
BRIEFLY = " Answer in one word."


def whether(encoder: Encoder, predict: Predict, scenes: int = 512) -> dict[str, float]:
    """Return how often the first word about what is there is right: {question: share}.

    Each question is asked of `scenes` held-out pictures of one shape, for a colour and for a kind,
    answered in one word and, the first question, in a sentence.
    """
    found: dict[str, float] = {}
    for suffix, asked in ((BRIEFLY, WHETHER), ("", WHETHER[:1])):
        for question, affirms in asked:
            for topic in ("color", "kind"):
                rng = np.random.default_rng((HELD_OUT, 1))
                drawn = [draw_scene(rng, 64, 64, 1) for _ in range(scenes)]
                rows = []
                for index, scene in enumerate(drawn):
                    there = index % 2 == 0
                    what = name_something(rng, scene, topic, there)
                    word = "yes" if there == affirms else "no"
                    answer = word if suffix else word.capitalize()
                    rows.append([(question.format(what) + suffix, answer)])
                arrays = encoder.encode([scene.image for scene in drawn], rows, TALK)
                labels, said = arrays["labels"][:, 1:], predict(arrays)[:, :-1]
                first = (labels != IGNORED).argmax(-1)[:, None]
                right = np.take_along_axis(said == labels, first, axis=1)
                example = question.format({"color": "teal shape", "kind": "star"}[topic])
                found[example + (suffix or " (in a sentence)")] = float(right.mean())
    return found


def name_something(rng: np.random.Generator, scene: Scene, topic: str, there: bool) -> str:
    """Return the colour or the kind of a scene's one shape, or another one, as words to ask for."""
    shape, words = scene.shapes[0], {"color": COLORS, "kind": KINDS}[topic]
    word = getattr(shape, topic)
    if not there:
        others = sorted(set(words) - {word})
        word = others[rng.integers(len(others))]
    return f"{word} shape" if topic == "color" else word
