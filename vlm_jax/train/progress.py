"""Progress on the console: data and step before the run, then a bar or log lines."""

import contextlib
import datetime
import functools
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
)
from rich.text import Text

from vlm_jax.data import Pipeline
from vlm_jax.distributed.interrupts import if_ended
from vlm_jax.model import Model
from vlm_jax.quantization import summary
from vlm_jax.train.metrics import Watch, evaluation_line
from vlm_jax.train.selection import Standing
from vlm_jax.train.setup import RunData
from vlm_jax.train.trackers import numbers, say
from vlm_jax.trees import flatten
from vlm_jax.weights import is_quantized

RECENT = 20  # steps by whose times the end is foretold
WIDE = 100  # columns of a terminal that has room for all; at 80 a line must do without some
REFRESH = 4  # times a second
SHOW_CURSOR = b"\x1b[?25h\n"


class _Words(ProgressColumn):
    """A column of what a function returns at the moment."""

    def __init__(self, words: Callable[[], str], style: str = ""):
        super().__init__()
        self.words, self.style = words, style

    def render(self, task: Task) -> Text:
        return Text(self.words(), self.style, no_wrap=True)


@contextlib.contextmanager
def _live(bar: Progress) -> Iterator[None]:
    """Draw a bar while a block lasts; where the process ends within, the cursor comes back."""

    def restore() -> None:
        os.write(bar.console.file.fileno(), SHOW_CURSOR)

    with contextlib.nullcontext() if bar.disable else if_ended(restore), bar:
        yield


class Doing:
    """What is being done besides steps, with its seconds: compiling, evaluating.

    Where the console is not a terminal it is a line each time, of what takes long alone.
    """

    def __init__(self, console: Console):
        self.console = console
        self.words, self.since = "", 0.0
        self.bar: Progress | None = None  # a bar that is drawn, and shows it

    @contextlib.contextmanager
    def __call__(self, words: str, line: bool = True) -> Iterator[None]:
        """Show words while a block lasts. line: they are worth a line in a log file."""
        before = self.words, self.since
        self.words, self.since = words, time.perf_counter()
        if line and not self.console.is_terminal:
            say(self.console, words)
        alone = Progress(  # its last state stays as a line
            _Words(self.text),
            console=self.console,
            refresh_per_second=REFRESH,
            disable=self.bar is not None or not self.console.is_terminal,
        )
        alone.add_task("")
        try:
            with _live(alone):
                yield
        finally:
            self.words, self.since = before

    def say(self, words: str) -> None:
        """Change the description of what is being done; its seconds run on."""
        self.words = words

    def text(self) -> str:
        """Return the words and their seconds; "" where only steps are done."""
        return self.words and f"{self.words}  {time.perf_counter() - self.since:.0f} s"


class Bar:
    """The bar of a run: steps, the newest loss, the time to the end, and what else is being done.

    step: where the run begins. stopping: whether it has been asked to stop.
    """

    def __init__(self, doing: Doing, total: int, step: int, stopping: Callable[[], bool]):
        self.doing, self.console, self.total, self.step = doing, doing.console, total, step
        self.newest, self.rest = "", ""
        self.times: deque[float] = deque(maxlen=RECENT)
        self.last: float | None = None  # when the step before this one was read
        wide = self.console.width >= WIDE
        self.bar = Progress(
            _Words(lambda: doing.text() or ("stopping" if stopping() else "train"), "bold"),
            BarColumn(30 if wide else 12),
            MofNCompleteColumn(),
            _Words(lambda: "" if doing.words else f"{self.newest}{self.rest}"),
            *([TimeElapsedColumn()] if wide else []),
            _Words(self._left),
            console=self.console,
            refresh_per_second=REFRESH,
            disable=not self.console.is_terminal,
        )

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw the bar while a block lasts."""
        self.task = self.bar.add_task("", total=self.total, completed=self.step)
        self.doing.bar = self.bar
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self.doing, "bar", None)
            stack.enter_context(_live(self.bar))
            yield

    def stepped(self, step: int, loss: float | None, left_out: float = 0.0) -> None:
        """Move to a step; loss: the newest one known. left_out: seconds that were no step's."""
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(max(now - self.last - left_out, 0.0))
        self.last, self.step = now, step
        self.newest = "" if loss is None else f"loss {loss:.4f}"
        self.bar.update(self.task, completed=step)

    def leave_out(self, seconds: float) -> None:
        """Take time off that was no step's, as that of an evaluation."""
        self.last = None if self.last is None else self.last + seconds

    def line(self, line: Mapping[str, Any] | None) -> None:
        """Show a line of metrics, where there is one."""
        if line is None:
            return
        rate = f"  lr {line['learning_rate']:.1e}" if self.console.width >= WIDE else ""
        self.rest = f"{rate}  {line['tokens_per_second']:,.0f} tokens/s"
        if not self.console.is_terminal:
            say(self.console, f"step {line['step']}/{self.total}  {numbers(line)}")

    def _left(self) -> str:
        if self.doing.words and self.console.width < WIDE:
            return ""
        if not self.times:
            return "ETA -:--:--"
        seconds = sum(self.times) / len(self.times) * (self.total - self.step)
        return f"ETA {datetime.timedelta(seconds=round(seconds))}"


