"""A data pipeline that is killed goes on with the very next example."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.exact

SCRIPT = Path(__file__).parents[1] / "scripts" / "prove" / "data_resume.py"


@pytest.mark.nightly
def test_two_kills_change_nothing():
    command = [sys.executable, str(SCRIPT), "--kills", "2", "--steps", "24"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 kills; 24 steps" in run.stdout and "equal to the byte" in run.stdout
