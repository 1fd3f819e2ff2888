"""A skip that no row of tests/skips.py excuses fails a run in CI."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = "from skips import Skips\ndef pytest_configure(config):\n"
CONFTEST += "    config.pluginmanager.register(Skips())\n"
EXCUSED = "no small file system can be mounted here, so"
TESTS = {
    "excused": f"import pytest\ndef test():\n    pytest.skip('{EXCUSED}')\n",
    "xfail": "import pytest\n@pytest.mark.xfail\ndef test():\n    assert 0\n",
    "called": "import pytest\ndef test():\n    pytest.skip('no such luck')\n",
    "marked": "import pytest\n@pytest.mark.skip(reason='no such luck')\ndef test():\n    pass\n",
    "whole": "import pytest\npytest.skip('no such luck', allow_module_level=True)\n",
}


@pytest.mark.parametrize("ci", ["true", ""])
def test_a_skip_without_an_excuse_fails_in_ci(tmp_path, ci):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*names):
        for name in names:
            passing = "\ndef test_else():\n    pass\n"
            (tmp_path / f"test_{name}.py").write_text(TESTS[name] + passing)
        command = [sys.executable, "-m", "pytest", *(f"test_{name}.py" for name in names)]
        environment = {**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    assert run("excused", "xfail")[0] == 0
    code, text = run("called", "marked", "whole", "excused")
    assert code == (1 if ci else 0)
    told = [line for line in text.splitlines() if line.endswith(": no such luck")]
    assert len(told) == (3 if ci else 0), text
