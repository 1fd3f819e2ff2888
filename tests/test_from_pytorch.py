"""docs/FROM_PYTORCH.md and the errors tell of every key that transformers and peft have.

`python tests/test_from_pytorch.py` writes the page's tables anew.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from vlm_jax import UserError, config
from vlm_jax.from_pytorch import NOT_NEEDED, REFUSED, RENAMED, SAME, TABLES

PAGE = Path(__file__).parents[1] / "docs" / "FROM_PYTORCH.md"
OURS = config.flatten_config(config.load(None))
HEAD = ["| key | here | |", "|---|---|---|"]


def fields(owner: str) -> dict:
    """Return {key: default} of a class of transformers or peft."""
    if owner == "BitsAndBytesConfig":
        parameters = list(inspect.signature(BitsAndBytesConfig.__init__).parameters.values())
        return {p.name: p.default for p in parameters[1:] if p.kind is not p.VAR_KEYWORD}
    cls = {"LoraConfig": LoraConfig, "TrainingArguments": TrainingArguments}[owner]
    return {field.name: field.default for field in dataclasses.fields(cls)}


def plain(value):
    value = getattr(value, "value", value)
    if value is dataclasses.MISSING:  # of a field that is made by a function: an empty one
        return None
    return tuple(value) if isinstance(value, list | tuple) else value


def rows(owner: str, section: str, table) -> list[str]:
    """Return the table of a class: what each key is, and where defaults differ."""
    theirs, made = fields(owner), list(HEAD)
    for key, (kind, words) in table.items():
        notes = [words] if words else []
        if kind == SAME:
            ours, other = plain(OURS[f"{section}.{key}"]), plain(theirs[key])
            if str(ours).lower() != str(other).lower() and (ours or other):
                notes.append(f"default `{ours}`, there `{other}`")
        made.append(f"| `{key}` | {kind} | {'; '.join(notes).replace('|', ' or ')} |")
    return made


def sections() -> dict[str, list[str]]:
    """Return the lines of each section of the page that holds one of the tables."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in PAGE.read_text().splitlines():
        name = line.removeprefix("## ") if line.startswith("## ") else name
        if line.startswith("|"):
            found.setdefault(name, []).append(line)
    return found


@pytest.mark.parametrize(("places", "owner", "table"), TABLES, ids=[t[1] for t in TABLES])
def test_the_page_tells_of_every_key(places, owner, table):
    assert list(table) == list(fields(owner))
    assert sections()[owner] == rows(owner, places[0], table)


@pytest.mark.parametrize(("places", "owner", "table"), TABLES, ids=[t[1] for t in TABLES])
def test_what_the_tables_say_holds(places, owner, table):
    for key, (kind, words) in table.items():
        ours = f"{places[0]}.{key}"
        if kind == SAME:
            assert ours in OURS, key
            continue
        assert words and kind in (RENAMED, NOT_NEEDED, REFUSED), key
        if kind == RENAMED:
            target = re.match(r"\w+\.\w+", words)
            assert target is not None and target[0] in OURS, key
            assert config.ALIASES.get(ours, target[0]) == target[0]
        if ours in config.ALIASES:
            continue
        if ours in OURS:  # fp16 is a key, so that a recipe may say false
            with pytest.raises(UserError, match="not supported"):
                config.load(None, {ours: True})
            continue
        for place in places:
            with pytest.raises(UserError, match=re.escape(words)):
                config.load(None, {f"{place}.{key}": 1})


def test_options_of_a_foreign_key_are_told_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {fsdp_config: {fsdp_version: 2}}")
    with pytest.raises(UserError, match=r"recipe.yaml'.*fsdp_config.*mesh.fsdp"):
        config.load(path)
    with pytest.raises(UserError, match="Unknown config key 'training.max_step'.*max_steps"):
        config.load(None, {"training.max_step": 1})


if __name__ == "__main__":
    lines = PAGE.read_text().splitlines()
    for places, owner, table in TABLES:
        at = lines.index(f"## {owner}")
        start = next(i for i in range(at, len(lines)) if lines[i].startswith("|"))
        end = next((i for i in range(start, len(lines)) if lines[i][:1] != "|"), len(lines))
        lines[start:end] = rows(owner, places[0], table)
    PAGE.write_text("\n".join(lines) + "\n")
