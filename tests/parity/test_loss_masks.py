"""Loss masks without marks equal those of TRL's training templates, token for token."""

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import gemma3_files, llava_files, qwen2_vl_files, text
from transformers import AutoTokenizer

from vlm_jax.data.text.chat import Chat
from vlm_jax.models import MODELS

WORDS = (
    "what color is the ball ? It's red, and\nthe box is 12 blue; Über ASSISTANT: user <b> \t [INST]"
)


def template(name):
    spec = importlib.util.find_spec("trl")  # found, not imported
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed; its chat templates are the reference here")
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def conversation(rng, system):
    def say(low=1):
        words = rng.choice(WORDS.split(" "), rng.integers(low, 12))
        # The reference loses an answer's first token where that begins with white space.
        return " ".join(words).lstrip()

    messages = []
    if system and rng.integers(2):
        messages.append(text("system", say()))
    images = 0
    for turn in range(rng.integers(1, 6)):
        count = int(rng.integers(0, 3)) if turn == 0 else int(rng.integers(0, 2))
        images += count
        asked = [{"type": "image"}] * count + [{"type": "text", "text": say()}]
        messages.append({"role": "user", "content": asked})
        messages.append(text("assistant", say() or "a"))
    return messages, images


@pytest.mark.parametrize(
    ("plain", "marked", "files"),
    [
        ("qwen2_5_vl", "qwen2_5_vl_training", qwen2_vl_files),  # Qwen2-VL's is the same text
        ("qwen3_vl", "qwen3_vl_training", functools.partial(qwen2_vl_files, family="qwen3_vl")),
        ("llava_next", "llava_next_training", llava_files),
        ("gemma3", "gemma3_training", gemma3_files),
    ],
)
def test_masks_equal_the_marks(tmp_path, plain, marked, files):
    plain, marked = template(plain), template(marked)
    directory = files(tmp_path, plain)
    ids = json.loads((directory / "config.json").read_text())
    image = ids.get("image_token_id", ids.get("image_token_index"))
    mark = MODELS[ids["model_type"]].IMAGE_MARK
    chat = Chat(directory, image, ids.get("video_token_id"), image_mark=mark)
    assert not chat.has_marks
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rng = np.random.default_rng(0)
    trained = 0
    for _ in range(200):
        messages, images = conversation(rng, system=files is not llava_files)
        out = tokenizer.apply_chat_template(
            messages,
            chat_template=marked,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, weights = chat.encode(messages, [1 if mark is None else [mark]] * images)
        # A tokenizer that begins every text with BOS does so here, as a processor's does, where
        # the template has none; `apply_chat_template` of a tokenizer leaves it out.
        begin = int(tokens[0] == tokenizer.bos_token_id != out["input_ids"][0])
        np.testing.assert_array_equal(tokens[begin:], out["input_ids"])
        np.testing.assert_array_equal(weights[begin:], out["assistant_masks"])
        assert not weights[:begin].any()
        trained += int(weights.sum())
    assert trained > 200 * 5
