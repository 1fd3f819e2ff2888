"""What each test costs: processor time of the process and its children, told at the run's end.

Wall time depends on what else the machine does; processor time hardly does. Fixtures that several
tests share are rows of their own, so that their cost does not fall on whichever test comes first.
"""

import json
import os
import resource
from pathlib import Path

import pytest

FILE = os.environ.get("VLM_JAX_TEST_COSTS", "")  # a JSON lines file of all costs


def processor_seconds() -> float:
    """Return the processor time of this process and its ended children, in seconds."""
    return sum(os.times()[:4])


class Costs:
    """A pytest plugin; see the module's docstring."""

    def __init__(self) -> None:
        self.shared = 0.0  # of the current test: in fixtures that others use too
        self.started = 0.0
        self.rows: dict[str, float] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        start, before = processor_seconds(), self.shared
        yield
        if fixturedef.scope != "function":
            spent = processor_seconds() - start
            inner = self.shared - before  # shared fixtures that this one asked for
            self.shared = before + spent
            self.note(f"{fixturedef.baseid}::fixture {fixturedef.argname}", spent - inner)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.shared, start = 0.0, processor_seconds()
        yield
        self.note(item.nodeid, processor_seconds() - start - self.shared)

    def note(self, name: str, seconds: float) -> None:
        self.rows[name] = self.rows.get(name, 0.0) + seconds
        if FILE:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            row = {"name": name, "seconds": round(seconds, 3), "peak_gb": round(peak, 3)}
            with open(Path(FILE), "a") as file:
                file.write(json.dumps(row) + "\n")
