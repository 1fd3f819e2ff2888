"""Write the diagram of docs/DESIGN.md: which rooms of vlm_jax/ import which, drawn by GitHub.

    python scripts/import_diagram.py [--check]

A room is a file or folder at the top level. An arrow that follows from others is left out (the
transitive reduction). --check writes nothing, and exits with 1 where the page is out of date.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from test_structure import ARROWS, FREE, LEVELS, PACKAGE

PAGE = PACKAGE.parent / "docs" / "DESIGN.md"
START, END = "<!-- made by scripts/import_diagram.py -->\n", "<!-- end of it -->\n"


def rooms(arrows: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the arrows between rooms, of arrows between modules."""
    between = {(a.split(".")[0], b.split(".")[0]) for a, b in arrows if not {a, b} & FREE}
    return {(a, b) for a, b in between if a != b}


def reduced(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the transitive reduction: the fewest arrows that reach what `arrows` reach."""
    after: dict[str, set[str]] = {}
    for a, b in arrows:
        after.setdefault(a, set()).add(b)

    def reached(room: str) -> set[str]:
        return {far for b in after.get(room, ()) for far in {b} | reached(b)}

    return {(a, b) for a, b in arrows if not any(b in reached(c) for c in after[a] - {b})}


def diagram() -> str:
    lines = ["```mermaid", "graph TD"]
    order = {name: n for n, names in enumerate(LEVELS) for name in names}
    for name, n in sorted(order.items(), key=lambda item: (-item[1], item[0])):
        label = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        lines.append(f'  {name}["{n} {label}"]')
    arrows = sorted(reduced(rooms(ARROWS)), key=lambda arrow: (-order[arrow[0]], arrow))
    lines += [f"  {a} --> {b}" for a, b in arrows]
    return "\n".join([*lines, "```\n"])


def page() -> str:
    """Return the page with the diagram of today's imports."""
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{diagram()}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    current = PAGE.read_text() == page()
    if parser.parse_args().check:
        if not current:
            print(f"{PAGE} is out of date: run python scripts/import_diagram.py", file=sys.stderr)
        return 0 if current else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
