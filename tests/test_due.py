"""What is due after a step, and in which order: a table."""

from types import SimpleNamespace

import pytest

from vlm_jax.config.specs import EvaluatorSpec
from vlm_jax.train.selection import HELD_OUT, Best, Intervals, Patience

LOSS = Best("loss", False)
SECTION = {
    **{"logging_strategy": "steps", "logging_steps": 5, "logging_first_step": True},
    **{"save_strategy": "steps", "save_steps": 4},
    **{"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 0},
}


def intervals(held_out=True, best=None, patience=None, named=(), **changes):
    t = SimpleNamespace(**{**SECTION, **changes})
    evaluators = {
        name: EvaluatorSpec(file="a.jsonl", every=every) for name, every in dict(named).items()
    }
    return Intervals.of(t, 3, 10, held_out, best, patience, evaluators)


NOTHING, SAVE, EVALUATE = (), ("save",), ("evaluate",)
SAVE_FIRST, EVALUATE_FIRST = ("save", "evaluate"), ("evaluate", "save")
# What a run has; a step, whether a signal stops it there; what is done, whether it is a candidate.
TABLE = [
    ({}, 1, False, NOTHING, False),
    ({}, 2, False, EVALUATE, False),
    ({}, 3, True, SAVE, False),
    ({}, 4, False, SAVE_FIRST, False),  # an evaluation may fail: the checkpoint comes before it
    ({}, 10, False, SAVE_FIRST, False),
    ({"best": LOSS}, 4, False, EVALUATE_FIRST, True),
    ({"best": LOSS}, 2, True, SAVE_FIRST, False),  # out of turn: no candidate
    ({"best": LOSS}, 10, False, EVALUATE_FIRST, True),
    ({"patience": Patience(LOSS, 3)}, 4, False, EVALUATE_FIRST, False),
    ({"patience": Patience(LOSS, 3)}, 2, True, EVALUATE_FIRST, False),
    ({"held_out": False}, 4, False, SAVE, False),
    ({"held_out": False}, 10, False, SAVE, False),
    ({"eval_strategy": "no"}, 4, False, SAVE, False),
    ({"eval_strategy": "no"}, 10, False, SAVE_FIRST, False),  # behind the last step always
    ({"eval_strategy": "epoch", "save_strategy": "no"}, 3, False, EVALUATE, False),
    ({"eval_steps": 3}, 10, False, SAVE_FIRST, False),
    ({"eval_delay": 11}, 10, False, SAVE, False),
    # Evaluators by name, with intervals of their own or without.
    ({"named": {"a": 3}}, 3, False, EVALUATE, False),
    ({"named": {"a": 3}}, 1, False, NOTHING, False),
    ({"held_out": False, "named": {"a": 4}}, 4, False, SAVE_FIRST, False),
    ({"held_out": False, "named": {"a": 4}}, 2, False, NOTHING, False),
    ({"held_out": False, "named": {"a": None}}, 2, False, EVALUATE, False),
    ({"held_out": False, "named": {"a": 7}, "eval_delay": 11}, 10, False, SAVE_FIRST, False),
    ({"held_out": False, "named": {"a": None}, "eval_delay": 11}, 10, False, SAVE, False),
    # They decide neither which checkpoint is the best nor when to stop.
    ({"best": LOSS, "named": {"a": 1}, "eval_steps": 8}, 4, False, SAVE_FIRST, False),
    (
        {"patience": Patience(LOSS, 3), "named": {"a": 1}, "eval_steps": 8},
        4,
        False,
        SAVE_FIRST,
        False,
    ),
]


@pytest.mark.parametrize(("has", "step", "stopping", "actions", "candidate"), TABLE)
def test_what_is_due_after_a_step(has, step, stopping, actions, candidate):
    assert intervals(**has).due(step, stopping) == (actions, candidate)


def test_the_first_step_has_a_line_where_that_is_asked():
    logged = [step for step in range(1, 11) if intervals().log(step)]
    assert logged == [1, 5, 10]
    assert not intervals(logging_first_step=False).log(1)


@pytest.mark.parametrize(
    ("has", "step", "expected"),
    [
        ({"named": {"a": 3, "b": None}}, 0, [HELD_OUT, "a", "b"]),  # before the first step: all
        ({"named": {"a": 3, "b": None}}, 2, [HELD_OUT, "b"]),
        ({"named": {"a": 3, "b": None}}, 3, ["a"]),
        ({"named": {"a": 3, "b": None}}, 10, [HELD_OUT, "a", "b"]),
        ({"named": {"a": 3}}, 5, [HELD_OUT, "a"]),  # left pending by a run of other intervals
        ({"held_out": False, "named": {"a": None}}, 5, ["a"]),
    ],
)
def test_what_an_evaluation_consists_of(has, step, expected):
    assert intervals(**has).evaluations(step) == expected
