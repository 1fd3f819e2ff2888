"""A conversation of many turns takes time that grows with its text, to the same tokens."""

import json
import random

import numpy as np
import pytest
from checkpoint_files import (
    CHATML,
    CHATML_MARKED,
    VICUNA,
    VICUNA_MARKED,
    image_and_text,
    llava_files,
    qwen2_vl_files,
    text,
)
from PIL import Image
from runs import write_recipe

from vlm_jax.cli import main
from vlm_jax.data import Encoder
from vlm_jax.data.overlong import drop_exchanges
from vlm_jax.data.text import answers
from vlm_jax.data.text.template import Template
from vlm_jax.errors import UserError

TURN = (
    "{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
# It counts turns: a turn behind the one before it alone would have another number.
NUMBERED = (
    "{% for m in messages %}{{ m.role }} {{ loop.index }}: "
    + TURN
    + ("{% if add_generation_prompt %}assistant {{ messages | length + 1 }}: {% endif %}")
)
# It changes its mind after four exchanges, where short conversations do not show it.
LATE = (
    "{% set n = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set n.asked = n.asked + 1 %}{% endif %}{{ 'LATE ' if n.asked > 4 }}{{ m.role }}: "
    + TURN
    + "{% if add_generation_prompt %}{{ 'LATE ' if n.asked > 4 }}assistant: {% endif %}"
)
# It ends the last turn in its own way, so an answer in the middle is no prefix.
LAST = (
    "{% for m in messages %}{{ m.role }}: {{ '!' if loop.last }}"
    + TURN
    + ("{% if add_generation_prompt %}assistant: {% endif %}")
)
TRIMMED = CHATML.replace("content['text'] }}", "content['text'] | trim }}")
OUTSIDE = CHATML_MARKED.replace(
    "{{ '<|im_end|>\n' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>\n' }}"
)
QWEN = (CHATML, CHATML_MARKED, NUMBERED, LATE, LAST, TRIMMED, OUTSIDE)
LLAVA = (VICUNA, VICUNA_MARKED)
WORDS = ("What color is the ball?", "red", "  It is blue. ", "", "A box\nand a ball", "x " * 9)


def write(directory, template):
    directory.mkdir()
    (qwen2_vl_files if template in QWEN else llava_files)(directory, template)
    return directory


def conversation(rng, exchanges):
    messages = [text("system", "Be short.")] if rng.random() < 0.3 else []
    for _ in range(exchanges):
        asked, answer = rng.choice(WORDS), text("assistant", rng.choice(WORDS))
        messages.append(image_and_text(asked) if rng.random() < 0.1 else text("user", asked))
        messages.append({**answer, "weight": rng.choice((0, 0.5, 1))})
    return messages + ([text("user", "And?")] if rng.random() < 0.3 else [])


def pictures(messages):
    return sum(part["type"] == "image" for m in messages for part in m["content"])


@pytest.mark.parametrize("template", [*QWEN, *LLAVA])
def test_answers_are_those_of_whole_prefixes(tmp_path, monkeypatch, template):
    chat = Encoder(write(tmp_path / "base", template)).chat
    rng = random.Random(0)
    talks = [conversation(rng, n) for n in (1, 1, 2, 3, 5, 8, 13)]

    def results():
        found = []
        for talk in talks:
            for many in (chat.encode, chat.prompt):
                try:
                    found.append(np.concatenate(many(talk, [2] * pictures(talk)), axis=None))
                except UserError as error:
                    found.append(str(error))
        return found

    ours = results()
    monkeypatch.setattr(answers, "_short_edges", lambda *_: None)  # every prefix is rendered
    for one, other in zip(ours, results(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, OUTSIDE, VICUNA, VICUNA_MARKED])
def test_the_work_grows_with_the_turns(tmp_path, monkeypatch, template):
    """Counted in messages that are rendered; every prefix would be n^2, at each exchange n^3."""
    encoder = Encoder(write(tmp_path / "base", template), max_seq_length=200)
    render, rendered = Template.render, []

    def counting(self, messages, *args, **kwargs):
        rendered.append(len(messages))
        return render(self, messages, *args, **kwargs)

    monkeypatch.setattr(Template, "render", counting)
    sums = []
    for exchanges in (40, 320):
        talk = [t for _ in range(exchanges) for t in (text("user", "q"), text("assistant", "red"))]
        rendered.clear()
        encoder.chat.encode(talk, [])
        assert sum(rendered) < 16 * len(talk)
        record = {
            "id": "0", "index": 0, "folder": None, "messages": talk, "images": [], "videos": [],
        }  # fmt: skip
        rendered.clear()
        fitted = encoder.fit(record)
        sums.append(sum(rendered))
        dropped = exchanges - sum(m["role"] == "user" for m in fitted.record["messages"])
        one_more = drop_exchanges(record, dropped - 1)["messages"]
        assert len(fitted.tokens) <= 200 < len(encoder.chat.encode(one_more, [])[0])
    assert sums[1] < 12 * sums[0]


def test_the_command_takes_a_thousand_turns(tmp_path, capsys, monkeypatch):
    base = write(tmp_path / "base", CHATML)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    one = [{"role": "user", "content": "<image>hi"}, {"role": "assistant", "content": "there"}]
    many = [{"role": r, "content": "red"} for _ in range(500) for r in ("user", "assistant")]
    rows = [{"image": "a.png", "messages": one}, {"image": "a.png", "messages": [*one, *many]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rendered, render = [], Template.render

    def counting(self, messages, *args, **kwargs):
        rendered.append(len(messages))
        return render(self, messages, *args, **kwargs)

    monkeypatch.setattr(Template, "render", counting)
    recipe = write_recipe(tmp_path, base, tmp_path / "a.jsonl", "data.max_seq_length=128")
    assert main(("preview", "--text", "--config", str(recipe))) == 0
    assert "target, " in capsys.readouterr().out
    assert sum(rendered) < 150_000  # every prefix: 500,000 for each exchange that is tried
