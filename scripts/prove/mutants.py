"""Edits the package wrongly, one place at a time, and shows which test of the fast tier fails.

    python scripts/prove/mutants.py --named                 # the edits of mutants_named.py
    python scripts/prove/mutants.py --map                   # which test runs which line, once
    python scripts/prove/mutants.py --drawn 60 --seed 0     # cosmic-ray's, see mutants_drawn.py

A copy of the repository is edited, never the repository. An edit counts as noticed where a test
fails or runs out of time, and not where the package cannot be imported: another one is drawn then.
Tests are those that an edit's row names, or those that run its line (at most --budget seconds of
them); --whole asks the whole fast tier about what these do not notice. Tests that fail without any
edit are left out. What is done is not done again: results, map, copies and compiled programs
stay in --work. The exit status is 1 where a named edit, or more than 15 % of the drawn ones, is not
noticed. With an argument, only named edits, and only test files of the map, whose name or place
holds it.
"""

import argparse
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mutants_drawn import Map, draw
from mutants_named import NAMED
from mutants_plugin import NO_IMPORT

ROOT = Path(__file__).resolve().parents[2]
LEAST = 0.85  # of the drawn edits
UNOPTIMIZED = "--xla_backend_optimization_level=0"
# Not the lines of tests/costs.py: a test that is slower than it may be has not failed.
FAILED = re.compile(
    r"^(?:FAILED|ERROR) (?!.* of processor time, more than )(tests/.*?)(?: - (.*))?$", re.MULTILINE
)
TIMED_OUT = (124, 137)  # coreutils' timeout, by SIGTERM and by SIGKILL


