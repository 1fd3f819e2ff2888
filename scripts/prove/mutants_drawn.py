"""Edits of the package drawn from all that cosmic-ray can make, and the tests that run their lines.

    pip install -e .[mutants]   # cosmic-ray, https://cosmic-ray.readthedocs.io

Every place that its operators can change is as likely as any other, and so is then every change of
it. Left out by rule is what no test could be asked to notice:

- type annotations, which nothing reads;
- f-strings that an exception is raised with, that are printed or passed to a warning: the words of
  a message (but not whether it is raised, nor what it is raised for);
- `is` for `==`, `is not` for `!=`, and the other way round: of None, numbers and words they mean
  the same;
- decorators, whose removal most often only stops the module from importing.
"""

import ast
import json
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "vlm_jax"
PATHS = (
    "models/layers",
    "train",
    "weights",
    "hub",
    "data",
    "adapters/lora.py",
    "generation.py",
    "positions.py",
)
SAME = ({"Is", "Eq"}, {"IsNot", "NotEq"})
PRINTING = {"print", "warn", "log"}

Position = tuple[int, int]


class Drawn(NamedTuple):
    """file: below the repository's root. begin: the line where the edited statement begins."""

    file: str
    begin: int
    line: int
    operator: str
    text: str  # of the whole file, edited


def draw(root: Path, seed: int) -> Iterator[Drawn]:
    """Yield edits of all files in PATHS, in an order that the seed decides, no place twice.

    A place is known by its line's text, so that other changes of the package do not draw others.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    known = dict(operators())
    drawn: list[tuple[float, str, int, tuple[str, int]]] = []
    for file in files(root):
        source = (root / file).read_text(encoding="utf-8")
        tree, excluded = get_ast(source), messages_and_annotations(source)
        places: dict[Position, list[tuple[str, int]]] = defaultdict(list)
        for name, operator in known.items():
            found = (p for node in ast_nodes(tree) for p in operator.mutation_positions(node))
            for occurrence, (start, end) in enumerate(found):
                if not any(a <= start and end <= b for a, b in excluded):
                    places[start].append((name, occurrence))
        lines, seen = source.splitlines(), Counter[tuple[str, int]]()
        for line, column in sorted(places):
            text = lines[line - 1]
            key = text.strip(), column - len(text) + len(text.lstrip())
            seen[key] += 1
            rng = random.Random(f"{seed} {file} {key} {seen[key]}")
            drawn.append((rng.random(), file, line, rng.choice(places[line, column])))
    for _, file, line, (name, occurrence) in sorted(drawn):
        source = (root / file).read_text(encoding="utf-8")
        text = mutate_code(source, known[name], occurrence)
        assert text is not None and text != source, (file, line, name)
        try:
            with warnings.catch_warnings(action="ignore"):
                compile(text, file, "exec")
        except SyntaxError:  # such as a dictionary's ** as another operator
            continue
        yield Drawn(file, statement(source, line), line, name, text)


def files(root: Path) -> list[str]:
    """Return the modules below PATHS, relative to the root."""
    found: list[Path] = []
    for name in PATHS:
        path = root / PACKAGE / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(path.relative_to(root)) for path in found]


def operators() -> list[tuple[str, Any]]:
    """Return (name, operator) of cosmic-ray's, less those of the rule above."""
    from cosmic_ray.operators.provider import OperatorProvider

    provider, found = OperatorProvider(), []
    for name in provider:
        swapped = set(name.removeprefix("ReplaceComparisonOperator_").split("_"))
        if name != "RemoveDecorator" and swapped not in SAME and not provider[name].arguments():
            found.append((name, provider[name]()))
    return found


def statement(source: str, line: int) -> int:
    """Return the first line of the innermost statement that a line is of."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt))
    return max(node.lineno for node in nodes if node.lineno <= line <= (node.end_lineno or 0))


def messages_and_annotations(source: str) -> list[tuple[Position, Position]]:
    """Return the spans of type annotations and of the f-strings of messages."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            found.append(node.annotation)
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            found.append(node.returns)
        told = isinstance(node, ast.Raise) or (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", None)) in PRINTING
        )
        if told:
            found += [inner for inner in ast.walk(node) if isinstance(inner, ast.JoinedStr)]
    lines = source.splitlines()

    def place(line: int, offset: int) -> Position:  # ast counts bytes
        return line, len(lines[line - 1].encode()[:offset].decode())

    return [
        (place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset))
        for node in found
    ]


class Map:
    """Which tests run which lines, of the files that mutants_plugin.py wrote, one a test file."""

    def __init__(self, folder: Path):
        self.seconds: dict[str, float] = {}
        self.parents: list[str] = []
        self.users: dict[str, set[str]] = defaultdict(set)  # of a context: tests
        self.lines: dict[str, dict[str, set[int]]] = defaultdict(dict)
        for path in sorted(folder.glob("*.json")):
            rows = json.loads(path.read_text())
            self.seconds |= rows["seconds"]
            self.parents += rows["parents"]
            for test, fixtures in rows["fixtures"].items():
                for context in (test, *fixtures):
                    self.users[context].add(test)
            for context, lines in rows["lines"].items():
                for file, numbers in lines.items():
                    self.lines[context].setdefault(file, set()).update(numbers)
        self.total = {
            context: sum(map(len, lines.values())) for context, lines in self.lines.items()
        }

    def tests(self, file: str, begin: int, line: int, most: float) -> list[str]:
        """Return tests that run a line, the likeliest to notice its change first, file by file.

        Likely are cheap tests that run little else than the file. begin: where its statement
        begins, since Python does not tell of each line of one. most: seconds of them all. Of a line
        that runs on import they are the tests that run any other line of the file; of one that none
        is known to run, those that start processes.
        """
        found: dict[str, float] = {}
        known = (
            {context for context, lines in self.lines.items() if number in lines.get(file, ())}
            for number in range(line, begin - 1, -1)
        )
        running = next(filter(None, known), set())
        imported = running == {""}
        for context, lines in self.lines.items():
            own = lines.get(file, set())
            if context and own and (imported or context in running):
                for test in self.users[context]:
                    price = (0.05 + self.seconds[test]) * self.total[context] / len(own)
                    found[test] = min(price, found.get(test, price))
        if not running:
            found = {test: self.seconds[test] for test in self.parents}
        chosen: dict[str, list[str]] = {}
        spent = 0.0
        for test in sorted(found, key=lambda test: (found[test], test)):
            if spent + self.seconds[test] <= most:
                spent += self.seconds[test]
                chosen.setdefault(test.split("::")[0], []).append(test)
        return [test for tests in chosen.values() for test in tests]
