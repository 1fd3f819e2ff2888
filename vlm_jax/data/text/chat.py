"""Conversations to tokens and loss weights, by the checkpoint's own chat template.

The template is rendered once as it is; which characters the assistant writes comes from the
turns (never from searching token ids), and the tokenizer's offsets carry it over to tokens.
"""

import functools
import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.text.answers import find_answers
from vlm_jax.data.text.template import Messages, Span, Template
from vlm_jax.data.text.tokenizer import find_template, has_tokenizer, load_tokenizer, rename_tokens
from vlm_jax.errors import UserError

TRAIN_ON = ("all", "answers", "last")

# Characters of Unicode's private use that stand for placeholders on their way through the template
# and the tokenizer. A template's placeholder and the same letters in a user's text part here.
LITERALS = ("\ue0f0", "\ue0f1")  # a user's own "<image>", "<video>"
SLOTS = ("\ue0f2", "\ue0f3")  # where an image's, a video's features go
RESERVED = re.compile("[\ue0f0-\ue0f5]")  # and the marks of `Template`
SPACE = re.compile(r"\s*")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one alone; no tokenizer takes it
# What stands for a medium: a number of placeholders, or words and such numbers.
Written = int | Sequence[str | int]
ANSWER = "The answer."  # of a conversation that is rendered to see how the template ends it


