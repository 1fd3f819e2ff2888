"""Greedy answers to the questions of records, and their mean score: what evaluators are made of."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from vlm_jax.batch import Batch, Example
from vlm_jax.data.encode import Encoder
from vlm_jax.data.measuring import ALWAYS_DROPPED, reason_of
from vlm_jax.data.records.mixture import Mixture, Records
from vlm_jax.data.records.record import Record
from vlm_jax.data.shapes import Shape, choose_shapes, group, round_up
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError
from vlm_jax.generation import end_tokens, generate
from vlm_jax.model import Model
from vlm_jax.sharding import mesh_under, row_parts

# Shapes that prompts are padded to; each is one compilation.
MAX_SHAPES = 3
# How right a generated answer is, from 0 to 1, given what the record has as right answers.
Score = Callable[[str, Sequence[str]], float]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question. index: of the record in its file. score: in [0, 1]; true or false."""

    id: str
    index: int
    question: str
    answers: tuple[str, ...]
    prediction: str
    score: float

    @property
    def answer(self) -> str:
        return self.answers[0]

    @property
    def correct(self) -> bool:
        return self.score == 1

    def to_json(self) -> dict[str, Any]:
        """Return a line of a file of predictions."""
        exact = isinstance(self.score, bool)
        return {
            **{"id": self.id, "index": self.index, "question": self.question},
            **({"answer": self.answer} if exact else {"answers": list(self.answers)}),
            **{"prediction": self.prediction, "correct" if exact else "score": self.score},
        }


@dataclasses.dataclass(frozen=True)
class Scores:
    """What an evaluator finds. metric: its name. skipped: records without an answer, or bad."""

    metric: str
    predictions: list[Prediction]
    skipped: int

    @property
    def mean(self) -> float:
        """The mean score of the predictions, in [0, 1]."""
        return sum(p.score for p in self.predictions) / len(self.predictions)

    @property
    def figures(self) -> dict[str, float]:
        """The numbers that are logged."""
        return {self.metric: self.mean, "examples": len(self.predictions)}


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def right_answers(record: Record) -> tuple[str, ...]:
    """Return a canonical record's right answers, its last turn's text first; () without any."""
    last = record["messages"][-1] if record["messages"] else {"role": ""}
    text = _text(last).strip() if last["role"] == "assistant" else ""
    return tuple(dict.fromkeys([text, *map(str.strip, last.get("answers", ()))])) if text else ()


def _plan(
    encoder: Encoder, records: Sequence[Record], count: int, rows: int
) -> list[tuple[list[Record], Shape]]:
    """Return batches: records of about one size that have answers and can be read, their shape.

    Raises `UserError` where nothing is left.
    """
    kept: list[Record] = []
    sizes, first_error = [], ""
    for number in range(count):
        try:
            record = records[number]
            if right_answers(record):
                sizes.append(encoder.measure(record)[:2])
                kept.append(record)
        except UserError as error:  # a malformed record, or a `BadExample`
            if encoder.on_bad_example == "raise" and reason_of(error) not in ALWAYS_DROPPED:
                raise _named(records, number, error) from error
            first_error = first_error or f" The first that cannot be read: {error}"
    if not kept:
        raise UserError(
            f"None of the {count} evaluation records ends with an assistant's answer and can be "
            f"read, so there is nothing to compare with. Give records whose last turn is the "
            f"expected answer, or set evaluation.accuracy=false.{first_error}"
        )
    measured = np.array(sizes)
    unit = encoder.config.patch_unit
    cap = (round_up(int(measured[:, 0].max())), round_up(int(measured[:, 1].max()), unit))
    steps = group(measured, rows, choose_shapes(measured, cap, MAX_SHAPES, unit))
    return [([kept[i] for i in members], shape) for members, shape in steps]


def _named(records: Sequence[Record], number: int, error: UserError) -> UserError:
    """Return the error with the file that the record stands in, where one is known."""
    if isinstance(records, Records | Mixture) and records.place(number) not in str(error):
        return UserError(f"In {records.place(number)}: {error}")
    return error


def _collate(
    encoder: Encoder, records: list[Record], shape: Shape, rows: int
) -> tuple[list[Record], Batch]:
    """Return the records that hold, in order, and the batch of their prompts.

    Damaged pixels show only here, since `_plan` reads no more than an image's header.
    """
    good: list[Record] = []
    filled: list[list[Example]] = [[] for _ in range(rows)]
    for record in records:
        try:
            filled[len(good)].append(encoder.prompt(record))
            good.append(record)
        except UserError:
            if encoder.on_bad_example == "raise":
                raise
    return good, encoder.collate(filled, *shape)


def _ahead(make: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (item, make(item)), making the next one in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(make, item) for item in items)
        pairs = itertools.pairwise(itertools.chain(futures, [Future()]))
        for item, (made, _) in zip(items, pairs, strict=True):
            yield item, made.result()


def scored(
    metric: str,
    score: Score,
    model: Model,
    params: Mapping[str, Any],
    encoder: Encoder,
    records: Sequence[Record],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    max_examples: int = 0,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Return the greedy answer to each record's question with its score.

    A record counts if its last turn is the assistant's; what comes before is the prompt.
    max_examples: only the first ones; 0 is all.
    on_batch(done, total) is called after each batch. Predictions are in the records' order.
    On a mesh batch_size is rounded up so that every device has rows; several processes all call it.
    Raises `UserError` where no record has an answer, and for unreadable ones unless the encoder
    skips them; those are counted in `skipped`.
    """
    if max_new_tokens < 1 or batch_size < 1 or max_examples < 0:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, batch_size {batch_size} and max_examples "
            f"{max_examples}; they must be at least 1, 1 and 0 (all)."
        )
    mesh = mesh_under(params)
    if mesh is not None:
        batch_size = -(-batch_size // row_parts(mesh)) * row_parts(mesh)
    count = min(len(records), max_examples) if max_examples > 0 else len(records)
    batches = _plan(encoder, records, count, batch_size)
    eos, pad = end_tokens(model, encoder.chat.turn_end)
    # Each process finds out for itself what it can read: all must come to the same.
    readable = [record["index"] for planned, _ in batches for record in planned]
    processes.check_same("readable records", {"records": readable})
    predictions: list[Prediction] = []
    done = 0
    for (planned, _), (good, batch) in _ahead(
        lambda planned: _collate(encoder, planned[0], planned[1], batch_size), batches
    ):
        processes.check_same("readable images", {"of records": [one["index"] for one in good]})
        done += len(planned)
        if good:
            new = generate(model, params, batch, max_new_tokens, eos_token_id=eos, pad_token_id=pad)
            predictions += [
                _prediction(
                    encoder.grounded(record), encoder.chat.answer(tokens, eos).strip(), score
                )
                for record, tokens in zip(good, new, strict=False)  # the rest of new is empty rows
            ]
        on_batch(done, len(readable))
    if not predictions:
        raise UserError(
            f"The images of all {len(readable)} evaluation records with an answer are damaged."
        )
    predictions.sort(key=lambda p: p.index)
    return Scores(metric, predictions, count - len(predictions))


def _prediction(record: Record, text: str, score: Score) -> Prediction:
    asked = [message for message in record["messages"] if message["role"] == "user"]
    answers = right_answers(record)
    return Prediction(
        id=record["id"],
        index=record["index"],
        question=_text(asked[-1]).strip() if asked else "",
        answers=answers,
        prediction=text,
        score=score(text, answers),
    )
