"""transformers' sandbox for chat templates, with bounds on memory.

The sandbox keeps a template from files, modules and private attributes, and `within` ends what
loops for ever. What the interpreter does in one step (a power, a product, a join, the text of a
list that names itself 2^n times) cannot be ended, so its size is computed before it is done.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from vlm_jax.files.limits import TEMPLATE_CHARACTERS, TEMPLATE_NUMBER

START, END = "\ue0f4", "\ue0f5"  # around what `{% generation %}` marks, until a rendering is done


class TooLarge(Exception):
    """What a template asks for; the message follows its name."""


# Of text and containers together, so that no list can name one long text without end: an item of
# a container counts as so many characters.
ITEM = 64
CONTAINERS: tuple[type[Any], ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    *map(type, ({}.keys(), {}.values(), {}.items())),
)


def _weight(value: Any) -> int:
    """Return the characters that a value holds, those of its items included."""
    if isinstance(value, str | bytes):
        return len(value)
    total, left = 0, [value]
    while left and total <= TEMPLATE_CHARACTERS:
        one = left.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, CONTAINERS):
            left += (*one, *one.values()) if isinstance(one, dict) else one
        total += ITEM
    return total


def _check(characters: int, by: str) -> None:
    if characters > TEMPLATE_CHARACTERS:
        raise TooLarge(f"makes more than {TEMPLATE_CHARACTERS} characters of text (by {by})")


def _weighed(value: Any, by: str) -> Any:
    _check(_weight(value), by)
    return value


def compile_template(source: str) -> Any:
    """Return a compiled `jinja2.Template` of a chat template's source."""
    compiled = _environment().from_string(source)
    names = compiled.root_render_func.__globals__
    for name in ("str_join", "markup_join"):  # what `~` becomes
        names[name] = functools.partial(_joined, names[name])
    return compiled


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
        raise TooLarge(f"asks for a number, a width or a count above {TEMPLATE_NUMBER} (by {by})")


WIDE = re.compile(r"%(\([^)]*\))?[^%a-zA-Z]*(\d{5}|\*)|\{[^{}]*:[^{}]*(\d{5}|\{)")


def _format(by: str, text: str) -> None:
    if WIDE.search(text):
        raise TooLarge(f"asks for a field of any width (by {by})")


# Filters and methods that make much of little, by what they make; of the others no result is more
# than some times as long as what goes in.


def _repeats(value: Any, *args: Any) -> int:
    """Of each character, or each item, as many as the largest argument says or is long."""
    return _weight(value) * max(map(_size, args), default=1)


def _size(arg: Any) -> int:
    if isinstance(arg, int):
        return arg
    values = arg.values() if isinstance(arg, dict) else arg
    items = values if isinstance(arg, CONTAINERS) else [arg]
    return sum(len(item) for item in items if isinstance(item, str))


def _replaces(value: Any, old: Any = "", new: Any = "", *_: Any) -> int:
    text = str(value)
    return len(text) + text.count(str(old)) * _weight(new)


def _joins(items: Any, text: Any = "", *_: Any) -> int:
    count = len(items) if hasattr(items, "__len__") else 0
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
    numbers = [abs(arg) for arg in (*args, *values.values()) if isinstance(arg, int)]
    _number(max(numbers, default=0), by)
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
    """Weighs lists, tuples and dicts where a template writes them."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        display = isinstance(node, nodes.List | nodes.Dict | nodes.Tuple)
        if not display or getattr(node, "ctx", "load") != "load":  # a tuple may be assigned to
            return super().visit(node, *args, **kwargs)
        self.write("environment.weigh(")
        super().visit(node, *args, **kwargs)
        self.write(")")


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
            _check(length, "its output")
        return "".join(kept)

    def weigh(self, value: Any) -> Any:
        return _weighed(value, "a list")


class _Marks(Extension):
    """`{% generation %} ... {% endgeneration %}`, written around what it holds."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{START}{caller()}{END}"


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
