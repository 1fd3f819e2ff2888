"""Conversations into tokens and loss weights, by the checkpoint's own chat template.

The template is rendered once as it is; which characters the assistant writes comes from the
turns (never from searching token ids), and the tokenizer's offsets carry it over to tokens.
"""

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers.utils import chat_template_utils as templates

from vlm_jax.data.tokenizer import find_template, has_tokenizer, load_tokenizer, rename_tokens
from vlm_jax.errors import UserError

Span = tuple[int, int]
Messages = Sequence[dict[str, Any]]
TRAIN_ON = ("all", "answers", "last")

# Characters of Unicode's private use that stand for placeholders on their way through the template
# and the tokenizer. A template's placeholder and the same letters in a user's text part here.
LITERALS = ("\ue0f0", "\ue0f1")  # a user's own "<image>", "<video>"
SLOTS = ("\ue0f2", "\ue0f3")  # where an image's, a video's features go
RESERVED = re.compile("[\ue0f0-\ue0f3]")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one alone; no tokenizer takes it


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
    ):
        """adapter: a directory whose tokenizer and template, where it has them, come first."""
        home = directory if adapter is None or not has_tokenizer(adapter) else adapter
        tokenizer = self.tokenizer = load_tokenizer(home)
        ids = [image_token_id] if video_token_id is None else [image_token_id, video_token_id]
        self.directory = str(directory)
        places = [directory] if adapter is None else [adapter, directory]
        self.template = find_template(places, home, tokenizer)
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        # transformers' own rendering, less the deep copies that it makes of every message.
        try:
            self.compiled: Any = templates._compile_jinja_template(self.template)
        except jinja2.TemplateError as error:
            raise UserError(
                f"The chat template of '{directory}' is no valid Jinja: {error}. Mend "
                f"chat_template.jinja, or copy the checkpoint's own."
            ) from error
        self.special = {**tokenizer.special_tokens_map}
        self.bos, self.eos = tokenizer.bos_token, tokenizer.eos_token
        self.placeholders = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids]
        ends = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.ends = tuple((ends | {self.eos or ""}) - {"", *self.placeholders})
        renamed = dict(zip(self.placeholders, SLOTS, strict=False))
        self.encoder = rename_tokens(tokenizer.backend_tokenizer, renamed)
        self.image_id = image_token_id
        self.media = dict(zip(ids, ("image", "video"), strict=False))
        for slot, token_id, name in zip(SLOTS, ids, self.placeholders, strict=False):
            added = token_id in tokenizer.added_tokens_decoder
            if not added or self.encoder.token_to_id(slot) != token_id:
                raise UserError(
                    f"The tokenizer in '{directory}' does not have the placeholder {name!r} (id "
                    f"{token_id} in config.json) as an added token. Do both files belong together?"
                )
        # transformers' marks are kept in the compiled template, so one thread renders at a time.
        self._lock = threading.Lock()

    def encode(
        self,
        messages: Messages,
        image_tokens: Sequence[int],
        train_on: str = "all",
        video_tokens: Sequence[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens int32 [T] and weights float32 [T]: 1 on what the assistant writes.

        A message's own "weight" (0 or above) stands in place of 1 on what it writes.

        image_tokens: how many placeholders each image takes, in the order of the image parts;
        video_tokens likewise.
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
        rendered, turns = self._turns(messages, prompt=False)
        counts = [float(m.get("weight", 1)) for m in messages if m["role"] == "assistant"]
        if train_on == "last":
            counts[:-1] = [0.0] * len(counts[:-1])
        return self._tokens(rendered, turns, counts, (image_tokens, video_tokens))

    def prompt(
        self, messages: Messages, image_tokens: Sequence[int], video_tokens: Sequence[int] = ()
    ) -> np.ndarray:
        """Return tokens int32 [T] of the conversation up to where the assistant is to write."""
        rendered, turns = self._turns(messages, prompt=True)
        return self._tokens(rendered, turns, [0.0] * len(turns), (image_tokens, video_tokens))[0]

    def _render(self, messages: Messages, prompt: bool) -> tuple[str, list[Span]]:
        """Return the template's text and its generation marks."""
        values = {**self.special, "tools": None, "documents": None}
        try:
            if not self.has_marks:
                text = self.compiled.render(
                    messages=messages, add_generation_prompt=prompt, **values
                )
                return text, []
            with self._lock:
                text, marks = templates._render_with_assistant_indices(
                    compiled_template=self.compiled,
                    messages=list(messages),
                    add_generation_prompt=prompt,
                    **values,
                )
        except Exception as error:  # a template is the checkpoint's own code
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"The chat template of '{self.directory}' refuses the conversation ({roles}): "
                f"{error}. Check the roles and their order."
            ) from error
        return text, [(start, end) for start, end in marks]

    def _turns(self, messages: Messages, prompt: bool) -> tuple[str, list[list[Span]]]:
        """Return the rendered text and, for every assistant turn, the spans of its answer."""
        messages = [self._escape(message) for message in messages]
        rendered, marks = self._render(messages, prompt)
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not self.has_marks:
            turns = [[self._added(messages, i, rendered, prompt)] for i in places]
        elif len(marks) == len(places):
            turns = [[mark] for mark in marks]
        else:  # several marks a turn, or none: count what each turn adds
            ends = [len(self._render(messages[: i + 1], False)[1]) for i in places]
            turns = [marks[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if self.has_marks:
            for i, spans in zip(places, turns, strict=True):
                spans[:1] = [self._with_space(messages, i, rendered, span) for span in spans[:1]]
                spans[-1:] = [self._with_end(messages, i, rendered, span) for span in spans[-1:]]
        for i, spans in zip(places, turns, strict=True):
            said = [part["text"].strip() for part in messages[i]["content"] if "text" in part]
            written = "".join(rendered[a:b] for a, b in spans)
            if not all(text in written for text in said):
                raise UserError(
                    f"The chat template of '{self.directory}' does not render the assistant's turn "
                    f"{i} as it is: {said!r} became {written!r}. Its loss would be wrong; mend the "
                    f"template (chat_template.jinja) or the record."
                )
        return rendered, turns

    def _added(self, messages: Messages, i: int, rendered: str, prompt: bool) -> Span:
        """Return where turn i's answer stands, by exact prefixes."""
        before, after = self._render(messages[:i], True)[0], rendered
        if i + 1 < len(messages) or prompt:
            after = self._render(messages[: i + 1], False)[0]
        if not (after.startswith(before) and rendered.startswith(after)):
            raise UserError(
                f"The chat template of '{self.directory}' renders message {i} (assistant) in a way "
                f"that does not begin with the prompt that asks for it, so its answer cannot be "
                f"told from its prompt. Add {{% generation %}} marks to chat_template.jinja or, "
                f"where the conversation begins with an assistant, remove that turn."
            )
        return len(before), len(after)

    def _with_space(self, messages: Messages, i: int, rendered: str, mark: Span) -> Span:
        """Return turn i's mark, from where its prompt ends if only white space is in between.

        LLaVA-1.5's template marks the answer behind "ASSISTANT: ", but prompts with "ASSISTANT:":
        the space, to Llama's tokenizer often a token, is for the model to write.
        """
        start, end = mark
        if not rendered[start - 1 : start].isspace():
            return mark
        before = self._render(messages[:i], True)[0]
        if rendered.startswith(before) and rendered[len(before) : start].isspace():
            return len(before), end
        return mark

    def _with_end(self, messages: Messages, i: int, rendered: str, mark: Span) -> Span:
        """Return turn i's mark, up to the special token that ends the turn where it leaves it out.

        It is the turn's own if the conversation that ends with the turn has it too.
        """
        start, end = mark
        if rendered[start:end].rstrip().endswith(self.ends):
            return mark
        turn = self._render(messages[: i + 1], False)[0]
        if not rendered.startswith(turn):
            return mark
        rest = turn[end:]
        word = rest.lstrip()
        found = max((e for e in self.ends if word.startswith(e)), key=len, default="")
        return (start, end + len(rest) - len(word) + len(found)) if found else mark

    def _escape(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message with placeholders in its texts hidden from template and tokenizer."""
        content = []
        for part in message["content"]:
            text = part.get("text")
            if text is not None:
                if RESERVED.search(text):
                    raise UserError(
                        "A text holds a character of U+E0F0 to U+E0F3, which is reserved."
                    )
                if half := SURROGATE.search(text):
                    raise UserError(
                        f"A text holds U+{ord(half[0]):04X}, half of a surrogate pair, which is no "
                        f"character: it was cut or decoded wrongly when the file was written."
                    )
                for name, literal in zip(self.placeholders, LITERALS, strict=False):
                    text = text.replace(name, literal)
                part = {**part, "text": text}
            content.append(part)
        if not content and message["role"] == "assistant":  # empty, and still ended
            content = [{"type": "text", "text": ""}]
        return {**message, "content": content}

    def _tokens(
        self,
        rendered: str,
        turns: list[list[Span]],
        counts: list[float],
        features: tuple[Sequence[int], Sequence[int]],
    ) -> tuple[np.ndarray, np.ndarray]:
        edits: list[tuple[int, int, str]] = []
        for name, slot, literal in zip(self.placeholders, SLOTS, LITERALS, strict=False):
            for old, new in ((name, slot), (literal, name)):
                edits += [(m.start(), m.end(), new) for m in re.finditer(re.escape(old), rendered)]
        spans = [span for turn in turns for span in turn]
        each = [count for turn, count in zip(turns, counts, strict=True) for _ in turn]
        for turn in turns:
            if not turn:  # an empty answer that the template's marks leave out
                continue
            start, end = turn[-1]
            body = start + len(rendered[start:end].rstrip())
            if rendered[start:body].endswith(self.ends):
                if not self.has_marks:  # a space behind the end is the template's, not the answer's
                    stop = start + len(rendered[start:end].rstrip(" "))
                    spans = [(a, stop if b == end else b) for a, b in spans]
                continue
            if self.eos is None:
                raise UserError(
                    f"The chat template of '{self.directory}' ends an answer without a special "
                    f"token, and the tokenizer has no eos_token: the model could not learn to stop."
                )
            if rendered[body:].lstrip().startswith(self.eos):  # the marks leave it out
                stop = rendered.index(self.eos, body) + len(self.eos)
                spans = [(a, stop if b == end else b) for a, b in spans]
            else:
                edits.append((body, end, self.eos))
        text, spans = apply_edits(rendered, edits, spans)

        bare = self.bos is not None and text.startswith(self.bos)
        encoding = self.encoder.encode(text, add_special_tokens=not bare)
        tokens = np.array(encoding.ids, np.int32)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        weights = np.zeros(len(tokens), np.float32)
        for (start, end), count in zip(spans, each, strict=True):
            weights[(starts < end) & (ends > start)] = count
        repeats = np.ones(len(tokens), np.int64)
        for (token_id, kind), many in zip(self.media.items(), features, strict=False):
            slots = tokens == token_id
            if slots.sum() != len(many):
                raise UserError(
                    f"The chat template of '{self.directory}' renders {slots.sum()} {kind} "
                    f"placeholders for {len(many)} {kind}s. Does it know {kind} parts "
                    f"({{'type': '{kind}'}}) in every role that has them?"
                )
            weights[slots] = 0  # a placeholder is not written by anybody
            repeats[slots] = many
        return np.repeat(tokens, repeats), np.repeat(weights, repeats)


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
