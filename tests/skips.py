"""Where CI is set, a skip that no row below excuses fails the run: what CI cannot try is known."""

import os
import re

# {regex over the whole reason of a skip: why CI may do without}
EXCUSED = {
    r"chrom.* is not installed \(Debian: .*": "a browser comes with the system, not with pip",
    r"the CUDA plug-in is not installed .*": "two gigabytes, for a compiler of GPU programs",
    r"no small file system can be mounted here.*": "a container without the right to mount",
}


class Skips:
    """A pytest plugin; see the module's docstring. With xdist it is the controller's reports."""

    def __init__(self) -> None:
        self.unexcused: list[str] = []

    def note(self, report) -> None:
        # A test that is expected to fail is reported as skipped too.
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not any(re.fullmatch(row, reason, re.DOTALL) for row in EXCUSED):
                self.unexcused.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report):
        self.note(report)

    def pytest_collectreport(self, report):  # of a file that skips as a whole
        self.note(report)

    def pytest_sessionfinish(self, session, exitstatus):
        if self.failing and exitstatus == 0:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        if self.failing:
            terminalreporter.section("skipped in CI, and not excused in tests/skips.py", red=True)
            for line in self.unexcused:
                terminalreporter.line(line)

    @property
    def failing(self) -> bool:
        return bool(self.unexcused) and os.environ.get("CI", "") not in ("", "0", "false")