class Edit(NamedTuple):
    """file: below the root. text: of the whole file, edited. tests: pytest's arguments."""

    name: str
    file: str
    line: int
    text: str
    tests: Sequence[str]

    @property
    def key(self) -> str:
        return hashlib.blake2b(f"{self.file}\n{self.text}".encode(), digest_size=8).hexdigest()

    def difference(self) -> list[str]:
        old = (ROOT / self.file).read_text(encoding="utf-8")
        lines = difflib.unified_diff(old.splitlines(), self.text.splitlines(), n=0, lineterm="")
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def digest(names: Iterable[str]) -> str:
    """Return a hash of files' names and contents."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(names):
        found.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return found.hexdigest()


class Workplace:
    """Copies of the repository, in which one process each runs tests."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = (self.work / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"Another run works in '{self.work}': give another --work.") from None
        self.trees: queue.Queue[Path] = queue.Queue()
        self.stamps = itertools.count(2_000_000_000)  # a time of change that no other edit has
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        found = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
        files = [name for name in found.decode().split("\0") if name and (ROOT / name).is_file()]
        for number in range(args.jobs):
            tree = self.work / f"tree{number}"
            shutil.rmtree(tree, ignore_errors=True)
            for name in files:
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
            self.trees.put(tree)
        self.tests, package = (
            digest(name for name in files if name.startswith(folder))
            for folder in ("tests/", "vlm_jax/")
        )
        self.map = self.work / f"map-{package}"  # whose numbers of lines are those of this package

    def run(
        self, tests: Sequence[str], edit: Edit | None = None, **variables: str
    ) -> tuple[int, str, float]:
        """Return (pytest's exit status, its output, seconds) of tests in a copy with an edit.

        As scripts/test.sh does it: tests that compare bits run in a call of pytest of their own.
        Where those before them fail they do not run any more.
        """
        calls: dict[bool, list[str]] = {}
        for test in dict.fromkeys(tests):
            calls.setdefault("mark.exact" in (ROOT / test.split("::")[0]).read_text(), []).append(
                test
            )
        tree = self.trees.get()
        environment = {
            **os.environ,
            "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'scripts/prove'}",
            "JAX_COMPILATION_CACHE_DIR": str(self.work / "compiled"),
            "COLUMNS": "300",  # of pytest's words on why a test failed
            **variables,
        }
        if edit is not None:
            module = edit.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            environment["MUTANTS_MODULE"] = module
        command = [
            "timeout", "-k", "10", str(self.args.limit), sys.executable, "-m", "pytest",
            "-q", "--tb=short", "-m", "not nightly", "-p", "mutants_plugin",
            "-p", "no:cacheprovider", "-p", "no:xdist",
        ]  # fmt: skip
        if edit is not None:
            command.append("-x")
        start, status, output = time.monotonic(), 0, ""
        try:
            if edit is not None:
                self.write(tree / edit.file, edit.text)
            for exact, some in calls.items():
                environment["XLA_FLAGS"] = "" if exact else UNOPTIMIZED
                done = subprocess.run(
                    [*command, *some], cwd=tree, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
                slow = done.returncode == 1 and not FAILED.search(done.stdout)
                status, output = status or (not slow and done.returncode), output + done.stdout
                if status and edit is not None:
                    break
        finally:
            if edit is not None:
                self.write(tree / edit.file, (ROOT / edit.file).read_text(encoding="utf-8"))
            self.trees.put(tree)
        return int(status), output, round(time.monotonic() - start, 1)

    def write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        stamp = next(self.stamps)  # by which Python knows that compiled code is too old
        os.utime(path, (stamp, stamp))

    def notice(self, edit: Edit, tests: Sequence[str]) -> dict[str, Any]:
        """Return {"by": the test that failed or None, "why", "seconds", "imports"}."""
        if not tests:
            return {"by": None, "why": "no test runs the line", "seconds": 0.0, "imports": True}
        status, output, seconds = self.run(tests, edit)
        found = FAILED.search(output)
        row: dict[str, Any] = {"by": None, "why": "", "seconds": seconds, "imports": True}
        if status == NO_IMPORT:
            row |= {"imports": False, "why": output.strip().splitlines()[-1]}
        elif status in TIMED_OUT:
            row |= {"by": "the time limit", "why": f"{self.args.limit} s"}
        elif status in (1, 2) and found:
            row |= {"by": found[1], "why": (found[2] or "")[:200]}
        elif status != 0:
            raise SystemExit(f"pytest ended with status {status} on '{edit.name}':\n{output}")
        return row


def named() -> list[Edit]:
    """Return the edits by hand. Stops where the table no longer fits the package."""
    edits = []
    for row in NAMED:
        file = f"vlm_jax/{row.file}"
        source = (ROOT / file).read_text(encoding="utf-8")
        if source.count(row.old) != 1:
            raise SystemExit(
                f"mutants_named.py is out of date: '{file}' holds the text of the edit "
                f"'{row.name}' {source.count(row.old)} times, not once:\n{row.old}"
            )
        line = source[: source.index(row.old)].count("\n") + 1
        edits.append(Edit(row.name, file, line, source.replace(row.old, row.new), row.tests))
    return edits


def drawn(seed: int, folder: Path, budget: float) -> Iterable[Edit]:
    """Yield drawn edits without end, with the tests that run their lines."""
    known = Map(folder)
    if not known.seconds:
        raise SystemExit("It is not known which tests run which lines: run with --map first.")
    for one in draw(ROOT, seed):
        edit = Edit(one.operator, one.file, one.line, one.text, ())
        name = " -> ".join(line[1:].strip() for line in edit.difference())
        yield edit._replace(name=name, tests=known.tests(one.file, one.begin, one.line, budget))


def test_files() -> list[str]:
    """Return all test files but that of this script, in whose table any edit would be noticed."""
    found = (str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*.py")))
    return [name for name in found if name != "tests/test_mutants.py"]


def record(place: Workplace, only: str, jobs: int) -> None:
    """Write which tests run which lines, a file for each test file that has none of its content."""
    place.map.mkdir(exist_ok=True)
    wanted = {}
    for name in test_files():
        wanted[f"{Path(name).stem}-{digest([name])}.json"] = name
    for old in place.map.glob("*.json"):
        if old.name not in wanted:
            old.unlink()

    def one(item: tuple[str, str]) -> None:
        name, tests = item
        status, output, seconds = place.run([tests], MUTANTS_MAP=str(place.map / f"{name}.part"))
        print(f"{seconds:6.0f} s  {tests}: {output.strip().splitlines()[-1]}", flush=True)
        if status in (0, 5):  # 5: the fast tier has no test of this file
            (place.map / f"{name}.part").rename(place.map / name)
        else:
            print(f"{output[-4000:]}\nFails without any edit, and is left out: {tests}", flush=True)

    missing = [
        (name, tests)
        for name, tests in wanted.items()
        if only in tests and not (place.map / name).exists()
    ]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, missing))


