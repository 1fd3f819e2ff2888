"""Learning rates over a run, each held against transformers' own."""

import jax
import numpy as np
import pytest
import torch
from transformers import get_scheduler

from vlm_jax import UserError, config
from vlm_jax.train.optimizer import OptimizerSettings, learning_rate
from vlm_jax.train.schedules import SCHEDULES

pytestmark = pytest.mark.exact

TOTAL, RATE = 500, 3e-4
CASES = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 4}),
    ("cosine_with_min_lr", {"min_lr": 3e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 0.7}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.05}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 50}),
    ("warmup_stable_decay", {"num_decay_steps": 100}),
    ("warmup_stable_decay", {"num_decay_steps": 90, "num_stable_steps": 200, "min_lr_ratio": 0.1}),
    *(
        ("warmup_stable_decay", {"num_decay_steps": 60, "warmup_type": kind, "decay_type": kind})
        for kind in ("linear", "cosine", "1-sqrt")
    ),
]


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
@pytest.mark.parametrize("warmup", [0, 1, 37])
@pytest.mark.parametrize("kind, options", CASES)
def test_500_rates_equal_transformers(kind, options, warmup):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = get_scheduler(kind, sgd, warmup, TOTAL, dict(options))
    theirs = []
    for _ in range(TOTAL + 3):  # and what comes after the end
        theirs.append(scheduler.get_last_lr()[0])
        sgd.step()
        scheduler.step()
    settings = OptimizerSettings(
        learning_rate=RATE, lr_scheduler_type=kind, warmup_steps=warmup, max_steps=TOTAL,
        lr_scheduler_kwargs=options,
    )  # fmt: skip
    ours = jax.jit(jax.vmap(learning_rate(settings)))(np.arange(TOTAL + 3))
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-11)
    assert np.abs(np.asarray(ours, np.float64) - theirs).max() < 1e-7


def test_all_schedules_are_tested_and_may_be_named():
    assert {kind for kind, _ in CASES} == SCHEDULES.keys() - {"wsd"}
    assert SCHEDULES["wsd"] == SCHEDULES["warmup_stable_decay"]
    for kind in SCHEDULES:
        config.load(None, [f"training.lr_scheduler_type={kind}"])


def test_options_come_from_yaml_and_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("training: {lr_scheduler_kwargs: {num_decay_steps: 3}}\n")
    loaded = config.load(file, ["training.lr_scheduler_type=wsd", "training.max_steps=9"])
    assert OptimizerSettings.of(loaded.training).lr_scheduler_kwargs == {"num_decay_steps": 3}
    loaded = config.load(None, ["training.lr_scheduler_kwargs={min_lr_rate: 0.1}"])
    assert loaded.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    with pytest.raises(UserError, match=r"lr_scheduler_kwargs.*own options"):
        config.load(None, ["training.lr_scheduler_kwargs=3"])


def test_what_no_schedule_can_mean_is_refused():
    def refused(words, **given):
        with pytest.raises(UserError, match=words):
            learning_rate(OptimizerSettings.of({"max_steps": 9, **given}))

    refused("did you mean 'cosine'", lr_scheduler_type="cosin")
    refused("looks at the losses", lr_scheduler_type="reduce_lr_on_plateau")
    refused("needs one of min_lr and min_lr_rate", lr_scheduler_type="cosine_with_min_lr")
    refused("needs .*num_decay_steps", lr_scheduler_type="wsd")
    refused("must be below", lr_scheduler_type="polynomial", learning_rate=1e-8)
    refused("expected linear, cosine or 1-sqrt", lr_scheduler_type="wsd",
            lr_scheduler_kwargs={"num_decay_steps": 2, "decay_type": "exp"})  # fmt: skip
    refused("'min_lr', which the 'linear' schedule", lr_scheduler_type="linear",
            lr_scheduler_kwargs={"min_lr": 1})  # fmt: skip
    refused("ends at training.max_steps", lr_scheduler_type="polynomial", max_steps=-1)
