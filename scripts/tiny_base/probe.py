"""Measures whether the model sees: exact answers about held-out scenes, by question and by size of shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from .questions import Turn, a, conversation
from .rows import IGNORED, Encoder
from .scenes import draw_scene

SMALL = 13  # pixels
HELD_OUT = 10**9  # no training step has a seed like this


class Probe:
    """Single questions about scenes of one shape (color, kind; small ones apart) and of up to four."""

    def __init__(self, encoder: Encoder, questions: int = 256, rows: int = 64):
        rng = np.random.default_rng(HELD_OUT)
        asked: list[tuple[object, Turn, tuple[str, ...]]] = []
        for index in range(questions):
            scene = draw_scene(rng, 64, 64, 1)
            shape = scene.shapes[0]
            small = max(shape.width, shape.height) < SMALL
            topic = ("color", "kind")[index % 2]
            turn = {
                "color": ("Name the color of the shape.", f"It is {shape.color}."),
                "kind": ("Name the shape.", f"It is {a(shape.kind)}."),
            }[topic]
            asked.append((scene.image, turn, (topic, f"{topic}, small") if small else (topic,)))
        for index in range(questions):
            scene = draw_scene(rng, 64, 64, 1 + index % 4)
            turn = conversation(rng, scene, 1, 0.0)[0]
            asked.append(
                (scene.image, turn, ("any question", f"any question, answer {turn[1].split()[0]}"))
            )
        self.topics = [topics for _, _, topics in asked]
        self.batches = []
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            self.batches.append(
                encoder.encode([image for image, _, _ in part], [[turn] for _, turn, _ in part], 80)
            )

    def measure(self, predict: Callable[[dict[str, np.ndarray]], np.ndarray]) -> dict[str, float]:
        """Return the share of exact answers by topic.

        predict: arrays -> the likeliest next token at each position [rows, length]. An answer all
        of whose tokens are the likeliest is the answer that greedy generation gives.
        """
        exact: list[bool] = []
        for arrays in self.batches:
            labels = arrays["labels"][:, 1:]
            right = predict(arrays)[:, :-1] == labels
            exact.extend((right | (labels == IGNORED)).all(-1))
        found = defaultdict(list)
        for topics, right in zip(self.topics, exact, strict=True):
            for topic in topics:
                found[topic].append(right)
        return {topic: float(np.mean(values)) for topic, values in sorted(found.items())}
