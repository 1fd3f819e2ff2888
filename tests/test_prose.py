"""The package's strings, messages and docstrings alike, against the glossary of CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def banned() -> dict[str, str]:
    """Return {phrase: what to say instead} of the glossary's table."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = re.search(r"\| says \| should say \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    rows = [row.strip("| ").split(" | ") for row in table[1].splitlines()]
    return {phrase.lower(): instead for said, instead in rows for phrase in said.split(", ")}


def found(source: str, phrases: dict[str, str]) -> list[tuple[int, str]]:
    """Return (line, phrase) of each phrase in a file's string constants, parts of f-strings too."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, phrases))})\b", re.IGNORECASE)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    texts = [(n.lineno, " ".join(n.value.split())) for n in nodes if isinstance(n.value, str)]
    return [(line, hit) for line, text in texts for hit in pattern.findall(text)]


def test_strings_use_the_words_of_the_glossary():
    phrases = banned()
    assert len(phrases) > 12
    assert found('f"{x} is made a" " new, for want\\n of memory"', phrases) == [(1, "for want of")]
    hits = [
        f"{path.relative_to(ROOT)}:{line}: '{phrase}': say '{phrases[phrase.lower()]}'"
        for path in sorted((ROOT / "vlm_jax").rglob("*.py"))
        for line, phrase in found(path.read_text(), phrases)
    ]
    assert not hits, "\n".join(hits)
