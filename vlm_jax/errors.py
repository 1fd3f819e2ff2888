"""UserError, the one exception for users: a paragraph of what, where, expected, remedy."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

# What a terminal obeys (control characters), and what nothing shows but a reader of text sees: line
# separators, Unicode's Default_Ignorable_Code_Points (zero width, direction, tags, fillers); and
# halves of surrogate pairs, which no file or terminal takes.
HIDDEN = (
    *((0x00, 0x08), (0x0B, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C)),
    *((0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x2028, 0x202E)),
    *(
        (0x2060, 0x206F),
        (0x3164, 0x3164),
        (0xD800, 0xDFFF),
        (0xFE00, 0xFE0F),
        (0xFEFF, 0xFEFF),
        (0xFFA0, 0xFFA0),
    ),
    *((0xFFF0, 0xFFFB), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
)
MARKS = {code: f"⟨U+{code:04X}⟩" for first, last in HIDDEN for code in range(first, last + 1)}
# Where there is a picture of a control character, that.
MARKS |= {code: chr(0x2400 + code) for code in MARKS if code < 32} | {0x7F: "␡"}


def marked(text: str) -> str:
    """Return text with control and invisible characters replaced by marks.

    Line breaks and tabs stay.
    """
    return text.translate(MARKS)


class UserError(Exception):
    """Bad input from outside: the command line prints its text alone and exits with code 2.

    Raised for anything the user can correct (a missing file, an unknown key, a checkpoint that
    does not fit its config). Its message says what was wrong, where, what was expected, and
    what to do. Anything else that is raised is a bug and keeps its traceback. It may quote data,
    whose control characters are marks in it.
    """

    def __str__(self) -> str:
        return marked(super().__str__())


@contextlib.contextmanager
def explained(
    kinds: type[BaseException] | tuple[type[BaseException], ...], words: Callable[[Any], str]
) -> Iterator[None]:
    """Raise `UserError` with the words for an exception of these kinds that a block raises."""
    try:
        yield
    except kinds as error:
        raise UserError(words(error)) from error


def refuse(*rules: tuple[object, str]) -> None:
    """Raise `UserError` for the first of the rules (whether it is broken, the message of that)."""
    for broken, message in rules:
        if broken:
            raise UserError(message)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def nearest(name: str, known) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
