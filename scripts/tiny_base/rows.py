"""Makes training batches: the arrays a Hugging Face processor returns for scenes and talk about them, with labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import Qwen2VLImageProcessorPil

from .questions import Turn, conversation
from .scenes import draw_scene

SYSTEM = "You are a helpful assistant."
IGNORED = -100  # the label of a token that is not part of an answer


@dataclass(frozen=True)
class Kind:
    """What the rows of one batch have in common, so that all batches of a kind have one shape."""

    sizes: tuple[tuple[int, int], ...]  # width and height, one of them per batch
    shapes: int  # at most this many in a scene
    turns: int  # at most this many about a scene
    length: int  # tokens a row; turns that do not fit are left out
    caption: float  # how often the first turn is a caption


class Encoder:
    """Encodes conversations as the chat template renders them, a token id at a time known to be question or answer."""

    def __init__(self, tokenizer: Tokenizer, processor: Qwen2VLImageProcessorPil):
        self.tokenizer, self.processor = tokenizer, processor
        self.pad, self.image = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|image_pad|>")
        self.memory: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.memory:
            self.memory[text] = self.tokenizer.encode(text).ids
        return self.memory[text]

    def row(self, turns: list[Turn], image_tokens: int, length: int) -> tuple[list[int], list[int]]:
        """Return input ids and labels of as many turns as fit, at least the first."""
        ids = self.ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
        labels = [IGNORED] * len(ids)
        for index, (question, answer) in enumerate(turns):
            vision = [] if index else [*self.ids("<|vision_start|>"), *[self.image] * image_tokens, *self.ids("<|vision_end|>")]
            asked = [
                *self.ids("<|im_start|>user\n"),
                *vision,
                *self.ids(question),
                *self.ids("<|im_end|>\n<|im_start|>assistant\n"),
            ]
            said = [*self.ids(answer), *self.ids("<|im_end|>")]
            end = self.ids("\n")
            if len(ids) + len(asked) + len(said) + len(end) > length:
                if index == 0:
                    raise ValueError(f"the first turn does not fit into {length} tokens: {question!r} {answer!r}")
                break
            ids = [*ids, *asked, *said, *end]
            labels = [*labels, *[IGNORED] * len(asked), *said, *[IGNORED] * len(end)]
        return ids, labels

    def batch(self, rng: np.random.Generator, kind: Kind, rows: int) -> dict[str, np.ndarray]:
        width, height = kind.sizes[rng.integers(len(kind.sizes))]
        scenes = [draw_scene(rng, width, height, int(rng.integers(1, kind.shapes + 1))) for _ in range(rows)]
        talks = [conversation(rng, scene, kind.turns, kind.caption) for scene in scenes]
        arrays = self.encode([scene.image for scene in scenes], talks, kind.length)
        return arrays

    def encode(self, images: list, talks: list[list[Turn]], length: int) -> dict[str, np.ndarray]:
        """Return input_ids, attention_mask and labels [rows, length] beside the images' patches and grids."""
        vision = self.processor(images=images, return_tensors="np")
        tokens = vision["image_grid_thw"].prod(-1) // self.processor.merge_size**2
        ids = np.full((len(talks), length), self.pad, np.int32)
        labels = np.full((len(talks), length), IGNORED, np.int32)
        mask = np.zeros((len(talks), length), np.int32)
        for index, (turns, image_tokens) in enumerate(zip(talks, tokens, strict=True)):
            row, row_labels = self.row(turns, int(image_tokens), length)
            ids[index, : len(row)], labels[index, : len(row)], mask[index, : len(row)] = row, row_labels, 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "pixel_values": np.asarray(vision["pixel_values"], np.float32),
            "image_grid_thw": np.asarray(vision["image_grid_thw"], np.int32),
        }