class Results:
    """What is known of edits: a line of JSON each, so that an interrupted run goes on."""

    def __init__(self, place: Workplace):
        self.place, self.file, self.lock = place, place.work / "results.jsonl", threading.Lock()
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows = {row["key"]: row for row in map(json.loads, lines)}

    def known(self, edit: Edit) -> bool:
        """Return whether an edit needs no run. One that lived is tried again on other tests."""
        row = self.rows.get(edit.key)
        if row is None or row["by"] or not row["imports"]:
            return row is not None
        return row["tests"] == self.asked(edit)

    def asked(self, edit: Edit) -> str:
        """Return a hash of the tests that are asked about an edit, and of what all tests hold."""
        words = "\n".join([self.place.tests, *edit.tests])
        return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()

    def of(self, edit: Edit, whole: bool) -> dict[str, Any]:
        """Return the row of an edit, known or found now."""
        row, tests, known = self.rows.get(edit.key), self.asked(edit), self.known(edit)
        if not known or (whole and row["imports"] and not row["by"] and not row["whole"]):
            found = self.place.notice(edit, test_files() if whole and known else edit.tests)
            if whole and not known and not found["by"] and found["imports"]:
                found = self.place.notice(edit, test_files())
            row = {"key": edit.key, "name": edit.name, "tests": tests, "whole": whole, **found}
            with self.lock, self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        assert row is not None
        print(f"{row['seconds']:6.1f} s  {edit.file}:{edit.line}  {edit.name}", flush=True)
        said = "NOT NOTICED" if row["imports"] else "DOES NOT IMPORT"
        print(f"          {row['by'] or said}  {row['why']}", flush=True)
        return {**row, "edit": edit}


def table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as Markdown, those that nothing noticed with their edits at the end."""
    print(f"\n{title}\n\n| edit | place | noticed by | s |\n|---|---|---|---|")
    for row in rows:
        edit, by = row["edit"], row["by"]
        words = edit.name.replace("|", "\\|")
        test = f"`{by.removeprefix('tests/')}`" if by else "**nothing**"
        print(f"| {words} | {edit.file}:{edit.line} | {test} | {row['seconds']:.0f} |")
    for row in rows:
        if not row["by"]:
            edit = row["edit"]
            print(f"\n{edit.file}:{edit.line}: {row['why']}", *edit.difference(), sep="\n    ")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="?", default="", help="a part of an edit's name or place")
    parser.add_argument("--named", action="store_true")
    parser.add_argument("--map", action="store_true")
    parser.add_argument("--drawn", type=int, default=0, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, choices=(1, 2))
    parser.add_argument("--budget", type=float, default=240, help="seconds of tests for an edit")
    parser.add_argument("--limit", type=int, default=1800, help="seconds that pytest may take")
    default = Path(tempfile.gettempdir(), "vlm_jax-mutants")
    parser.add_argument("--work", type=Path, default=default)
    args = parser.parse_args()
    hand = [edit for edit in named() if args.only in f"{edit.name} {edit.file}"]
    place = Workplace(args)
    results = Results(place)
    start, bad = time.monotonic(), False
    if args.map:
        record(place, args.only, args.jobs)

    def of_all(edits: Iterable[Edit]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(args.jobs) as pool:
            return list(pool.map(lambda edit: results.of(edit, args.whole), edits))

    if args.named:
        failing = fail_anyway(place, [t for e in hand if not results.known(e) for t in e.tests])
        rows = of_all(
            edit._replace(tests=[t for t in edit.tests if not failing(t)]) for edit in hand
        )
        noticed = sum(bool(row["by"]) for row in rows)
        bad |= noticed < len(rows)
        table(f"{noticed} of {len(rows)} edits by hand are noticed.", rows)
    if args.drawn:
        rows, edits = [], iter(drawn(args.seed, place.map, args.budget))
        while missing := args.drawn - len(rows):
            more = of_all(itertools.islice(edits, missing))
            rows += [row for row in more if row["imports"]]
        noticed = sum(bool(row["by"]) for row in rows)
        bad |= noticed < LEAST * len(rows)
        table(f"{noticed} of {len(rows)} drawn edits (seed {args.seed}) are noticed.", rows)
    print(f"\n{(time.monotonic() - start) / 60:.0f} minutes.")
    return int(bad)


def fail_anyway(place: Workplace, tests: Sequence[str]) -> Callable[[str], bool]:
    """Return which tests fail without any edit, so that their failing would mean nothing."""
    status, output, _ = place.run(tests) if tests else (0, "", 0)
    failed = [found[1] for found in FAILED.finditer(output)]
    if status != 0 and not failed:
        raise SystemExit(f"The tests that edits name cannot run:\n\n{output[-8000:]}")
    for name in failed:
        print(f"Fails without any edit, and is left out: {name}")
    return lambda test: any(name.startswith(test) for name in failed)


if __name__ == "__main__":
    sys.exit(main())
