"""`pytest --without-torch`: leaves out the tests that import torch, PEFT, bitsandbytes or TRL.

Read from the source, so that an environment in which a reference is merely broken skips nothing
by itself. A file goes whole if it, or a helper beside it, imports a reference at its top or in a
function that is no test; a test that imports one in its own body goes alone. The run's end names
all of them.
"""

import ast
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
REFERENCES = frozenset({"torch", "peft", "bitsandbytes", "trl"})


def imported(node: ast.AST) -> set[str]:
    """Return the first words of the modules that a statement imports, {} for any other node."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]}
    return set()


@cache
def module_needs(file: Path) -> bool:
    """Return whether a file, its own tests' bodies apart, imports a reference anywhere."""
    body = ast.parse(file.read_text()).body
    rest = [node for node in body if not getattr(node, "name", "").startswith("test_")]
    return any(statement_needs(node) for top in rest for node in ast.walk(top))


def statement_needs(node: ast.AST) -> bool:
    names = imported(node) - REFERENCES
    helpers = [folder / f"{name}.py" for folder in (TESTS, TESTS / "parity") for name in names]
    return bool(imported(node) & REFERENCES) or any(
        module_needs(helper) for helper in helpers if helper.exists()
    )


@cache
def tests_that_need(file: Path) -> frozenset[str]:
    """Return the names of a file's test functions that import a reference in their own bodies."""
    return frozenset(
        top.name
        for top in ast.parse(file.read_text()).body
        if isinstance(top, ast.FunctionDef) and top.name.startswith("test_")
        if any(statement_needs(node) for node in ast.walk(top))
    )


class WithoutTorch:
    """A pytest plugin; see the module's docstring."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.tests: set[str] = set()

    def pytest_ignore_collect(self, collection_path, config):
        if not collection_path.match("test_*.py") or not module_needs(collection_path):
            return None  # others decide
        self.files.add(str(collection_path.relative_to(config.rootpath)))
        return True

    def pytest_collection_modifyitems(self, config, items):
        out = [item for item in items if item.originalname in tests_that_need(item.path)]
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=out)
        self.tests = {f"{item.location[0]}::{item.originalname}" for item in out}

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(
            f"left out without torch: {len(self.files)} files, {len(self.tests)} tests of others"
        )
        for name in [*sorted(self.files), *sorted(self.tests)]:
            terminalreporter.write_line(name)
