"""Each key and word of other programs' data is read, refused or passed over as the docs say."""

import re
from pathlib import Path

import pytest

from vlm_jax.data.records.record import canonical
from vlm_jax.errors import UserError

ROOT = Path(__file__).parents[1]
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}
TALK = {"messages": [ASKED, ANSWERED]}
SHARED = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}
TOOL = {"from": "function_call", "value": "f()"}
WRONG = {"from": "gpt", "value": "s"}


def talk(asked="q", answered="r", **keys):
    turns = [{**ASKED, "content": asked}, {**ANSWERED, "content": answered}]
    return {"messages": turns, **keys}


# what docs/DATA.md calls it -> a record that has it, and what comes of it: "read", "ignored", or
# what the refusal says. What is read changes the record that is trained on.
ROWS = {
    # LLaVA
    "conversations": (SHARED, "read"),
    "image": ({**SHARED, "image": "a"}, "read"),
    "<image>": (talk("a <image> b", image="a"), "read"),
    "<im_start>": (talk("<im_start>q", image="a"), "is not a placeholder here"),
    "model": ({**SHARED, "model": "x"}, "ignored"),
    # 2U1
    "video": ({**SHARED, "video": "a.mp4"}, "read"),
    "<video>": (talk("a <video> b", video="a.mp4"), "read"),
    "chosen": ({"prompt": "q", "chosen": "r", "rejected": "s"}, "has the keys"),
    # LLaMA-Factory
    "instruction": ({"instruction": "q", "input": "i", "output": "r"}, "read"),
    "history": ({"instruction": "q", "output": "r", "history": [["a", "b"]]}, "read"),
    "system": ({**SHARED, "system": "s"}, "read"),
    "videos": ({**SHARED, "videos": ["a.mp4"]}, "read"),
    "audios": ({**SHARED, "audios": ["a.wav"]}, "has 'audios', which is not read"),
    "tools": ({**SHARED, "tools": '[{"name": "f"}]'}, "has 'tools', which is not read"),
    "function_call": ({"conversations": [*SHARED["conversations"], TOOL]}, "has the role"),
    "rejected": ({**SHARED, "chosen": WRONG, "rejected": WRONG}, "has 'chosen', which is not"),
    "kto_tag": ({**SHARED, "kto_tag": False}, "its answer is not wanted"),
    "text": ({"text": "a document"}, "has the keys"),
    # ms-swift
    "messages": (TALK, "read"),
    "images": ({**TALK, "images": ["a", "b"]}, "read"),
    "loss": ({"messages": [ASKED, {**ANSWERED, "loss": False}]}, "read"),
    "loss_scale": ({"messages": [ASKED, {**ANSWERED, "loss_scale": 2.0}]}, "read"),
    "query": ({"query": "q", "response": "r", "history": [["a", "b"]]}, "read"),
    "conversation": ({"conversation": [{"human": "q", "assistant": "r"}]}, "has the keys"),
    "problem": ({"problem": "q", "solution": "r"}, "has the keys"),
    "objects": (talk("<ref-object>", objects={"ref": ["a"], "bbox": []}), "read"),
    "<bbox>": (talk("q", "<bbox>", objects={"ref": [], "bbox": []}), "0 of what '<bbox>'"),
    "<audio>": (talk("<audio>", audios=["a.wav"]), "has 'audios', which is not read"),
    "<img>": (talk("<img>a.png</img>q"), "files within a text are not read"),
    "rejected_response": ({**TALK, "rejected_response": "s"}, "has 'rejected_response'"),
    "label": ({**TALK, "label": False}, "its answer is not wanted"),
    "chat_template_kwargs": ({**TALK, "chat_template_kwargs": {"fps": 1}}, "in the config"),
    "channel": ({**TALK, "channel": "general", "margin": 0.1, "teacher_prompt": "p"}, "ignored"),
    "tool_call": ({"messages": [ASKED, {"role": "tool_call", "content": "{}"}]}, "has the role"),
    "tool_calls": ({"messages": [ASKED, {**ANSWERED, "tool_calls": [1]}]}, "has 'tool_calls'"),
    "tool_use": (talk(answered=[{"type": "tool_use", "name": "f"}]), "has the content part"),
    "source": (talk([{"type": "image", "source": {"type": "base64", "data": "aa"}}]), "read"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_key_is_read_refused_or_ignored(name):
    record, outcome = ROWS[name]
    if outcome not in ("read", "ignored"):
        with pytest.raises(UserError, match=outcome):
            canonical(record)
        return
    made = canonical(record)
    without = {key: value for key, value in record.items() if key not in (name, "margin")}
    if outcome == "ignored":
        assert canonical({key: without[key] for key in without if key != "teacher_prompt"}) == made
    elif name in record:
        try:
            assert canonical(without) != made
        except UserError:  # nothing is left that could be read
            pass
    else:  # a word is gone from the text, and so is what only a turn has
        assert name not in str(made["messages"])


def test_the_docs_say_so():
    page = (ROOT / "docs/DATA.md").read_text()
    table = page[page.index("## Other programs' data") :].split("\n## ")[0]
    said: dict[str, set[str]] = {}
    for row in re.findall(r"^\| `.*", table, re.MULTILINE):
        cells = row.strip("|").split("|")
        for name in re.findall(r"`([^`]+)`", cells[0]):
            said.setdefault(name, set()).add(cells[2].split()[0].strip(":;,."))
    assert said.keys() >= ROWS.keys(), ROWS.keys() - said.keys()
    for name, (_, outcome) in ROWS.items():
        kind = outcome if outcome in ("read", "ignored") else "refused"
        assert kind in said[name] or name in ("<bbox>", "<audio>"), name
