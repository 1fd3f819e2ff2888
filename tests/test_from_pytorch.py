"""docs/FROM_PYTORCH.md and the errors tell of every key that transformers, peft and TRL have.

`python tests/test_from_pytorch.py` writes the page's tables anew.
"""

import ast
import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from vlm_jax import UserError, config
from vlm_jax.config import choices
from vlm_jax.config.from_pytorch import LLAMA_FACTORY, NOT_NEEDED, REFUSED, RENAMED, SAME, TABLES

PAGE = Path(__file__).parents[1] / "docs" / "FROM_PYTORCH.md"
OURS = config.flatten_config(config.load(None))
HEAD = ["| key | here | |", "|---|---|---|"]


def sft_config() -> dict:
    """Return {key: None} of what SFTConfig adds; TRL's file is read, never imported."""
    package = importlib.util.find_spec("trl").submodule_search_locations[0]
    tree = ast.parse(Path(package, "trainer", "sft_config.py").read_text())
    body = next(node.body for node in tree.body if getattr(node, "name", "") == "SFTConfig")
    own = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    return {name: None for name in own if name not in fields("TrainingArguments")}


def fields(owner: str) -> dict:
    """Return {key: default} of a class of transformers, peft or TRL; of LLaMA-Factory the table's.

    That is a program to clone, no package: there is nothing to hold its table against.
    """
    if owner == "LLaMA-Factory":
        return dict.fromkeys(LLAMA_FACTORY)
    if owner == "SFTConfig":
        return sft_config()
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
            assert choices.ALIASES.get(ours, target[0]) == target[0]
        if ours in choices.ALIASES:
            continue
        if ours in OURS:  # fp16 is a key, so that a recipe may say false
            with pytest.raises(UserError, match="not supported"):
                config.load(None, {ours: True})
            continue
        for place in places:
            given = f"{place}.{key}"
            if given in OURS or given in choices.ALIASES:
                continue
            # One that two programs have is told in the words of the one read first there.
            first = next(t[key] for at, _, t in TABLES if place in at and key in t)
            with pytest.raises(UserError, match=re.escape(first.words)):
                config.load(None, {given: 1})


def test_options_of_a_foreign_key_are_told_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {fsdp_config: {fsdp_version: 2}}")
    with pytest.raises(UserError, match=r"recipe.yaml'.*fsdp_config.*mesh.fsdp"):
        config.load(path)
    with pytest.raises(UserError, match="Unknown config key 'training.max_step'.*max_steps"):
        config.load(None, {"training.max_step": 1})


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("data.dataset", "'dataset' of LLaMA-Factory is another key here: data.train_file"),
        ("data.template", "'template' of LLaMA-Factory is not needed: the checkpoint's own chat"),
        ("model.freeze_vision_tower", "another key here: model.vision_encoder_lr_scale"),
        ("training.max_length", "'max_length' of SFTConfig is another key here: data.max_seq_len"),
        ("cutoff_len", "another key here: data.max_seq_length"),
        ("training.finetuning_type", "another key here: lora.enabled, or the one word method"),
        ("lora.lora_target", "another key here: lora.target_modules"),
        ("training.lora_rank", "another key here: lora.r"),
        ("data.learning_rate", r"did you mean 'training.learning_rate'\?"),
        ("learning_rate", r"did you mean 'training.learning_rate'\?"),
        ("data.dropout", r"did you mean 'adapter.dropout' or 'lora.dropout'\?"),
        ("model.freeze_vision", "Unknown config key 'model.freeze_vision' in the overrides[.]"),
        ("model.freeze_vit", "Unknown config key 'model.freeze_vit' in the overrides[.]"),
    ],
)
def test_a_guess_is_near_or_there_is_none(key, said):
    with pytest.raises(UserError, match=said):
        config.load(None, {key: 1})


def test_a_foreign_file_is_told_of_all_its_keys_at_once(tmp_path):
    """The flat form of LLaMA-Factory's own example; what is ours in a section is told too."""
    path = tmp_path / "sft.yaml"
    path.write_text(
        "model_name_or_path: x\nfinetuning_type: lora\nlora_rank: 8\ntemplate: qwen2_vl\n"
        "cutoff_len: 2048\nnum_train_epochs: 3.0\n"
    )
    with pytest.raises(UserError) as told:
        config.load(path)
    said = str(told.value)
    for word in ("model.name_or_path", "method", "lora.r", "template", "data.max_seq_length",
                 "'training.num_train_epochs'"):  # fmt: skip
        assert word in said
    assert said.count(str(path)) == 1
    path.write_text("".join(f"key_{i}: 1\n" for i in range(13)))
    with pytest.raises(UserError, match="'key_9'. 3 more keys are not known"):
        config.load(path)


if __name__ == "__main__":
    lines = PAGE.read_text().splitlines()
    for places, owner, table in TABLES:
        at = lines.index(f"## {owner}")
        start = next(i for i in range(at, len(lines)) if lines[i].startswith("|"))
        end = next((i for i in range(start, len(lines)) if lines[i][:1] != "|"), len(lines))
        lines[start:end] = rows(owner, places[0], table)
    PAGE.write_text("\n".join(lines) + "\n")
