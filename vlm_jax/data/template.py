"""A checkpoint's chat template, rendered within limits of time and size.

transformers' sandbox keeps a template from files, modules and private attributes. What is left is
that it never ends or fills the memory: loops are ended by the clock, and what the interpreter does
in one step (a power, a product, a join) is bounded before it is done.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from vlm_jax.data.watchdog import within
from vlm_jax.errors import UserError
from vlm_jax.limits import (
    TEMPLATE_CHARACTERS,
    TEMPLATE_NUMBER,
    TEMPLATE_SECONDS,
    TEMPLATE_SOURCE,
)

Span = tuple[int, int]
Messages = Sequence[dict[str, Any]]
START, END = "\ue0f4", "\ue0f5"  # around what `{% generation %}` marks, until a rendering is done


class BadTemplate(UserError):
    """A template that no conversation can be rendered by: no record's fault."""


class Template:
    """A template as transformers compiles it, with `{% generation %}` marks. Thread-safe.

    directory: for errors. Raises `UserError` for what is no valid Jinja, or too large.
    """

    def __init__(self, source: str, directory: str):
        self.source, self.directory = source, directory
        self._refused: str | None = None
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        if len(source) > TEMPLATE_SOURCE:
            raise UserError(
                f"The chat template of '{directory}' has {len(source)} characters, and more than "
                f"{TEMPLATE_SOURCE} are not read. Copy the checkpoint's own."
            )
        try:
            self._compiled = within(TEMPLATE_SECONDS, _environment().from_string, source)
        except Exception as error:  # Python compiles what Jinja writes, and has limits of its own
            raise UserError(
                f"The chat template of '{directory}' is no valid Jinja: {_said(error)}. Mend "
                f"chat_template.jinja, or copy the checkpoint's own."
            ) from error
        names = self._compiled.root_render_func.__globals__
        for name in ("str_join", "markup_join"):  # what `~` becomes
            names[name] = functools.partial(_joined, names[name])

    def render(self, messages: Messages, prompt: bool, **values: Any) -> tuple[str, list[Span]]:
        """Return the text and what its generation marks hold.

        prompt: with what asks the assistant to write. Raises `UserError` where the template
        refuses the conversation, `BadTemplate` where it takes too long or asks for too much.
        """
        if self._refused is not None:  # or each record would take as long again
            raise BadTemplate(self._refused)
        values |= {"tools": None, "documents": None, "add_generation_prompt": prompt}
        try:
            text = within(TEMPLATE_SECONDS, self._compiled.render, messages=messages, **values)
        except (TimeoutError, _TooLarge) as error:
            self._refused = (
                f"The chat template of '{self.directory}' {error} for one conversation, which none "
                f"needs: it is damaged, or meant to stop whoever uses it. Copy the checkpoint's "
                f"own chat_template.jinja."
            )
            raise BadTemplate(self._refused) from error
        except Exception as error:  # a template is the checkpoint's own code
            roles = [message["role"] for message in messages]
            few = ", ".join(roles[:6]) + (f", ... {len(roles)} in all" if len(roles) > 6 else "")
            raise UserError(
                f"The chat template of '{self.directory}' refuses the conversation ({few}): "
                f"{_said(error)}. Check the roles and their order."
            ) from error
        return _take_marks(text) if self.has_marks else (text, [])


def _said(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _take_marks(text: str) -> tuple[str, list[Span]]:
    """Return the text without its marks, and what each pair of them held."""
    pieces, places, length = [], [], 0
    for piece in re.split(f"([{START}{END}])", text):
        if piece in (START, END):
            places.append(length)
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), list(zip(places[::2], places[1::2], strict=True))


class _Marks(Extension):
    """`{% generation %} ... {% endgeneration %}`, written around what it holds."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{START}{caller()}{END}"


# What is too large


class _TooLarge(Exception):
    pass


# Of text and containers together, so that no list can name one long text without end: an item of
# a container counts as so many characters.
ITEM = 64
CONTAINERS = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    *(type(v()) for v in ({}.keys, {}.values, {}.items)),
)


def _weight(value: Any) -> int:
    """Return the characters that a value holds, those of its items included."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, CONTAINERS):
        return ITEM
    total, left = 0, [value]
    while left and total <= TEMPLATE_CHARACTERS:
        one = left.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, CONTAINERS):
            left += one.keys() if isinstance(one, dict) else one
            left += one.values() if isinstance(one, dict) else ()
        total += ITEM
    return total


def _check(characters: int, by: str) -> None:
    if characters > TEMPLATE_CHARACTERS:
        raise _TooLarge(f"asks (by {by}) for more than {TEMPLATE_CHARACTERS} characters")


def _weighed(value: Any, by: str) -> Any:
    _check(_weight(value), by)
    return value


def _joined(join: Callable[[Iterable[Any]], str], pieces: Sequence[Any]) -> str:
    _check(sum(map(_weight, pieces)), "'~'")
    return join(pieces)


# Binary operators: what the result takes, from the operands.


def _times(left: Any, right: Any) -> int:
    if isinstance(left, int):
        left, right = right, left
    if isinstance(left, int):
        _number(left.bit_length() + right.bit_length(), "'*'")
        return 0
    return _weight(left) * max(right, 0) if isinstance(right, int) else 0


