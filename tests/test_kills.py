"""A run that is killed and told to stop at random moments ends as one that never was."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.exact

SCRIPT = Path(__file__).parents[1] / "scripts" / "prove" / "kills.py"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What the script printed of two kills, two stops and a full disk."""
    log = tmp_path_factory.mktemp("kills") / "log"
    command = [sys.executable, str(SCRIPT), "--kills=2", "--terms=2", "--steps=40", "--seed=1"]
    with open(log, "w") as file:  # a pipe would wait for whatever outlived its parent
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, log.read_text()
    return log.read_text()


@pytest.mark.nightly
def test_two_kills_and_two_stops_lose_nothing(text):
    assert text.count("SIGKILL: run") == text.count("SIGTERM: run") == 2
    assert "metrics and adapter are equal to the byte" in text


@pytest.mark.nightly
def test_a_full_disk_loses_nothing(text):
    if "the full disk was not tried" in text:
        pytest.skip("no small file system can be mounted here, so no disk was filled")
    assert "Full disk: exit 2" in text and "ends as the straight run" in text
