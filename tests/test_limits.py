"""Limits on what files may ask for: numbers, depth, aliases, names of files, and regexes."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import UserError
from vlm_jax.files import limits
from vlm_jax.files.limits import (
    all_finite,
    check_patterns,
    is_file_name,
    number,
    parse_json,
    parse_yaml,
)

NOT_FINITE = (np.nan, -np.nan, np.copysign(np.nan, -1), np.inf, -np.inf)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_what_is_not_finite_is_told_by_its_bits(dtype):
    rng, largest = np.random.default_rng(0), jnp.finfo(dtype).max
    for shape in ((), (1,), (3, 5, 7), (limits.PIECE + 3,), (2, limits.PIECE)):
        x = rng.standard_normal(shape).astype(dtype)
        for value in (0.0, -0.0, largest, -largest, jnp.finfo(dtype).tiny):
            x[(0,) * len(shape)] = value
            assert all_finite(x) and all_finite(x.T)
        for value in NOT_FINITE:
            for place in (0, x.size // 2, -1):
                y = x.copy()
                y.reshape(-1)[place] = value
                assert not np.isfinite(y).all() and not all_finite(y) and not all_finite(y.T)
    assert all_finite(np.zeros((0, 3), dtype)) and all_finite(np.full(3, -1, np.int32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "thousands deep"),
        ("[" * 60 + "]" * 60, "more than 50 levels"),
        ('{"a": {"b": [1, NaN]}}', r"'x.json' has a.b\[1\] = nan; expected a finite number"),
        ('{"a": -Infinity}', "a = -inf"),
        ('{"a": 1e999}', "a = inf"),
        (f'{{"a": 1{"0" * 400}}}', "a number of more than 308 digits"),
        (f'{{"a": {"1" * 5000}}}', "more than 4,300 digits"),
        ('{"a": ', "line 1, column 7"),
    ],
)
def test_json_that_asks_for_too_much(text, message):
    with pytest.raises(UserError, match=message):
        parse_json(text, "x.json")


def test_json_of_real_files_is_read():
    tree = {"model_max_length": 10**30, "deep": json.loads("[" * 40 + "]" * 40), "x": -0.5}
    assert parse_json(json.dumps(tree), "x.json") == tree


BILLIONS = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{{', '.join(f'k{i}: *{before}' for i in range(10))}}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLIONS, "line 2: the alias \\*a stands in what has an anchor itself"),
        (BILLIONS.replace("k0: *", "<<: *"), "line 2: the alias \\*a"),
        ("data: &d {train_file: *d}", r"line 1: the alias \*d"),
        ("a: " + "[" * 10_000, "more than 50 levels"),
        ("a: &a [" + "1, " * 1000 + "1]\nb: [" + "*a, " * 2500 + "1]", "2,000,000 values"),
        ("a: .nan", "a = nan"),
    ],
)
def test_yaml_that_asks_for_too_much(text, message):
    start = time.process_time()
    with pytest.raises(UserError, match=message):
        parse_yaml(text, "x.yaml")
    assert time.process_time() - start < 10


def test_anchors_of_a_real_config_are_read():
    text = "x: &rates {learning_rate: 0.1, seeds: [1, 2]}\ntraining: {<<: *rates, other: *rates}"
    rates = {"learning_rate": 0.1, "seeds": [1, 2]}
    assert parse_yaml(text, "x.yaml") == {"x": rates, "training": {**rates, "other": rates}}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_hidden_layers", 20_000, "at most 16,384"),
        ("vocab_size", 2**31, "at most 2,147,483,647"),
        ("anything", float("nan"), "a finite number"),
        ("anything", 10**400, "a finite number"),
        ("anything", 1e31, r"at most 1e\+30"),
        ("rope_theta", 0.0, "more than 0"),
    ],
)
def test_numbers_of_settings(name, value, expected):
    with pytest.raises(UserError, match=f"The config.json has {name} = .*; expected {expected}"):
        number(name, value, "config.json", above=0)
    number("rope_theta", 1e11, "config.json", above=0)
    number("vocab_size", 262_144, "config.json")


def test_files_of_the_own_directory():
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "..x.safetensors", " x"):
        assert is_file_name(name), name
    for name in ("../a", "/a", "a/b", "a\\b", "..", "", "a\0b", None, 3):
        assert not is_file_name(name), name


NAMES = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(28)]


@pytest.mark.parametrize("pattern", [r"((a|b|.)+)+\.q!", "(?x:((.+) +)@)"])
def test_an_endless_regex_ends_and_inside_a_thread_too(pattern):
    with ThreadPoolExecutor(1) as threads:
        checked = threads.submit(check_patterns, ["q_proj", pattern], NAMES, "row")
        with pytest.raises(UserError, match=f"The row {re.escape(repr(pattern))} .*than 2 seconds"):
            checked.result(timeout=100)


def test_quick_regexes_are_taken_and_usual_ones_start_no_process(monkeypatch):
    check_patterns([r"(\w+\.)*q_proj", r"(a|b)*x", r"(.*)\.\1", ".*" * 5], NAMES, "row")
    monkeypatch.setattr(limits, "_endless", lambda *_: pytest.fail("a process"))
    usual = [
        "q_proj",
        r".*\.(q|k|v)_proj",
        r"layers\.\d+\.mlp\..*",
        r"^(?!.*visual).*",
        r"x\.[0-9]+",
    ]
    check_patterns(usual, NAMES, "row")
    for doubtful in (".*" * 5, "(a|b)*", "(|||)" * 12, "a?" * 30, r"(.*)\1"):
        with pytest.raises(pytest.fail.Exception):
            check_patterns([doubtful], NAMES, "row")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["(q"], r"The row '\(q' is not a regular expression"),
        (["(" * 5000], "is not a regular expression"),
        (["a" * 20_000], "has 20,000 letters"),
        ([str(i) for i in range(20_000)], "There are 20,000 regular expressions, each a row"),
    ],
)
def test_regexes_that_are_none(patterns, message):
    with pytest.raises(UserError, match=message):
        check_patterns(patterns, NAMES, "row")
