"""Spans of answers in a rendered conversation: by the template's marks, or by prefixes.

A turn's edges are where the prompt that asks for it ends, `render(messages[:i], prompt)`, and where
the conversation that ends with it does, `render(messages[:i + 1])`. To render every prefix takes
the square of the turns, so each turn is rendered behind the exchange before it alone, and what it
adds there is taken where the whole is exactly the sum of these. A template that counts turns, or
looks further back, adds something else: there every prefix is rendered.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlm_jax.data.text.template import Messages, Span, Template
from vlm_jax.errors import UserError

Render = Callable[[Messages, bool], tuple[str, list[Span]]]


class Edges(NamedTuple):
    """A turn's edges in the whole, None where the prefix that they end is none of it.

    marks: how many generation marks lie up to its end.
    """

    start: int | None
    end: int | None
    marks: int


def find_answers(
    render: Render, messages: Messages, prompt: bool, template: Template, ends: tuple[str, ...]
) -> tuple[str, list[list[Span]]]:
    """Return the rendered text and, for every assistant turn, the spans of its answer.

    ends: the special tokens that may end a turn. Raises `UserError` where answers cannot be
    separated from prompts, or are not in the text as they are.
    """
    rendered, marks = render(messages, prompt)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

    @functools.cache
    def edges() -> list[Edges]:
        try:
            short = _short_edges(render, messages, places, (rendered, marks), prompt)
        except UserError:  # a template may refuse a part of what it takes as a whole
            short = None
        return short or _long_edges(render, messages, places, rendered)

    if not template.has_marks:
        turns = [[_added(template, i, edge)] for i, edge in zip(places, edges(), strict=True)]
    elif len(marks) == len(places):
        turns = [[mark] for mark in marks]
    else:  # several marks a turn, or none: count what each turn adds
        counts = [edge.marks for edge in edges()]
        turns = [marks[a:b] for a, b in zip([0, *counts], counts, strict=False)]
    if template.has_marks:
        for number, spans in enumerate(turns):
            spans[:1] = [_with_space(rendered, span, edges, number) for span in spans[:1]]
            spans[-1:] = [_with_end(rendered, span, edges, number, ends) for span in spans[-1:]]
    for i, spans in zip(places, turns, strict=True):
        texts = [part["text"].strip() for part in messages[i]["content"] if "text" in part]
        written = "".join(rendered[a:b] for a, b in spans)
        if not all(text in written for text in texts):
            raise UserError(
                f"The chat template of '{template.directory}' does not render the assistant's turn "
                f"{i} as it is: {texts!r:.200} became {written!r:.200}. Its loss would be wrong; "
                f"correct the template (chat_template.jinja) or the record."
            )
    return rendered, turns


def _added(template: Template, i: int, edge: Edges) -> Span:
    """Return turn i's answer where nothing marks it: what it adds to its prompt."""
    if edge.start is None or edge.end is None or edge.end < edge.start:
        raise UserError(
            f"The chat template of '{template.directory}' renders message {i} (assistant) in a way "
            f"that does not begin with the prompt that asks for it, so its answer cannot be "
            f"told from its prompt. Add {{% generation %}} marks to chat_template.jinja or, "
            f"where the conversation begins with an assistant, remove that turn."
        )
    return edge.start, edge.end


def _with_space(rendered: str, mark: Span, edges: Callable[[], list[Edges]], number: int) -> Span:
    """Return a turn's mark, from where its prompt ends if only white space is in between.

    LLaVA-1.5's template marks the answer behind "ASSISTANT: ", but prompts with "ASSISTANT:":
    the space, to Llama's tokenizer often a token, is for the model to write.
    """
    start, end = mark
    if not rendered[start - 1 : start].isspace():
        return mark
    before = edges()[number].start
    return (before, end) if before is not None and rendered[before:start].isspace() else mark


def _with_end(
    rendered: str,
    mark: Span,
    edges: Callable[[], list[Edges]],
    number: int,
    ends: tuple[str, ...],
) -> Span:
    """Return a turn's mark, up to the special token that ends the turn where it leaves it out.

    It is the turn's own if the conversation that ends with the turn has it too.
    """
    start, end = mark
    if rendered[start:end].rstrip().endswith(ends):
        return mark
    after = edges()[number].end
    rest = rendered[end:after] if after is not None else ""
    word = rest.lstrip()
    found = max((e for e in ends if word.startswith(e)), key=len, default="")
    return (start, end + len(rest) - len(word) + len(found)) if found else mark


def _long_edges(
    render: Render, messages: Messages, places: Sequence[int], rendered: str
) -> list[Edges]:
    """Return the edges of each assistant turn, every prefix rendered whole."""
    edges = []
    for i in places:
        before = render(messages[:i], True)[0]
        after, marks = render(messages[: i + 1], False)
        edges.append(
            Edges(
                len(before) if rendered.startswith(before) else None,
                len(after) if rendered.startswith(after) else None,
                len(marks),
            )
        )
    return edges


def _short_edges(
    render: Render,
    messages: Messages,
    places: Sequence[int],
    full: tuple[str, list[Span]],
    prompt: bool,
) -> list[Edges] | None:
    """Return the same from each turn behind the exchange before it, or None where they differ.

    They are compared with the whole, and every power of two of the turns with its whole prefix.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
    lead, rendered, length, counted = messages[:first], full[0], 0, 0
    edges: list[Edges] = []

    def adds(place: str, base: str) -> int | None:
        """Return where the whole continues after what `place` adds to `base`, if it does."""
        piece = place[len(base) :]
        same = place.startswith(base) and rendered.startswith(piece, length)
        return length + len(piece) if same else None

    done, known = 0, ("", 0)  # the messages that are accounted for; a short text of them, its marks
    for number, i in enumerate([*places, len(messages)]):
        begin = max(first, done - 2)
        if begin > first:
            text, marks = render([*lead, *messages[begin:done]], False)
            known = text, len(marks)
        here = [*lead, *messages[begin:i]]
        if i == len(messages):  # what follows the last answer
            text = known[0] if done == i and not prompt else render(here, prompt)[0]
            return edges if adds(text, known[0]) == len(rendered) else None
        before = render(here, True)[0]
        start = adds(before, known[0])
        if start is None:
            return None
        length = start
        is_full = begin == first and i + 1 == len(messages) and not prompt
        after, marks = full if is_full else render([*here, messages[i]], False)
        end, sampled = adds(after, before), begin > first and number & (number - 1) == 0
        if end is None or (sampled and render(messages[:i], True)[0] != rendered[:start]):
            return None
        length, counted = end, counted + len(marks) - known[1]
        edges.append(Edges(start, end, counted))
        done, known = i + 1, (after, len(marks))
    return edges
