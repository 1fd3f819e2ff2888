"""A test that takes longer than it may fails the run, its children's time included."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from costs import MAY_BE_SLOW

HERE = Path(__file__).parent
CONFTEST = "from costs import Costs\ndef pytest_configure(config):\n"
CONFTEST += "    config.pluginmanager.register(Costs())\n"
BURN = "import time\nwhile time.process_time() < 0.6:\n    pass\n"
TESTS = f"""
import subprocess, sys, pytest

@pytest.fixture(scope="module")
def shared():
    subprocess.run([sys.executable, "-c", {BURN!r}], check=True)

def test_child():
    subprocess.run([sys.executable, "-c", {BURN!r}], check=True)

@pytest.mark.nightly
def test_long():
    subprocess.run([sys.executable, "-c", {BURN!r}], check=True)

def test_short():
    pass

def test_user_of_a_fixture(shared):
    pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_takes_too_long_fails_the_run(tmp_path, workers):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = nightly\n")
    (tmp_path / "test_it.py").write_text(TESTS)

    def run(limit):
        env = {**os.environ, "VLM_JAX_TEST_LIMIT": limit, "PYTHONPATH": str(HERE)}
        command = [sys.executable, "-m", "pytest", "-n", workers, "test_it.py"]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        failed = {line.split(": ")[0] for line in done.stdout.splitlines() if "FAILED" in line}
        return done.returncode, failed

    assert run("20") == (0, set())
    # So low that a machine six times slower than the one that the limit is of exceeds it too.
    slow = {"FAILED test_it.py::test_child", "FAILED fixture shared of test_it.py"}
    assert run("0.1") == (1, slow)


def test_what_may_be_slow_is_there():
    for name in MAY_BE_SLOW:
        file, _, test = name.partition("::")
        if fixture := re.fullmatch(r"fixture (\w+) of tests", name):
            file, test = "tests/conftest.py", fixture[1]
        assert f"def {test.partition('[')[0]}(" in (HERE.parent / file).read_text(), name
