"""Makes training batches: scenes and talk about them as a Hugging Face processor's arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import Qwen2VLImageProcessorPil

from .questions import Turn, conversation, describe
from .scenes import draw_scene

SYSTEM = "You are a helpful assistant."
IGNORED = -100  # the label of a token that is not part of an answer


@dataclass(frozen=True)
class Kind:
    """What the rows of one batch have in common, so that all batches of a kind have one shape."""

    sizes: tuple[tuple[int, int], ...]  # width and height, one of them per batch
    shapes: int  # at most this many in a scene
    turns: int  # at most this many about a scene; 0: no chat, only the picture and its caption
    length: int  # tokens a row; turns that do not fit are left out
    rows: int  # a batch
    caption: float = 0.8  # how often the first turn is a caption
    brief: float = 0.0  # how many of the turns ask for a single word


class Encoder:
    """Encodes conversations as the chat template does, and knows which tokens are answers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        processor: Qwen2VLImageProcessorPil,
        forbidden: frozenset[str] = frozenset(),
    ):
        """forbidden: questions in small letters that no row may ask."""
        self.tokenizer, self.processor, self.forbidden = tokenizer, processor, forbidden
        self.pad = tokenizer.token_to_id("<|endoftext|>")
        self.image = tokenizer.token_to_id("<|image_pad|>")
        self.memory: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.memory:
            self.memory[text] = self.tokenizer.encode(text).ids
        return self.memory[text]

    def picture(self, tokens: int) -> list[int]:
        placeholders = [self.image] * tokens
        return [*self.ids("<|vision_start|>"), *placeholders, *self.ids("<|vision_end|>")]

    def pair(self, caption: str, image_tokens: int) -> tuple[list[int], list[int]]:
        """Return input ids and labels of a picture followed by its caption, without any chat."""
        shown, said = self.picture(image_tokens), [*self.ids(caption), *self.ids("<|endoftext|>")]
        return [*shown, *said], [IGNORED] * len(shown) + said

    def row(self, turns: list[Turn], image_tokens: int, length: int) -> tuple[list[int], list[int]]:
        """Return input ids and labels of as many turns as fit, at least the first."""
        ids = self.ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
        labels = [IGNORED] * len(ids)
        for index, (question, answer) in enumerate(turns):
            if question.lower() in self.forbidden:
                raise ValueError(f"{question!r} is a question of the later task")
            asked = [
                *self.ids("<|im_start|>user\n"),
                *([] if index else self.picture(image_tokens)),
                *self.ids(question),
                *self.ids("<|im_end|>\n<|im_start|>assistant\n"),
            ]
            said = [*self.ids(answer), *self.ids("<|im_end|>")]
            end = self.ids("\n")
            if index and len(ids) + len(asked) + len(said) + len(end) > length:
                break
            ids = [*ids, *asked, *said, *end]
            labels = [*labels, *[IGNORED] * len(asked), *said, *end]
        return ids, labels

    def batch(self, rng: np.random.Generator, kind: Kind) -> dict[str, np.ndarray]:
        """Return the arrays of one batch; equal generators give equal batches."""
        width, height = kind.sizes[rng.integers(len(kind.sizes))]
        counts = rng.integers(1, kind.shapes + 1, kind.rows)
        scenes = [draw_scene(rng, width, height, int(count)) for count in counts]
        images = [scene.image for scene in scenes]
        if kind.turns == 0:
            return self.encode(images, [describe(rng, scene)[1] for scene in scenes], kind.length)
        talks = [conversation(rng, scene, kind.turns, kind.caption, kind.brief) for scene in scenes]
        return self.encode(images, talks, kind.length)

    def encode(
        self, images: list, texts: list[list[Turn]] | list[str], length: int
    ) -> dict[str, np.ndarray]:
        """Return input_ids, attention_mask and labels [rows, length], patches and grids.

        texts: of each image, its caption or the turns of a conversation about it.
        """
        vision = self.processor(images=images, return_tensors="np")
        tokens = vision["image_grid_thw"].prod(-1) // self.processor.merge_size**2
        ids = np.full((len(texts), length), self.pad, np.int32)
        labels = np.full((len(texts), length), IGNORED, np.int32)
        mask = np.zeros((len(texts), length), np.int32)
        for index, (text, count) in enumerate(zip(texts, tokens, strict=True)):
            if isinstance(text, str):
                row, row_labels = self.pair(text, int(count))
            else:
                row, row_labels = self.row(text, int(count), length)
            if len(row) > length:
                raise ValueError(f"{text!r} takes {len(row)} tokens, more than {length}")
            here = slice(len(row))
            ids[index, here], labels[index, here], mask[index, here] = row, row_labels, 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "pixel_values": np.asarray(vision["pixel_values"], np.float32),
            "image_grid_thw": np.asarray(vision["image_grid_thw"], np.int32),
        }