def _power(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        _number(left.bit_length() * max(right, 0), "'**'")
    return 0


def _plus(left: Any, right: Any) -> int:
    if isinstance(left, str) or not isinstance(left, CONTAINERS):
        return _weight(left) + _weight(right)
    # A list that grows by one item in a loop is weighed each time that it doubled.
    sizes = len(left), len(left) + (len(right) if isinstance(right, CONTAINERS) else 0)
    return _weight(left) + _weight(right) if len({n.bit_length() for n in sizes}) > 1 else 0


def _modulo(left: Any, right: Any) -> int:
    if isinstance(left, str):
        _format("%", left)
        return len(left) + _weight(right) * left.count("%")
    return 0


OPERATORS: dict[str, Callable[[Any, Any], int]] = {
    **{"+": _plus, "*": _times},
    **{"**": _power, "%": _modulo},
}


def _number(size: int, by: str) -> None:
    if abs(size) > TEMPLATE_NUMBER:
        raise _TooLarge(f"asks (by {by}) for a number above {TEMPLATE_NUMBER}")


WIDE = re.compile(r"%(\([^)]*\))?[^%a-zA-Z]*(\d{5}|\*)|\{[^{}]*:[^{}]*(\d{5}|\{)")


def _format(by: str, text: str) -> None:
    if WIDE.search(text):
        raise _TooLarge(f"asks (by {by}) for a field of unknown width")


# Filters and methods that make much of little, by what they make; of the others no result is more
# than some times as long as what goes in.


def _repeats(value: Any, *args: Any) -> int:
    """Of each character, or each item, as many as the largest argument is long or says."""
    sizes = (arg if isinstance(arg, int) else _weight(arg) for arg in args)
    return _weight(value) * max(sizes, default=1)


def _replaces(value: Any, old: Any = "", new: Any = "", *_: Any) -> int:
    text = str(value)
    return len(text) + text.count(str(old)) * _weight(new)


def _joins(items: Any, text: Any = "", *_: Any) -> int:
    count = len(items) if isinstance(items, (str, *CONTAINERS)) else 0
    return _weight(items) + count * len(str(text))


def _formats(value: Any, *args: Any) -> int:
    _format("format", str(value))
    return len(str(value)) + str(value).count("{") * sum(map(_weight, args))


AMPLIFIERS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(
        ("indent", "expandtabs", "wordwrap", "translate", "tojson", "urlize"), _repeats
    ),
    **{"replace": _replaces, "format": _formats, "format_map": _formats},
    **{"join": _joins, ".join": lambda text, items="", *_: _joins(items, text)},
}


def _bounded(name: str, by: str, args: Sequence[Any], values: dict[str, Any]) -> list[Any]:
    """Return the arguments of a filter or method, its value first, if they may be used."""
    for arg in (*args, *values.values()):
        if isinstance(arg, int):
            _number(arg, by)
    if name not in AMPLIFIERS or not args:
        return list(args)
    args = [list(arg) if hasattr(arg, "__next__") else arg for arg in args]
    _check(AMPLIFIERS[name](*args, *values.values()), by)
    return args


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first, by = int(hasattr(function, "jinja_pass_arg")), f"the filter '{name}'"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = _bounded(name, by, args[first:], kwargs)
        return _weighed(function(*args[:first], *given, **kwargs), by)

    return call


class _Displays(CodeGenerator):
    """Weighs lists, tuples and dicts as they are written, or a few could name each other 2^n times."""

    def _weigh(self, visit: Callable[..., None], node: Any, frame: Any) -> None:
        self.write("environment.weigh(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: Any, frame: Any) -> None:
        self._weigh(super().visit_List, node, frame)

    def visit_Dict(self, node: Any, frame: Any) -> None:
        self._weigh(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: Any, frame: Any) -> None:
        if node.ctx == "load":
            self._weigh(super().visit_Tuple, node, frame)
        else:  # what is assigned to
            super().visit_Tuple(node, frame)


class _Bounded(ImmutableSandboxedEnvironment):
    code_generator_class = _Displays
    intercepted_binops = frozenset(OPERATORS)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check(OPERATORS[operator](left, right), f"'{operator}'")
        return self.binop_table[operator](left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps `format`
        name = getattr(method, "__name__", type(method).__name__)
        by, own = f"'{name}()'", [method.__self__] if hasattr(method, "__self__") else []
        name = ".join" if own and name == "join" else name
        given = _bounded(name, by, [*own, *args], kwargs)[len(own) :]
        return _weighed(super().call(context, obj, *given, **kwargs), by)

    def concat(self, pieces: Iterable[str]) -> str:
        kept, length = [], 0
        for piece in pieces:
            kept.append(piece)
            length += len(piece)
            if length > TEMPLATE_CHARACTERS:
                _check(length, "its output")
        return "".join(kept)

    def weigh(self, value: Any) -> Any:
        return _weighed(value, "a list")


def _environment() -> _Bounded:
    """Return transformers' environment for chat templates, bounded."""
    theirs = chat_template_utils._compile_jinja_template("").environment
    ours = _Bounded(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[_Marks, loopcontrols],
    )
    ours.globals.update(theirs.globals)
    ours.filters.update({name: _bounded_filter(name, f) for name, f in theirs.filters.items()})
    return ours
