"""Says in words what a scene shows: captions, and questions answered in whole sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from .scenes import COLORS, KINDS, Scene, Shape
from .tokenizer import ENGLISH

Turn = tuple[str, str]  # what the user says, what the assistant answers
WORDS = tuple(ENGLISH.split())
NUMBERS = ("no", "one", "two", "three", "four")


def conversation(
    rng: np.random.Generator, scene: Scene, turns: int, caption: float, brief: float = 0.0
) -> list[Turn]:
    """Return `turns` turns about the scene; the first is a caption with probability `caption`.

    brief: the share of the other turns that ask for a single word.
    """
    if brief:
        return [ask_briefly(rng, scene, brief) for _ in range(turns)]
    said = [describe(rng, scene)] if rng.random() < caption else []
    while len(said) < turns:
        turn = ASK[rng.integers(len(ASK))](rng, scene)
        if turn is not None and turn not in said:
            said.append(turn)
    return [(vary(rng, question), answer) for question, answer in said]


def vary(rng: np.random.Generator, question: str) -> str:
    """Return the question as people type it: often without a capital."""
    return question if rng.random() < 0.5 else question[0].lower() + question[1:]


def pick(rng: np.random.Generator, *options):
    return options[rng.integers(len(options))]


def a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def at(place: str) -> str:
    return {"middle": "in the middle", "left": "on the left", "right": "on the right"}.get(
        place, f"at the {place}"
    )


def name(shape: Shape) -> str:
    return f"{shape.color} {shape.kind}"


def only(scene: Scene, what: Callable[[Shape], object]) -> list[Shape]:
    """Return the shapes that no other equals in `what`: a question can mean just that one."""
    seen = Counter(what(shape) for shape in scene.shapes)
    return [shape for shape in scene.shapes if seen[what(shape)] == 1]


def absent(rng: np.random.Generator, words, present) -> str:
    return pick(rng, *sorted(set(words) - set(present)))


def describe(rng: np.random.Generator, scene: Scene) -> Turn:
    ask = pick(
        rng,
        "Describe the picture.",
        "What do you see?",
        "Describe this image briefly.",
        "Write a caption.",
    )
    said = [f"{a(name(shape))} {at(shape.place)}" for shape in scene.shapes]
    text = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    return ask, text[0].upper() + text[1:] + "."


def ask_color(rng: np.random.Generator, scene: Scene) -> Turn | None:
    if len(scene.shapes) == 1 and rng.random() < 0.5:
        ask = pick(
            rng,
            "Which color do you see?",
            "Name the color of the shape.",
            "What color was used here?",
        )
        return ask, f"It is {scene.shapes[0].color}."
    if not (known := only(scene, lambda shape: shape.kind)):
        return None
    shape = pick(rng, *known)
    ask = pick(
        rng,
        "Which color does the {} have?",
        "Name the color of the {}.",
        "What is the {}'s color?",
        "In what color is the {} drawn?",
    )
    return ask.format(shape.kind), f"The {shape.kind} is {shape.color}."


def ask_kind(rng: np.random.Generator, scene: Scene) -> Turn | None:
    if len(scene.shapes) == 1 and rng.random() < 0.5:
        ask = pick(
            rng,
            "Which shape do you see?",
            "Name the shape.",
            "What kind of shape is this?",
            "What was drawn?",
        )
        return ask, f"It is {a(scene.shapes[0].kind)}."
    if not (known := only(scene, lambda shape: shape.color)):
        return None
    shape = pick(rng, *known)
    ask = pick(
        rng,
        "Which shape is {}?",
        "What kind of thing is {}?",
        "What is the {} thing called?",
        "Name the {} shape.",
    )
    return ask.format(shape.color), f"The {shape.color} one is {a(shape.kind)}."


def ask_place(rng: np.random.Generator, scene: Scene) -> Turn | None:
    if rng.random() < 0.5:
        if not (known := only(scene, name)):
            return None
        shape = pick(rng, *known)
        ask = pick(
            rng,
            "Where is the {}?",
            "In which part of the picture is the {}?",
            "Where do you find the {}?",
        )
        return ask.format(name(shape)), f"It is {at(shape.place)}."
    if not (known := only(scene, lambda shape: shape.place)):
        return None
    shape = pick(rng, *known)
    ask = pick(rng, "What is {}?", "What can be seen {}?", "Which shape sits {}?")
    return ask.format(at(shape.place)), f"There is {a(name(shape))}."


def ask_count(rng: np.random.Generator, scene: Scene) -> Turn | None:
    what = pick(
        rng, "shape", pick(rng, *scene.shapes).color + " shape", pick(rng, *scene.shapes).kind
    )
    if rng.random() < 0.1:
        what = pick(rng, *KINDS)
    count = sum(matches(shape, what) for shape in scene.shapes)
    ask = pick(rng, "How many {} are there?", "Count the {}.", "How many {} does the picture show?")
    be, word = ("is", what) if count == 1 else ("are", plural(what))
    return ask.format(plural(what)), f"There {be} {NUMBERS[count]} {word}."


def matches(shape: Shape, what: str) -> bool:
    """Say whether a shape is 'a red shape', 'a star', 'a red star' or just 'a shape'."""
    color, _, kind = what.rpartition(" ")
    return (not color or color == shape.color) and kind in ("shape", shape.kind)


def something(rng: np.random.Generator, scene: Scene) -> tuple[str, list[Shape]]:
    """Return words for a shape, which is there about half of the time, and the shapes they fit."""
    shape = pick(rng, *scene.shapes)
    # Kinds are harder to tell apart than colours, so they are asked for more often.
    about, there = pick(rng, "color", "kind", "kind", "kind", "both"), rng.random() < 0.5
    if about == "color":
        what = (
            shape.color if there else absent(rng, COLORS, (s.color for s in scene.shapes))
        ) + " shape"
    elif about == "kind":
        what = shape.kind if there else absent(rng, KINDS, (s.kind for s in scene.shapes))
    elif there:
        what = name(shape)
    elif rng.random() < 0.5:
        what = f"{absent(rng, COLORS, (s.color for s in scene.shapes))} {shape.kind}"
    else:
        what = f"{shape.color} {absent(rng, KINDS, (s.kind for s in scene.shapes))}"
    return what, [s for s in scene.shapes if matches(s, what)]


def ask_whether(rng: np.random.Generator, scene: Scene) -> Turn | None:
    what, found = something(rng, scene)
    ask = pick(
        rng,
        "Do you see {}?",
        "Can you find {} here?",
        "Does the picture show {}?",
        "Does the drawing contain {}?",
        "Is there {} somewhere?",
        "Is {} to be seen in the image?",
        "Would you say that {} is present?",
    )
    return ask.format(
        a(what)
    ), f"Yes, there is {a(name(found[0]))}." if found else f"No, there is no {what}."


def ask_whether_not(rng: np.random.Generator, scene: Scene) -> Turn | None:
    what, found = something(rng, scene)
    ask = pick(
        rng,
        "Is there no {} in this picture?",
        "Is the picture without any {}?",
        "Does the picture not show any {}?",
        "Is it true that no {} is here?",
        "Does the drawing contain no {}?",
        "Is it right that there is not any {}?",
        "Is no {} to be seen?",
    )
    return ask.format(
        what
    ), f"No, there is {a(name(found[0]))}." if found else f"Yes, there is no {what}."


def ask_compare(rng: np.random.Generator, scene: Scene) -> Turn | None:
    known = only(scene, name)
    if len(known) < 2:
        return None
    first, second = (known[i] for i in rng.permutation(len(known))[:2])
    if rng.random() < 0.5:
        if max(first.area, second.area) < 1.4 * min(first.area, second.area):
            return None  # too close to call
        sign, word = pick(rng, (1, "larger"), (-1, "smaller"))
        answer = first if sign * first.area > sign * second.area else second
        return (
            f"Which is {word}, the {name(first)} or the {name(second)}?",
            f"The {name(answer)} is {word}.",
        )
    if abs(first.x - second.x) < 6:
        return None
    side = pick(rng, "left", "right")
    holds = (first.x < second.x) == (side == "left")
    ask = f"Is the {name(first)} to the {side} of the {name(second)}?"
    return ask, "Yes, it is." if holds else "No, it is not."


# Colour and kind come twice: they are what the later tasks build on.
ASK = (
    ask_color,
    ask_color,
    ask_kind,
    ask_kind,
    ask_place,
    ask_count,
    ask_whether,
    ask_whether,
    ask_whether_not,
    ask_whether_not,
    ask_compare,
)


# To compare what is asked for with what is there takes a model longest to learn.
ASK_BRIEFLY = (ask_color, ask_kind, *3 * (ask_whether, ask_whether_not))


def ask_briefly(rng: np.random.Generator, scene: Scene, brief: float) -> Turn:
    """Return a turn whose answer is one bare word: of the scene, or a word to be said again.

    Without these the model has never written a word that begins an answer in small letters, and
    fine-tuning would have to teach it what such tokens are.
    """
    kind = rng.random()
    if kind < 0.15 * brief:
        word = pick(rng, *WORDS)
        return pick(rng, "Repeat the word {}.", "Say {}.", "Write {} again.").format(word), word
    turn = None
    while turn is None:
        turn = pick(rng, *ASK_BRIEFLY)(rng, scene)
    ask, answer = turn
    if kind >= brief:
        return turn
    first, last = answer.split()[0], answer.split()[-1].rstrip(".")
    word = first.rstrip(",").lower() if first in ("Yes,", "No,") else last
    return ask + pick(rng, " Answer in one word.", " One word.", " Just say the word."), word
