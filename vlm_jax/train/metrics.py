"""Metrics of steps and evaluations; the stop of a run that diverges or learns nothing."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax.adapters.added_tokens import is_added, spare_tokens
from vlm_jax.config.specs import RunSpec
from vlm_jax.data import Encoder, Pipeline
from vlm_jax.data.records.stream import Stream
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError
from vlm_jax.evals import Eval
from vlm_jax.evals.accuracy import accuracy
from vlm_jax.model import Model
from vlm_jax.train.placement import Feed
from vlm_jax.train.step import TrainState
from vlm_jax.train.trackers import Meter, Reporter
from vlm_jax.trees import join

# Components that see a gradient only in a batch with images.
NEED_IMAGES = ("vision", "projector")


def untrained(
    model: Model, paths: Sequence[str], images: bool, tokenizer: Any
) -> tuple[list[str], list[str]]:
    """Return (the components among these trained paths that data cannot reach, warnings).

    images: whether the data may have some. The warnings are of these components, and of tokens
    that were added to the tokenizer while the embedding is frozen.
    """
    idle = idle_components({model.component(path) for path in paths}, images)
    warnings = [
        f"Warning: the {name} is to be trained, but data.train_file has no image: it stays as it "
        f"is."
        for name in idle
    ]
    spare = untrained_tokens(model, paths, tokenizer.get_added_vocab())
    if spare:
        warnings.append(
            f"Warning: the rows of {len(spare)} tokens that were added to the tokenizer "
            f"({', '.join(spare[:3])}{' ...' * (len(spare) > 3)}) lie in the frozen embedding: "
            f"nothing trains them. lora.modules_to_save=embed_tokens does."
        )
    return idle, warnings


def idle_components(trained: Collection[str], images: bool) -> list[str]:
    """Return the trained components that data cannot reach; images: whether it may have some.

    Raises `UserError` where that is all of them.
    """
    idle = [] if images else [name for name in NEED_IMAGES if name in trained]
    if idle and set(trained) <= set(idle):
        raise UserError(
            f"Only the {' and the '.join(idle)} would train, but data.train_file has no image that "
            f"could reach it. Give data with images, or train the language model too (lora.enabled "
            f"or model.language_model_lr_scale)."
        )
    return idle


def untrained_tokens(model: Model, trained: Iterable[str], tokens: Mapping[str, int]) -> list[str]:
    """Return the new tokens of a tokenizer whose rows nothing trains; see `spare_tokens`."""
    reached = any(
        path.startswith(f"{model.config.embedding}/") and not is_added(path) for path in trained
    )
    return [] if reached else spare_tokens(model, tokens)


def added_only(trained: Collection[str], component: Callable[[str], str]) -> set[str]:
    """Return the components of which only rows of new tokens train, of all trained paths."""
    return {component(path) for path in trained} - {
        component(path) for path in trained if not is_added(path)
    }


class Watch:
    """Reads each step's metrics one step late, checks them and logs them.

    Late, because reading waits for the device, which by then works on the next step.
    rare: components that may go without a gradient, as rows of tokens do that a batch lacks.
    """

    def __init__(
        self,
        log: Reporter,
        rate: Callable[[int], Any],
        steps_per_epoch: int,
        log_at: Callable[[int], bool],
        rare: Collection[str] = (),
    ):
        self.log, self.rate, self.steps_per_epoch = log, rate, steps_per_epoch
        self.log_at, self.rare = log_at, rare
        self.meter = Meter()
        self.waiting: tuple | None = None
        self.newest: float | None = None  # loss that was read
        self.unseen: set[str] | None = None  # trained components still to show a gradient

    def push(self, step: int, ids: list[str], metrics: Any, images: bool) -> dict | None:
        """Take a step's metrics, and return the log line of the one before if it is due."""
        line = self.flush()
        self.waiting = (step, ids, metrics, images)
        return line

    def flush(self) -> dict | None:
        """Read what is waiting, and return its log line if it is due.

        Raises `UserError` for a loss or gradient that is not finite, and for a trained component
        whose gradient is zero where it should first have one.
        """
        if self.waiting is None:
            return None
        (step, ids, metrics, images), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise self._not_finite(step, ids, values)
        self.newest = values["loss"]
        self._check_gradients(step, values, images)
        self.meter.add(values["loss"], values["tokens"])
        if not self.log_at(step):
            return None
        line = {
            **self.meter.read(),
            "learning_rate": float(f"{float(self.rate(step - 1)):.6g}"),
            **{name: value for name, value in values.items() if name not in ("loss", "tokens")},
            "epoch": step / self.steps_per_epoch,
        }
        self.log.write(step, line)
        return {"step": step, **line}

    def _not_finite(self, step: int, ids: list[str], values: dict[str, float]) -> UserError:
        remedy = (
            "Nothing was updated before it, so no learning rate is at fault: the weights are "
            "(those read are finite, but values may grow beyond what model.dtype holds; does the "
            "base answer, by vlm-jax generate?), or the examples are."
            if step == 1
            else "Look at these examples, or lower training.learning_rate."
        )
        return UserError(
            f"Step {step} gave loss {values['loss']} and gradient norm {values['grad_norm']}, so "
            f"the run stops. Its examples were {', '.join(ids[:16])}"
            f"{' and more' if len(ids) > 16 else ''}. {remedy}"
        )

    def _check_gradients(self, step: int, values: dict[str, float], images: bool) -> None:
        prefix = "grad_norm/"
        if self.unseen is None:
            self.unseen = {n.removeprefix(prefix) for n in values if n.startswith(prefix)}
        reached = {name for name in self.unseen if images or name not in NEED_IMAGES}
        zero = {name for name in reached if values[f"{prefix}{name}"] == 0}
        for component in sorted(zero.difference(self.rare)):
            raise UserError(
                f"The {component} is to be trained, but its gradient is zero at step {step}, so "
                f"nothing of it would be learned. Freeze it (model.*_lr_scale, lora.*), or look "
                f"whether the data can reach it."
            )
        self.unseen -= reached - zero


