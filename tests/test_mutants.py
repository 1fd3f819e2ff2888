"""What scripts/prove/mutants.py edits is there, and no edit is of a message's words."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts/prove")])


def test_edits_by_hand_fit_the_package_and_their_tests_are_there():
    from mutants_named import NAMED

    assert len(NAMED) >= 30 and len({row.name for row in NAMED}) == len(NAMED)
    for row in NAMED:
        source = (ROOT / "vlm_jax" / row.file).read_text()
        assert source.count(row.old) == 1, row.name
        compile(source.replace(row.old, row.new), row.file, "exec")
        for test in row.tests:
            file, _, name = test.partition("::")
            assert f"def {name.split('[')[0]}" in (ROOT / file).read_text(), test


SOURCE = """
def f(x: int | None, *, y: float = 2.0) -> list[int]:
    if x < 3:
        raise ValueError("é" + "f", f"{x + 1} is less", f(5))
    name: int | str = f"{x + 6}"
    print(f"{name * 7}", x - 8)
"""


def test_messages_and_annotations_are_left_out():
    from mutants_drawn import messages_and_annotations

    lines = SOURCE.splitlines()
    texts = [
        lines[line - 1][start:end]
        for (line, start), (last, end) in messages_and_annotations(SOURCE)
        if line == last
    ]
    messages = ['f"{x + 1} is less"', 'f"{name * 7}"']
    assert sorted(texts) == sorted(["int | None", "float", "list[int]", "int | str", *messages])


def test_likely_tests_come_first_and_together(tmp_path):
    from mutants_drawn import Map

    def lines(**files):
        return {f"vlm_jax/{name}.py": numbers for name, numbers in files.items()}

    rows = {
        "seconds": {"tests/a.py::one": 9, "tests/a.py::two": 1, "tests/b.py::three": 2},
        "fixtures": {"tests/a.py::one": ["fixture x"], "tests/a.py::two": ["fixture x"],
                     "tests/b.py::three": []},
        "parents": ["tests/b.py::three"],
        "lines": {
            "": lines(x=[1, 2]),
            "fixture x": lines(x=[5]),
            "tests/a.py::two": lines(x=[6], y=[1, 2]),
            "tests/b.py::three": lines(x=[5, 6]),
        },
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    known = Map(tmp_path)
    two, three, one = "tests/a.py::two", "tests/b.py::three", "tests/a.py::one"
    assert known.tests("vlm_jax/x.py", 5, 5, 99) == [two, one, three]
    assert known.tests("vlm_jax/x.py", 5, 5, 3) == [two, three]
    assert known.tests("vlm_jax/x.py", 6, 7, 99) == [three, two]
    assert known.tests("vlm_jax/x.py", 1, 1, 99) == [two, one, three]
    assert known.tests("vlm_jax/y.py", 9, 9, 99) == [three]
    assert known.tests("vlm_jax/y.py", 9, 9, 1) == []
