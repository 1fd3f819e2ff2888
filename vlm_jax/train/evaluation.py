"""An evaluation of a run: the loss over held-out examples, and the accuracy of its answers."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import processes
from vlm_jax.data import Encoder, Pipeline
from vlm_jax.data.stream import StreamRecords
from vlm_jax.evals.accuracy import accuracy
from vlm_jax.model import Model
from vlm_jax.train.feed import Feed
from vlm_jax.train.step import TrainState
from vlm_jax.trees import join


def evaluated(
    *,
    config: ConfigDict,
    model: Model,
    encoder: Encoder,
    held_out: Pipeline,
    losses: Any,
    state: TrainState,
    frozen: Any,
    feed: Feed,
    check: Callable[[], None],
    answered: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Return the loss over all held-out examples and the accuracy of generated answers.

    check: called first and behind each batch; what it raises ends the evaluation.
    answered(done, total): called behind each batch of answers.
    """
    start = time.perf_counter()
    check()
    sums: list[Any] = []
    for batch, _ in held_out.eval_batches(feed.bytes_only):
        sums.append(losses(state.result, frozen, feed(batch)))
        jax.block_until_ready(sums[-2:-1])  # or a stop would wait for all that is dispatched
        check()
    total, tokens = np.asarray(jax.device_get(sums), np.float64).sum(0)
    values = {"loss": float(total / max(tokens, 1e-9))}
    e = config.evaluation
    if e.accuracy:
        assert not isinstance(held_out.records, StreamRecords)  # `eval_batches` refused it

        def on_batch(done: int, total: int) -> None:
            answered(done, total)
            check()

        found = accuracy(
            model,
            join(state.result, frozen),
            encoder,
            held_out.records,
            max_new_tokens=e.max_new_tokens,
            batch_size=e.batch_size,
            max_examples=e.max_examples,
            on_batch=on_batch,
        )
        values["accuracy"], values["examples"] = found.accuracy, len(found.predictions)
    # One process's word: what is chosen by it must be the same in all.
    return processes.gather("evaluation", {**values, "seconds": time.perf_counter() - start})[0]


def told(found: Mapping[str, float]) -> str:
    """Return what an evaluation found, for people."""
    words = [f"evaluation: loss {found['loss']:.4f}"]
    if "accuracy" in found:
        right = round(found["accuracy"] * found["examples"])
        words.append(f"{right} of {found['examples']} right")
    return ", ".join([*words, f"{found['seconds']:.0f} s"])