def evaluated(
    *,
    config: RunSpec,
    model: Model,
    encoder: Encoder,
    held_out: Pipeline | None,
    losses: Any,
    named: Mapping[str, Eval],
    state: TrainState,
    frozen: Any,
    feed: Feed,
    check: Callable[[], None],
    answered: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Return the loss over all held-out examples, the accuracy of answers, and named figures.

    held_out: None: not now. named: the evaluators that are due, see `evaluators_of`.
    check: called first and behind each batch; what it raises ends the evaluation.
    answered(done, total): called behind each batch of answers.
    """
    start = time.perf_counter()
    check()
    values = {} if held_out is None else mean_losses(held_out, losses, state, frozen, feed, check)

    def on_batch(done: int, total: int) -> None:
        answered(done, total)
        check()

    e, params = config.evaluation, join(state.result, frozen)
    if held_out is not None and e.accuracy:
        assert not isinstance(held_out.records, Stream)  # `eval_batches` refused it
        values |= accuracy(
            model,
            params,
            encoder,
            held_out.records,
            max_new_tokens=e.max_new_tokens,
            batch_size=e.batch_size,
            max_examples=e.max_examples,
            on_batch=on_batch,
        ).figures
    for name, eval_of in named.items():
        figures = eval_of(model, params, encoder, on_batch=on_batch).figures
        values |= {f"{name}/{metric}": value for metric, value in figures.items()}
    # One process's word: what is chosen by it must be the same in all.
    return processes.gather("evaluation", {**values, "seconds": time.perf_counter() - start})[0]


def mean_losses(
    held_out: Pipeline,
    losses: Any,
    state: TrainState,
    frozen: Any,
    feed: Feed,
    check: Callable[[], None],
) -> dict[str, float]:
    """Return the objective's means over all held-out examples, its loss first."""
    sums: list[Any] = []
    for batch, _ in held_out.eval_batches(feed.bytes_only):
        sums.append(losses(state.result, frozen, feed(batch)))
        jax.block_until_ready(sums[-2:-1])  # or a stop would wait for all that is dispatched
        check()
    rows = [(count, total, *others.values()) for total, count, others in jax.device_get(sums)]
    count, *totals = np.asarray(rows, np.float64).sum(0).tolist()
    return {
        name: total / max(count, 1e-9)
        for name, total in zip(("loss", *sums[0][2]), totals, strict=True)
    }


def evaluation_line(found: Mapping[str, float]) -> str:
    """Return what an evaluation found, for people."""
    words = [f"loss {found['loss']:.4f}"] if "loss" in found else []
    if "accuracy" in found:
        right = round(found["accuracy"] * found["examples"])
        words.append(f"{right} of {found['examples']} right")
    words += [
        f"{name} {value:.4f}"
        for name, value in found.items()
        if "/" in name and not name.endswith("/examples")
    ]
    return "evaluation: " + ", ".join([*words, f"{found['seconds']:.0f} s"])