class Chat:
    """A tokenizer and a chat template that make tokens [T] and weights [T] of messages.

    Messages are `{"role", "content"}` with content a list of `{"type": "text", "text"}`,
    `{"type": "image"}` and `{"type": "video"}` parts. Thread-safe.
    """

    def __init__(
        self,
        directory: str | Path,
        image_token_id: int,
        video_token_id: int | None = None,
        adapter: str | Path | None = None,
        image_mark: str | None = None,
    ):
        """adapter: a directory whose tokenizer and template, where it has them, come first.

        image_mark: what the template writes for an image; None: the image's placeholder.
        """
        home = directory if adapter is None or not has_tokenizer(adapter) else adapter
        tokenizer = self.tokenizer = load_tokenizer(home)
        ids = [image_token_id] if video_token_id is None else [image_token_id, video_token_id]
        self.directory = str(directory)
        places = [directory] if adapter is None else [adapter, directory]
        self.template = find_template(places, home, tokenizer)
        self.compiled = Template(self.template, self.directory)
        self.has_marks = self.compiled.has_marks
        self.special = {**tokenizer.special_tokens_map}
        self.bos, self.eos = tokenizer.bos_token, tokenizer.eos_token
        self.placeholders = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids]
        self.marks = [image_mark or self.placeholders[0], *self.placeholders[1:]]
        ends = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        # The words between which the template writes turns and images.
        self.written = {name for name in ends - {*self.placeholders} if name in self.template}
        self.ends = tuple((ends | {self.eos or ""}) - {"", *self.placeholders})
        self.encoder = rename_tokens(
            tokenizer.backend_tokenizer, dict(zip(self.placeholders, SLOTS, strict=False))
        )
        self.image_id = image_token_id
        self.media = dict(zip(ids, ("image", "video"), strict=False))
        for slot, token_id, name in zip(SLOTS, ids, self.placeholders, strict=False):
            if (
                token_id not in tokenizer.added_tokens_decoder
                or self.encoder.token_to_id(slot) != token_id
            ):
                raise UserError(
                    f"The tokenizer in '{home}' does not have the placeholder {name!r} (id "
                    f"{token_id} in config.json) as an added token. Do both files belong together?"
                )

    def encode(
        self,
        messages: Messages,
        image_tokens: Sequence[Written],
        train_on: str = "all",
        video_tokens: Sequence[Written] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens int32 [T] and weights float32 [T]: 1 on what the assistant writes.

        A message's own "weight" (0 or above) stands in place of 1 on what it writes.

        image_tokens: how many placeholders each image takes, in the order of the image parts, or
        what is written for it: words and numbers of placeholders; video_tokens likewise.
        train_on: "all" (or "answers") assistant turns, or the "last" one.

        An answer's weights run up to and with its end of turn, for Qwen2-VL `<|im_end|>` and the
        newline that the template ends the turn with (as TRL's training templates mark it):

            <|im_start|> assistant \\n  A  red  ball  <|im_end|>  \\n
                 0           0      0   1   1    1       1        1

        Where the template has `{% generation %}` marks they say what an answer is (with the white
        space and the EOS around it that the model has to write too); otherwise it is
        what a turn adds to the prompt that asks for it, `render(messages[:i], prompt)` being an
        exact prefix of `render(messages[:i + 1])`, which is checked; spaces behind the end of turn
        are left out there (LLaVA-NeXT's "</s> "). A token that is partly answer counts.

        A template that ends the assistant's turn without any special token, as LLaVA-1.5's does
        ("USER: … ASSISTANT: … USER: …"), would never teach the model to stop. There the white
        space after each answer is replaced by the tokenizer's EOS, which carries loss. That is
        what LLaVA-1.5 was trained on itself (conversation `vicuna_v1`, whose second separator is
        `</s>`), so that the prompts that transformers renders still end in "ASSISTANT:".

        Raises `UserError` where the prefix property fails or placeholders and images differ.
        """
        if train_on not in TRAIN_ON:
            raise UserError(f"train_on is {train_on!r}; expected one of {', '.join(TRAIN_ON)}.")
        counts = [float(m.get("weight", 1)) for m in messages if m["role"] == "assistant"]
        if train_on == "last":
            counts[:-1] = [0.0] * len(counts[:-1])
        return self._tokens(messages, False, counts, (image_tokens, video_tokens))

    def prompt(
        self,
        messages: Messages,
        image_tokens: Sequence[Written],
        video_tokens: Sequence[Written] = (),
    ) -> np.ndarray:
        """Return tokens int32 [T] of the conversation up to where the assistant is to write."""
        counts = [0.0 for message in messages if message["role"] == "assistant"]
        return self._tokens(messages, True, counts, (image_tokens, video_tokens))[0]

    @functools.cached_property
    def turn_end(self) -> int | None:
        """The id of the first token behind an answer, with which a model says that it is done.

        It is the first special token that the template writes there, whatever follows; of a
        template that writes none the tokenizer's EOS, which training puts there (see `encode`).
        None where there is none of either. Raises `UserError` where the template refuses a question
        and its answer, or writes another.
        """
        messages = [
            {"role": role, "content": [{"type": "text", "text": words}]}
            for role, words in (("user", "The question?"), ("assistant", ANSWER))
        ]
        before, _, tail = self._render(messages, False)[0].rpartition(ANSWER)
        if not before:
            raise UserError(
                f"The chat template of '{self.directory}' does not write the answer {ANSWER!r} of "
                f"a conversation. Correct chat_template.jinja, or copy the checkpoint's own."
            )
        found = [(tail.find(end), -len(end), end) for end in self.ends if end in tail]
        name = min(found)[2] if found else self.eos
        return None if name is None else int(self.tokenizer.convert_tokens_to_ids(name))

    def answer(self, tokens: Sequence[int], ends: Collection[int]) -> str:
        """Return the text of generated ids [N] up to the first that ends an answer.

        Special tokens stay in it, for they may be what was learned (`<|box_start|>`, new tokens).
        """
        ids = itertools.takewhile(lambda token: token not in ends, map(int, tokens))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _render(self, messages: Messages, prompt: bool) -> tuple[str, list[Span]]:
        """Return the template's text and its generation marks."""
        return self.compiled.render(messages, prompt, **self.special)

    def _escape(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message with placeholders in its texts hidden from template and tokenizer."""
        content = [
            part if part.get("text") is None else {**part, "text": self._escape_text(part["text"])}
            for part in message["content"]
        ]
        if not content and message["role"] == "assistant":  # empty, and still ended
            content = [{"type": "text", "text": ""}]
        return {**message, "content": content}

    def _escape_text(self, text: str) -> str:
        if RESERVED.search(text):
            raise UserError("A text holds a character of U+E0F0 to U+E0F5, which is reserved.")
        if half := SURROGATE.search(text):
            raise UserError(
                f"A text holds U+{ord(half[0]):04X}, half of a surrogate pair, which is no "
                f"character: it was cut or decoded wrongly when the file was written."
            )
        if word := next((word for word in self.written if word in text), None):
            raise UserError(
                f"A text holds '{word}', which the chat template itself writes around turns and "
                f"images, and of which the tokenizer would make the token. Give the bare text of "
                f"each turn, and '<image>' in an image's place."
            )
        for name, literal in zip(self.placeholders, LITERALS, strict=False):
            text = text.replace(name, literal)
        return text

    def _tokens(
        self,
        messages: Messages,
        prompt: bool,
        counts: Sequence[float],
        features: tuple[Sequence[Written], Sequence[Written]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and weights: `counts` has one for each of the assistant's turns."""
        messages = [self._escape(message) for message in messages]
        rendered, turns = find_answers(self._render, messages, prompt, self.compiled, self.ends)
        each_media = [[_parts(one) for one in many] for many in features]
        edits = []
        for kind, mark, name, slot, literal, many in zip(
            self.media.values(),
            self.marks,
            self.placeholders,
            SLOTS,
            LITERALS,
            each_media,
            strict=False,
        ):
            places = [found.span() for found in re.finditer(re.escape(mark), rendered)]
            if len(places) != len(many):
                raise UserError(
                    f"The chat template of '{self.directory}' renders {len(places)} {kind} "
                    f"placeholders for {len(many)} {kind}s. Does it know {kind} parts "
                    f"({{'type': '{kind}'}}) in every role that has them?"
                )
            texts = ["".join(slot if isinstance(p, int) else p for p in parts) for parts in many]
            edits += [(*place, text) for place, text in zip(places, texts, strict=True)]
            edits += [(*found.span(), name) for found in re.finditer(literal, rendered)]
        stops = {}  # where a turn's last span ends instead
        for start, end in (turn[-1] for turn in turns if turn):  # marks leave out an empty answer
            body = start + len(rendered[start:end].rstrip())
            if rendered[start:body].endswith(self.ends):
                if not self.has_marks:  # a space behind the end is the template's, not the answer's
                    stops[end] = start + len(rendered[start:end].rstrip(" "))
                continue
            if self.eos is None:
                raise UserError(
                    f"The chat template of '{self.directory}' ends an answer without a special "
                    f"token, and the tokenizer has no eos_token: the model could not learn to stop."
                )
            behind = SPACE.match(rendered, body).end()  # type: ignore[union-attr]
            if rendered.startswith(self.eos, behind):  # the marks leave it out
                stops[end] = behind + len(self.eos)
            else:
                edits.append((body, end, self.eos))
        spans = [(start, stops.get(end, end)) for turn in turns for start, end in turn]
        text, spans = apply_edits(rendered, edits, spans)

        bare = self.bos is not None and text.startswith(self.bos)
        encoding = self.encoder.encode(text, add_special_tokens=not bare)
        tokens = np.array(encoding.ids, np.int32)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        # Only the last span that begins before a token ends can hold some of it. The first, empty
        # one is for tokens before all others, and for what the tokenizer adds, which has no place.
        bounds = np.array([(-1, -1), *spans], np.int64)
        last = np.searchsorted(bounds[:, 0], ends) - 1
        each = [count for turn, count in zip(turns, counts, strict=True) for _ in turn]
        weights = np.where(starts < bounds[last, 1], np.array([0, *each], np.float32)[last], 0)
        repeats = np.ones(len(tokens), np.int64)
        for token_id, many in zip(self.media, each_media, strict=False):
            slots = tokens == token_id
            weights[slots] = 0  # a placeholder is not written by anybody
            repeats[slots] = [p for parts in many for p in parts if isinstance(p, int)]
        return np.repeat(tokens, repeats), np.repeat(weights, repeats)


def _parts(written: Written) -> Sequence[str | int]:
    return [written] if isinstance(written, int) else written


def apply_edits(
    text: str, edits: list[tuple[int, int, str]], spans: list[Span]
) -> tuple[str, list[Span]]:
    """Return the text with each (start, end, replacement) made, and the spans moved along.

    Edits must not overlap each other; a span that ends where an edit ends keeps what it inserts.
    """
    edits = sorted(edits)
    pieces, done = [], 0
    for start, end, new in edits:
        pieces += [text[done:start], new]
        done = end
    ends = np.array([end for _, end, _ in edits], np.int64)
    shift = np.cumsum([0] + [len(new) - (end - start) for start, end, new in edits])

    def move(place: int) -> int:
        return place + int(shift[np.searchsorted(ends, place, side="right")])

    return "".join(pieces) + text[done:], [(move(a), move(b)) for a, b in spans]
