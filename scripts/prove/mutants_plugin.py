"""A pytest plugin of mutants.py: does the edited module import, and which lines does a test run.

MUTANTS_MODULE: a module to import before any test, so that an edit which nothing could import does
not count as noticed. MUTANTS_MAP: a file to write, as JSON: seconds of processor time of each test,
the shared fixtures that it uses, {test or fixture: {file: lines}} of the package's lines that each
runs, and which tests start processes, whose lines are not seen. What runs in a fixture that several
tests share is the fixture's, not the first test's.
"""

import importlib
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import pytest

NO_IMPORT = 9  # pytest's exit status where the module does not import
EVERY = ""  # the context of what runs while modules are imported


def pytest_configure(config):
    if "MUTANTS_MAP" in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ["MUTANTS_MAP"]), config.rootpath))


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    name = os.environ.get("MUTANTS_MODULE")
    if name is None:
        return
    try:
        module = importlib.import_module(name)
    except Exception as error:
        pytest.exit(f"{name} does not import: {error!r}", NO_IMPORT)
    if not Path(module.__file__).is_relative_to(session.config.rootpath):
        raise RuntimeError(f"{name} was imported from {module.__file__}, not from the copy.")


class Recorder:
    def __init__(self, file: Path, root: Path):
        import coverage

        self.file, self.root = file, root
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, source=[str(root / "vlm_jax")]
        )
        self.context = EVERY
        self.seconds: dict[str, float] = {}
        self.fixtures: dict[str, list[str]] = {}
        self.parents: list[str] = []
        self.coverage.start()

    def enter(self, context: str) -> str:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        return before

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        known = item._fixtureinfo.name2fixturedefs.values()
        shared = [one for found in known for one in found if one.scope != "function"]
        self.fixtures[item.nodeid] = [fixture_name(one) for one in shared]
        own, children, before = time.process_time(), children_seconds(), self.enter(item.nodeid)
        yield
        self.enter(before)
        children = children_seconds() - children
        self.seconds[item.nodeid] = round(time.process_time() - own + children, 3)
        if children > 1:  # Python's start takes less, and one that imports the package more
            self.parents.append(item.nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            yield
            return
        before = self.enter(fixture_name(fixturedef))
        yield
        self.enter(before)

    def pytest_sessionfinish(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        lines: dict[str, dict[str, list[int]]] = defaultdict(dict)
        for file in data.measured_files():
            of_context = defaultdict(list)
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    of_context[context].append(line)
            for context, found in of_context.items():
                lines[context][str(Path(file).relative_to(self.root))] = sorted(found)
        rows = {"seconds": self.seconds, "fixtures": self.fixtures, "parents": self.parents}
        self.file.write_text(json.dumps({**rows, "lines": lines}))


def fixture_name(fixturedef) -> str:
    return f"fixture {fixturedef.baseid} {fixturedef.argname}"


def children_seconds() -> float:
    return sum(os.times()[2:4])
