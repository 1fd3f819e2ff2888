"""Where a run's numbers go: metrics.jsonl, TensorBoard, wandb or trackio, tables, profiles."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Column
from rich.table import Table as RichTable

from vlm_jax.distributed import processes
from vlm_jax.errors import UserError, explained, first_line
from vlm_jax.files.atomic import write_whole

HOSTED = ("wandb", "trackio")  # packages with wandb's interface
ONLINE = ("online", "shared")  # wandb's modes that need a key
Writer = Callable[[int, Mapping[str, Any]], None]


class JsonLines:
    """One JSON object a line, whole after each write. Lines past `resume_step` are cut off.

    The others are in the file at any moment, whatever ends the process in the midst of it.
    last: the last object that was there before; {} where there was none.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self.last = _cut(path, resume_step) if resume_step is not None and path.exists() else {}
        self.file = open(path, "w" if resume_step is None else "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _cut(path: Path, step: int) -> dict[str, Any]:
    """Take the lines out of a file that are of later steps or not whole; return the last left."""
    old, kept, last = path.read_bytes(), [], {}
    for line in old.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed while writing
            continue
        if row["step"] <= step:
            kept.append(line + b"\n")
            last = row
    new = b"".join(kept)
    if old.startswith(new):
        os.truncate(path, len(new))  # takes no room on the disk
    else:
        write_whole(path, new)
    return last


def check_reporters(names: Sequence[str]) -> None:
    """Raise `UserError` where a reporter is not installed, or wandb has no account to write to."""
    for name in names:
        if name in HOSTED and importlib.util.find_spec(name) is None:
            raise UserError(
                f"training.report_to names '{name}', which is not installed: pip install "
                f"'vlm_jax[{name}]', or leave it out."
            )
    if "wandb" in names and processes.is_primary():
        wandb: Any = importlib.import_module("wandb")
        if wandb.setup().settings.mode in ONLINE:
            with _usable("wandb", "cannot log in"):
                wandb.login()


def _usable(name: str, what: str) -> contextlib.AbstractContextManager[None]:
    """Raise `UserError` with what to do where a reporter fails inside; each has its own errors."""
    remedy = (
        "Run `wandb login` or set WANDB_API_KEY; or set WANDB_MODE=offline, which writes into the "
        "run's directory for a later `wandb sync`; or leave wandb out of training.report_to."
        if name == "wandb"
        else f"Leave {name} out of training.report_to to train without it."
    )
    return explained(
        Exception,
        lambda error: (
            f"training.report_to names '{name}', which {what}: {first_line(error).rstrip('.')}. "
            f"{remedy}"
        ),
    )


class Reporter:
    """Takes the numbers of a run and writes none, as where another process speaks for this one."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of training metrics."""

    def write_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of evaluation results."""

    def evaluated(self, step: int) -> dict[str, float] | None:
        """Return what was written of an evaluation of this step before the run was resumed."""
        return None

    def close(self) -> None:
        """Finish what is being written."""


def open_log(directory: Path, report_to: Sequence[str], **options: Any) -> Reporter:
    """Return `Log` of these arguments in the first process, and a silent one in others."""
    return Log(directory, report_to, **options) if processes.is_primary() else Reporter()


class Log(Reporter):
    """Everything a run reports while it trains.

    directory: the run's. report_to: tensorboard, wandb, trackio, none. resume_step: None for a new
    run, else the step it resumes from. `check_reporters` first.
    """

    def __init__(
        self,
        directory: Path,
        report_to: Sequence[str],
        *,
        run_name: str | None = None,
        project: str = "vlm_jax",
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ):
        self.writers: list[Writer] = []
        with contextlib.ExitStack() as opened:
            self.metrics, self.evaluations = (
                opened.enter_context(
                    contextlib.closing(JsonLines(directory / f"{name}.jsonl", resume_step))
                )
                for name in ("metrics", "evaluations")
            )
            for name in report_to:
                if name == "tensorboard":
                    opened.callback(self._tensorboard(directory, resume_step))
                elif name in HOSTED:
                    opened.callback(self._hosted(name, directory, run_name, project, config or {}))
            self.opened = opened.pop_all()

    def _tensorboard(self, directory: Path, resume_step: int | None) -> Callable[[], Any]:
        from tensorboardX import SummaryWriter

        with _usable("tensorboard", "cannot write"):
            board = SummaryWriter(
                str(directory / "tensorboard"),
                purge_step=None if resume_step is None else resume_step + 1,
            )

        def write(step: int, values: Mapping[str, Any]) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self.writers.append(write)
        return board.close

    def _hosted(
        self,
        name: str,
        directory: Path,
        run_name: str | None,
        project: str,
        config: Mapping[str, Any],
    ) -> Callable[[], Any]:
        module: Any = importlib.import_module(name)
        # Else wandb writes where the command was given; trackio has a place of its own.
        place = {"dir": os.environ.get("WANDB_DIR") or str(directory)} if name == "wandb" else {}
        with _usable(name, "cannot start"):
            module.init(
                project=project, name=run_name or directory.name, config=dict(config), **place
            )
        self.writers.append(lambda step, values: module.log(dict(values), step=step))
        return module.finish

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._write(self.metrics, "train", step, values)

    def write_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        self._write(self.evaluations, "eval", step, values)

    def _write(self, lines: JsonLines, kind: str, step: int, values: Mapping[str, Any]) -> None:
        lines.write(step, values)
        for publish in self.writers:
            publish(step, {f"{kind}/{name}": value for name, value in values.items()})

    def evaluated(self, step: int) -> dict[str, float] | None:
        values = dict(self.evaluations.last)
        return values if values.pop("step", None) == step else None

    def close(self) -> None:
        self.opened.close()


class Meter:
    """Sums of the steps since the last logged one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.loss = self.tokens = self.waited = 0.0
        self.start = time.perf_counter()

    def add(self, loss: float, tokens: float) -> None:
        self.loss, self.tokens = self.loss + loss * tokens, self.tokens + tokens

    def leave_out(self, seconds: float) -> None:
        """Take time off that was spent on neither steps nor data, as compiling and evaluating."""
        self.start += seconds

    def wait(self, seconds: float) -> None:
        """Count time in which the loop waited for a batch."""
        self.waited += seconds

    def read(self) -> dict[str, float]:
        """Return the mean loss and the answer tokens, in all and per second; reset them.

        data_wait: the share of the time in which the loop waited for a batch.
        """
        seconds = max(time.perf_counter() - self.start, 1e-9)
        values = {
            "loss": self.loss / max(self.tokens, 1e-9),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / seconds,
            "data_wait": round(self.waited / seconds, 4),
        }
        self.reset()
        return values


class Lines(Console):
    """A console of plain lines: whole ones in a log, broken at words on a terminal.

    Nothing in them is markup: a path may hold brackets.
    """

    def __init__(self) -> None:
        super().__init__(markup=False)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print as `Console` does; soft_wrap: where this is not a terminal, do not break lines."""
        super().print(*objects, soft_wrap=soft_wrap and not self.is_terminal, **options)


def say(console: Console, words: str) -> None:
    """Print a line as it is: no number is coloured, and no log breaks it."""
    console.print(words, highlight=False, soft_wrap=True)


def numbers(values: Mapping[str, Any]) -> str:
    """Return one line's worth of metrics for people."""
    return (
        f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
        f"{values['tokens_per_second']:,.0f} answer tokens/s"
    )


def print_report(console: Console, rows: Sequence[Mapping[str, Any]], line: str) -> None:
    """Print the table of what trains and PEFT's line."""
    right = (Column(name, justify="right") for name in ("parameters", "learning rate"))
    table = RichTable("component", "trains", *right, title="What trains", title_justify="left")
    for row in rows:
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        table.add_row(row["component"], row["trains"], f"{row['parameters']:,d}", rate)
    console.print(table)
    say(console, line)


def write_skipped(file: Path, skipped: Iterable[Any]) -> None:
    """Write the records that no process could use, one a line; no file where there are none."""
    known = processes.gather("skipped", [dataclasses.asdict(one) for one in skipped])
    lines = {one["index"]: json.dumps(one) + "\n" for found in known for one in found}
    if lines and processes.is_primary():
        file.write_text("".join(lines.values()), encoding="utf-8")


class Profiler(contextlib.AbstractContextManager["Profiler"]):
    """Writes a trace of some steps, `jax.profiler`'s, which TensorBoard and Perfetto show.

    steps: "10-13", or "" for none. Closed where the run ends within.
    """

    def __init__(self, steps: str, directory: Path, console: Console):
        first, _, last = steps.partition("-")
        self.first, self.last = (int(first) - 1, int(last or first)) if steps else (-1, -1)
        self.directory, self.console, self.running = directory, console, False

    def start(self, step: int) -> None:
        """Begin where a run begins within the steps."""
        if self.first <= step < self.last:
            self.toggle(step)

    def at(self, step: int) -> bool:
        """Return whether it begins or ends behind this step."""
        return step == (self.last if self.running else self.first)

    def toggle(self, step: int) -> None:
        if not self.running:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # of Python's calls, which slow a step many times
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
        else:
            jax.profiler.stop_trace()
            say(self.console, f"Wrote the profile until step {step} to '{self.directory}'.")
        self.running = not self.running

    def __exit__(self, *error: Any) -> None:
        if self.running:
            jax.profiler.stop_trace()
