"""Image placeholders of other programs, refused where they would be trained on as text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_jax.errors import UserError

# Behind a word: "<image_0>", "<image 1>", "<|image_pad|>", "<ImageHere>", "<IMG_CONTEXT>", ...
BEHIND = r"([ _-]?(\d+|here|placeholder|pad|context|soft_token|token|start|end|bos|eos|break|sep))?"
BEFORE = r"((start|begin|end)_of_|fake_token_around_)?"
# Markdown's "![image](a.png)" and LaTeX's "\includegraphics{image}" are none.
# kind -> what other programs write: Qwen, InternVL, Phi, Pixtral, Gemma, Idefics, LLaVA, MMMU.
FOREIGN = {
    "image": rf"<\|?{BEFORE}(image|img|vision){BEHIND}/?\|?>|<im_(start|end|patch)>"
    rf"|(?<!!)\[(image|img){BEHIND}\](?!\()|(?<!\w)\{{(image|img){BEHIND}\}}",
    "video": rf"<\|?{BEFORE}(video|vision){BEHIND}/?\|?>|(?<!!)\[video{BEHIND}\](?!\()",
}
# A file named within the text, as Qwen-VL's and the older ms-swift's data have it.
INLINE = r"<(img|audio)>\s*([^<>\s]+\.\w{2,5}|https?://[^<>\s]+|data:[^<>\s]+)\s*</\1>"


def _texts(turns: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any], str]]:
    for number, turn in enumerate(turns):
        content = turn["content"]
        for part in content if isinstance(content, list | tuple) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield number, turn, text


def refuse_foreign(turns: Sequence[dict[str, Any]], kind: str, count: int, where: str) -> None:
    """Raise `UserError` for a foreign word beside images or videos that nothing places."""
    for number, _, text in _texts(turns):
        if word := re.search(FOREIGN[kind], text, re.IGNORECASE):
            raise UserError(
                f"{where} has {count} {kind}s that nothing places, and turn {number} has the word "
                f"'{word[0]}', which is not a placeholder here: it would be trained on as text. "
                f"Write '<{kind}>' once for each {kind}, in a text that is a plain string (or a "
                f"part {{'type': '{kind}'}}); where that word is meant as text, '<{kind}>' "
                "elsewhere."
            )


def refuse_inline(turns: Sequence[dict[str, Any]], where: str) -> None:
    """Raise `UserError` for a file that is named within what is asked."""
    for number, turn, text in _texts(turns):
        if turn["role"] != "assistant" and (word := re.search(INLINE, text, re.IGNORECASE)):
            raise UserError(
                f"{where} has '{word[0]:.80}' in turn {number}: files within a text are not read. "
                f"Give the picture under 'images', and write '<image>' in its place."
            )
