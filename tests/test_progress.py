"""What a person sees of a run while it goes on, on a terminal of 80 columns and in a log file."""

import io
import re
from types import SimpleNamespace

from rich.console import Console
from runs import make_config

from vlm_jax.train import progress
from vlm_jax.train.loop import train
from vlm_jax.train.progress import Bar, Doing

LINE = {"step": 2, "loss": 1.5, "learning_rate": 1e-4, "tokens_per_second": 1234.5}


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def shown(console):
    """Return the lines that were drawn, without colors."""
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "\n", console.file.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def drawn(console):
    """Return the last thing drawn, all in one line."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\r", "", console.file.getvalue()).split("\n")[-1]


def test_the_bar_counts_each_step_and_foretells_the_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    console = terminal()
    doing, stopping = Doing(console), []
    bar = Bar(doing, 10, 0, lambda: bool(stopping))

    def look():
        console.file.truncate(0)
        console.file.seek(0)
        bar.bar.refresh()
        text = drawn(console)
        assert len(text) <= 80 and "…" not in text
        return text

    with bar.drawn():
        assert " 0/10 " in look() and "ETA -:--:--" in look()
        bar.stepped(1, None)
        assert " 1/10 " in look() and "ETA -:--:--" in look()
        now[0] += 33.0  # of which the step took three
        bar.stepped(2, 2.25, left_out=30.0)
        assert " 2/10 loss 2.2500 ETA 0:00:24" in look()
        bar.line(LINE)
        assert "loss 2.2500  1,234 tokens/s" in look()
        with doing("compiling 2048 x 8192 to evaluate, 2 of 3 shapes"):
            now[0] += 12
            assert "compiling 2048 x 8192 to evaluate, 2 of 3 shapes  12 s" in look()
        with doing("evaluating", line=False):
            doing.say("evaluating 12/30")
            assert look().startswith("evaluating 12/30  0 s")
        assert look().startswith("train ")
        stopping.append(True)
        assert look().startswith("stopping ")


def test_a_log_file_has_few_lines():
    console = Console(file=io.StringIO(), width=80)
    doing = Doing(console)
    bar = Bar(doing, 10, 0, lambda: False)
    with doing("compiling 112 x 256, 1 of 3 shapes"):
        pass
    with bar.drawn():
        bar.stepped(1, None)
        bar.stepped(2, 1.5)
        bar.line(LINE)
        with doing("evaluating", line=False):
            doing.say("evaluating 12/30")
    assert console.file.getvalue().splitlines() == [
        "compiling 112 x 256, 1 of 3 shapes",
        "step 2/10  loss 1.5000  lr 1.00e-04  1,234 answer tokens/s",
    ]


def test_a_run_on_a_terminal(place, tmp_path):
    data = place / "data/train.jsonl"
    made = make_config(
        place / "base", data, tmp_path / "out", "data.max_shapes=2", f"data.eval_file={data}",
        "evaluation.max_new_tokens=3",
    )  # fmt: skip
    console = terminal()
    train(made, console=console)
    text = shown(console)
    assert any(re.match(r"compiling \d+ x \d+, 1 of 2 shapes  \d s", line) for line in text)
    assert any("compiling" in line and "2 of 2 shapes" in line for line in text)
    bars = [line for line in text if re.search(r"\d/4 ", line)]
    assert "4/4" in bars[-1] and "loss" in bars[-1]
    (found,) = [line for line in text if "evaluation:" in line]
    assert re.fullmatch(r"step 4/4  evaluation: loss [\d.]+, \d+ of 12 right, \d+ s", found)