class Monitor:
    """What a run logs and shows: its steps' metrics, a step late, its evaluations, and the bar."""

    def __init__(self, watch: Watch, bar: Bar):
        self.watch, self.bar = watch, bar

    def next(self, batches: Iterator[Any]) -> Any:
        """Return the next of the batches, counting the wait for it."""
        start = time.perf_counter()
        batch = next(batches)
        self.watch.meter.wait(time.perf_counter() - start)
        return batch

    def step(self, step: int, ids: list[str], metrics: Any, images: bool, compiling: float) -> None:
        """Take a dispatched step. compiling: seconds of it that the compiler took."""
        self.watch.meter.leave_out(compiling)
        self.bar.line(self.watch.push(step, ids, metrics, images))
        self.bar.stepped(step, self.watch.newest, compiling)

    def flush(self) -> None:
        """Read, check and show the newest step's metrics."""
        self.bar.line(self.watch.flush())

    def evaluated(self, step: int, found: Mapping[str, float]) -> None:
        """Log and show an evaluation, whose time is no step's."""
        self.watch.log.write_evaluation(step, found)
        self.bar.console.print(
            f"step {step}/{self.bar.total}  {evaluation_line(found)}", highlight=False
        )
        self.watch.meter.leave_out(found["seconds"])
        self.bar.leave_out(found["seconds"])


def headline(data: RunData, mesh: Any) -> str:
    """Return how many records are trained and evaluated on, and in how many rows and steps."""
    report = data.training.report
    kept, seen, records = (report[key] for key in ("examples", "measured", "records"))
    used = (
        f"{_many(records, 'record')}, {kept:,} of the {seen:,} looked at fit"
        if seen < records
        else f"{kept:,} of {_many(records, 'record')}"
    )
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
    changed = (("shrunk", "with smaller images"), ("turns_dropped", "without old turns"))
    notes = [f"left out: {left_out}"] if left_out else []
    notes += [f"{report[key]:,} {change}" for key, change in changed if report[key]]
    noted = f" ({'; '.join(notes)})" if notes else ""
    held_out = data.held_out
    evaluated = "" if held_out is None else f", {held_out.report['records']:,} to evaluate on"
    sizes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1)
    devices = f" on {mesh.size} devices ({sizes})" if mesh.size > 1 else ""
    steps = data.training.steps_per_epoch
    epoch = "" if steps is None else f", {steps:,} an epoch"
    return (
        f"{used}{noted}{evaluated}; {_many(data.rows, 'row')} a step{devices}; "
        f"{_many(data.total, 'step')}{epoch}"
    )


def opening_lines(
    model: Model,
    params: Mapping[str, Any],
    data: RunData,
    mesh: Any,
    verbose: bool,
) -> list[str]:
    """Return what a run says of its data and weights before its first step."""
    four = any(is_quantized(leaf) for leaf in flatten(params).values())
    weights = summary(model, params) if four else []
    lines = [headline(data, mesh)]
    return lines + (weights + details(data.training, model) if verbose else weights[:1])


def attention_line(chosen: Sequence[str]) -> str:
    """Return what computes the attentions of a run's largest step."""
    return f"attention: {'; '.join(chosen)}"


def closing_lines(
    outcome: Mapping[str, Any], run: Standing, checkpoints: Any, total: int
) -> list[str]:
    """Return what was left out of the data, and why a run ends before its last step."""
    report, step = outcome["data"], run.step
    lines = [
        f"Left out {count} ({reason}): {report['first_dropped'][reason]}"
        for reason, count in report["dropped"].items()
    ]
    if outcome["interrupted"]:
        unseen = ", before its evaluation" if run.pending else ""
        lines.append(
            f"Stopped after step {step} of {total}{unseen}; saved '{checkpoints / str(step)}'. Go "
            f"on with --resume."
        )
    elif run.patience is not None and outcome["stopped_early"]:
        patience = run.patience
        lines.append(
            f"Stopped early, after step {step} of {total}: {patience.waited} evaluations in a row "
            f"did not better the {patience.measure.metric}, {patience.best:.4f}, by more than "
            f"{patience.threshold:g}."
        )
    return lines


def details(data: Pipeline, model: Model) -> list[str]:
    """Return what `--verbose` prints: the shapes of rows, what stays empty, how a step computes."""
    report = data.report
    shapes = ", ".join(f"{tokens} x {patches}" for tokens, patches in data.shapes)
    return [
        f"{'packed rows' if report['packing'] else 'rows'} of tokens x patches: {shapes}; "
        f"{report['padding']:.1%} of tokens and {report['patch_padding']:.1%} of patches stay "
        f"empty",
        f"norms and softmax in float32; layers are "
        f"{'kept for' if model.remat == 'none' else 'recomputed in'} the backward pass "
        f"({model.remat}); no gradient is taken of frozen weights, so inputs need none",
    ]


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def tell_failed_saves_once() -> None:
    """Leave out what threads of a failed save print, for the rest of the process.

    `Checkpoints.finish` raises the first failure. Each of orbax's threads logs its own besides, and
    tensorstore's, whose writes are still under way, find the loop closed that they report to.
    """
    logging.getLogger("absl").addFilter(_is_news)
    if getattr(sys.unraisablehook, "func", None) is not _report_unraisable:
        sys.unraisablehook = functools.partial(_report_unraisable, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.exc_info or "orbax" not in Path(record.pathname).parts


def _report_unraisable(
    hook: Callable[["sys.UnraisableHookArgs"], object], met: "sys.UnraisableHookArgs"
) -> None:
    closed = met.exc_type is RuntimeError and str(met.exc_value) == "Event loop is closed"
    if not (closed and met.object is None):
        hook(met)
