"""A run has the steps of transformers' Trainer, and each step the examples of its accumulation."""

import itertools
import json
import math
import random

import pytest
import torch
from checkpoint_files import qwen2_vl_files
from tiers import fast
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlm_jax.data import Encoder, Pipeline
from vlm_jax.train.setup import total_steps


class Line(torch.nn.Module):
    """The least that a Trainer trains; notes which examples came."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x):
        self.seen += x[:, 0].int().tolist()
        return {"loss": (self.weight * x).mean()}


class Cut(TrainerCallback):
    """Cuts what the model saw into optimizer steps."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_step_end(self, args, state, control, **_):
        self.steps.append(sorted(self.model.seen))
        self.model.seen = []


def theirs(place, count, **options):
    """Return the Trainer's max_steps, and the examples of each of its steps."""
    model = Line()
    cut = Cut(model)
    args = TrainingArguments(
        str(place), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    data = [{"x": torch.tensor([float(i)])} for i in range(count)]
    trainer = Trainer(model, args, train_dataset=data, callbacks=[cut])
    trainer.train()
    assert len(cut.steps) == trainer.state.global_step == trainer.state.max_steps
    return trainer.state.max_steps, cut.steps


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(qwen2_vl_files(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Return the path of a file of so many records without images."""
    place = tmp_path_factory.mktemp("records")

    def write(count):
        path = place / f"{count}.json"
        turn = {"from": "human", "value": "What color?"}, {"from": "gpt", "value": "red"}
        rows = [{"id": str(i), "conversations": turn} for i in range(count)]
        path.write_text(json.dumps(rows))
        return path

    return write


def ours(encoder, records, count, shuffle=False, **options):
    """Return the steps of a run, and the examples of each of them."""
    micro, cut = options["per_device_train_batch_size"], options["gradient_accumulation_steps"]
    data = Pipeline(
        encoder, records(count), rows=micro * cut, micro_batches=cut, shuffle=shuffle,
        drop_last=options["dataloader_drop_last"],
    )  # fmt: skip
    total = total_steps(
        options.get("max_steps", -1), options.get("num_train_epochs", 1.0), data.steps_per_epoch
    )
    steps = itertools.islice(data.planner.steps(), total)
    return total, [sorted(int(row[0]) for row in step.rows) for step in steps]


def drawn(number):
    """Return (examples, options): of partial accumulations, partial batches and cut epochs."""
    rng = random.Random(number)
    batch, cut = rng.randint(1, 4), rng.randint(1, 4)
    options = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": cut,
        "dataloader_drop_last": rng.random() < 0.5,
    }
    if rng.random() < 0.3:
        options["max_steps"] = rng.randint(1, 12)
    else:
        options["num_train_epochs"] = rng.choice([0.3, 0.5, 1, 1.5, 2, 2.25, 3])
    return rng.randint(batch, 40), options


@pytest.mark.parametrize("number", fast(range(10), range(30)))
def test_steps_and_their_examples_are_the_trainers(number, encoder, records, tmp_path):
    count, options = drawn(number)
    steps, examples = theirs(tmp_path, count, **options)
    assert ours(encoder, records, count, **options) == (steps, examples), (count, options)
    shuffled, mixed = ours(encoder, records, count, shuffle=True, **options)
    assert shuffled == steps
    assert [len(step) for step in mixed] == [len(step) for step in examples]


def test_the_draw_reaches_what_tells_the_rules_apart():
    cut = partial = over = 0
    for number in range(30):
        count, options = drawn(number)
        batch, turns = (options[key] for key in list(options)[:2])
        batches = count // batch if options["dataloader_drop_last"] else math.ceil(count / batch)
        cut += options["dataloader_drop_last"] and count // (batch * turns) < batches / turns
        partial += not options["dataloader_drop_last"] and count % batch > 0
        over += options.get("max_steps", 0) > math.ceil(batches / turns)
    assert min(cut, partial, over) >= 3


def test_rows_that_drop_last_leaves_out_are_drawn_anew_each_epoch(encoder, tmp_path):
    turns = [
        [{"from": "human", "value": "a " * (i + 1)}, {"from": "gpt", "value": "b"}]
        for i in range(23)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": str(i), "conversations": t} for i, t in enumerate(turns)]))
    data = Pipeline(encoder, path, rows=8, micro_batches=2, drop_last=True)
    assert data.steps_per_epoch == 3
    left = []
    for epoch in range(8):
        steps = list(data.planner.epoch({"epoch": epoch, "step": 0}))
        assert [len(step.rows) for step in steps] == [8, 8, 4]
        seen = [row[0] for step in steps for row in step.rows]
        assert len(set(seen)) == 20
        left.append(tuple(sorted(set(range(23)) - set(seen))))
        again = list(data.planner.epoch(steps[0].after))
        assert [step.rows for step in again] == [step.rows for step in steps[1:]]
    assert len(set(left)) > 4
