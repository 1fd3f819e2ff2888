"""A chat template that never ends or fills the memory is refused; any other is transformers'."""

import subprocess
import sys
import threading
import time

import pytest
from checkpoint_files import CHATML, VICUNA, qwen2_vl_files, text
from runs import make_data, write_recipe
from transformers.utils import chat_template_utils

from vlm_jax.cli import main
from vlm_jax.data.text import sandbox, template
from vlm_jax.data.text.template import BadTemplate, Template
from vlm_jax.data.text.watchdog import within

TALK = [text("user", "Which?"), text("assistant", "red"), text("user", "sure?")]
GROWING = "{% set n = namespace(x='aaaaaaaaa') %}{% for i in range(60) %}"
NESTED = "{% set n = namespace(x=['a']) %}{% for i in range(60) %}"


@pytest.mark.parametrize("source", [CHATML, VICUNA])
def test_an_ordinary_template_renders_as_in_transformers(source):
    theirs = chat_template_utils._compile_jinja_template(source)
    for prompt in (False, True):
        wanted = theirs.render(messages=TALK, add_generation_prompt=prompt)
        assert Template(source, "d").render(TALK, prompt) == (wanted, [])


def test_what_a_template_may_call_is_transformers():
    source = (
        "{% set n = namespace(all=[]) %}{% for m in messages %}{% set n.all = n.all + [m.role] %}"
        "{% endfor %}{{ n.all | tojson }} {{ dict(a=1).items() | list }} {{ 7 * 6 }} {{ 2 ** 10 }} "
        "{{ '%s-%02d' % ('a', 3) }} {{ '{:>4}'.format('b') }} {{ 'a,b'.split(',') | join('+') }} "
        "{{ 'abc' | replace('b', 'xx') | center(9) }} {{ 'x' ~ 1 ~ n.all }} {{ ('a', 'b')[1] }} "
        "{{ messages | map(attribute='role') | join(' ') | indent(2) }} {{ '-' * 5 }}"
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}"
        "{% endfor %}{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('y') }}{{ strftime_now('%%') }}"
    )
    wanted = chat_template_utils._compile_jinja_template(source).render(messages=TALK)
    assert Template(source, "d").render(TALK, False)[0] == wanted


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 10 ** (10 ** 9) }}", r"a number, a width or a count above 1048576 \(by '\*\*'\)"),
        ("{% set x = 'a' * 10 ** 11 %}", r"67108864 characters of text \(by '\*'\)"),
        (GROWING + "{% set n.x = n.x ~ n.x %}{% endfor %}", "by '~'"),
        (GROWING + "{% set n.x = n.x + n.x %}{% endfor %}", r"by '\+'"),
        (GROWING + "{% set n.x = n.x | replace('a', 'aa') %}{% endfor %}", "filter 'replace'"),
        (GROWING + "{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}", r"replace\(\)"),
        (GROWING + "{% set n.x = n.x | join(n.x) %}{% endfor %}", "filter 'join'"),
        (
            GROWING + "{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}{% endfor %}",
            "outp",
        ),
        (NESTED + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == n.x }}", "by a list"),
        (NESTED + "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}", "by 'TemplateDict"),
        (NESTED + "{% set n.x = n.x + n.x %}{% endfor %}", r"by '\+'"),
        ("{{ 'a' | center(10 ** 10) }}", "filter 'center'"),
        ("{{ (5).to_bytes(10 ** 10, 'big') }}", "by 'to_bytes"),
        ("{{ '%(a)99999999999d' % {'a': 1} }}", "a field of any width"),
        ("{{ '{:{}}'.format('a', 10 ** 10) }}", "by 'format"),
        ("{% set x = 'a' * 10 ** 7 %}{% for i in range(9) %}{{ x }}{% endfor %}", "its output"),
    ],
)
def test_what_would_fill_the_memory_is_refused(source, said):
    made = Template(source, "the directory")
    with pytest.raises(BadTemplate, match=f"The chat template of 'the directory' .*{said}"):
        made.render(TALK, False)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
    ],
)
def test_what_never_ends_is_ended_in_any_thread(monkeypatch, source):
    monkeypatch.setattr(template, "TEMPLATE_SECONDS", 0.5)
    made, caught = Template(source, "d"), []

    def render():
        try:
            made.render(TALK, False)
        except BadTemplate as error:
            caught.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert "takes more than 0.5 seconds" in caught[0] and not thread.is_alive()
    before = time.perf_counter()
    render()  # not once more for each record
    assert caught[1] == caught[0] and time.perf_counter() - before < 0.2


def test_an_exception_of_the_watchdog_stays_within():
    def loop():
        while True:
            pass

    with pytest.raises(TimeoutError):
        within(0.25, loop)
    end = time.perf_counter() + 1.2  # longer than until it would be sent anew
    while time.perf_counter() < end:
        pass
    assert within(5, sum, [1, 2]) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_a_debugger_goes_on_behind_the_watchdog():
    """In a process of its own, which the fault would hold up for ever."""
    program = (
        "import sys; from vlm_jax.data.text.watchdog import within\n"
        "def count():\n  for n in range(3): pass\n  return n\n"
        "sys.settrace(lambda *event: None)\n"
        "print(within(5, count), count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 2\n"


def test_the_command_names_the_template(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(template, "TEMPLATE_SECONDS", 0.5)
    data = make_data(tmp_path / "data", 3)
    for number, source in enumerate(("{{ 10 ** (10 ** 9) }}", "{{ 'a' * 10 ** 11 }}", "(" * 2000)):
        directory = tmp_path / str(number)
        directory.mkdir()
        qwen2_vl_files(directory, source if number < 2 else "{{ " + source + " }}")
        skip = "data.on_bad_example=skip"  # it is no record's fault
        recipe = write_recipe(tmp_path, directory, data, skip)
        assert main(("preview", "--text", "--config", str(recipe))) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"vlm-jax preview: The chat template of '{directory}' ")
        assert said.count("\n") == 1


def test_a_template_of_any_length_is_not_compiled(monkeypatch):
    monkeypatch.setattr(template, "TEMPLATE_SOURCE", 100)
    with pytest.raises(template.UserError, match="has 101 characters, and more than 100"):
        Template("a" * 101, "d")


def test_every_filter_is_bounded():
    made = sandbox._environment()
    assert all(hasattr(f, "__wrapped__") for f in made.filters.values())
