"""Ctrl-C and SIGTERM: heard at once, whatever the main thread does, and what they do to a run."""

import ctypes
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from runs import make_config, run

from vlm_jax import config
from vlm_jax.distributed.interrupts import on_signal
from vlm_jax.train import loop, preemption


def test_a_signal_goes_to_the_innermost_block():
    heard, before = [], signal.getsignal(signal.SIGINT)
    with on_signal(lambda n: heard.append(("outer", n))) as outside:
        with on_signal(lambda n: heard.append(("inner", n))) as around:
            signal.raise_signal(signal.SIGTERM)
        around(signal.SIGINT)
    assert set(heard) == {("inner", signal.SIGTERM), ("outer", signal.SIGINT)}
    with pytest.raises(KeyboardInterrupt):
        outside(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_it_is_heard_while_the_main_thread_is_in_c():
    heard = []

    def kill():
        time.sleep(0.05)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    start = time.monotonic()
    with on_signal(lambda n: heard.append((threading.current_thread().name, time.monotonic()))):
        threading.Thread(target=kill).start()
        ctypes.CDLL(None).usleep(600_000)  # as a compiler, it lets no handler run
    name, when = heard[0]
    assert name == "signals" and when - start < 0.4


@pytest.mark.parametrize("seconds", [0.4, 1.2])
def test_ctrl_c_in_the_first_seconds(place, tmp_path, seconds):
    made = make_config(place / "base", place / "data/train.jsonl", tmp_path / "out/run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict(made)))
    command = [sys.executable, "-m", "vlm_jax", "train", "--config", str(recipe)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "Stopped; nothing more was saved.\n")
    assert not (tmp_path / "out").exists()


def signalled(monkeypatch, numbers):
    """Have a run get signals in its second step."""
    push = loop.Watch.push

    def push_and_signal(self, step, *rest):
        if step == 2:
            for number in numbers:
                signal.raise_signal(number)
        return push(self, step, *rest)

    monkeypatch.setattr(loop.Watch, "push", push_and_signal)


def test_signals_that_are_repeated_are_one(place, tmp_path, monkeypatch):
    """As schedulers do that signal a process and its group."""
    signalled(monkeypatch, [signal.SIGTERM, signal.SIGTERM, signal.SIGINT])
    outcome, directory, _ = run(place, tmp_path / "out")
    assert outcome["interrupted"] and (directory / "checkpoints/2").is_dir()


def test_only_a_later_ctrl_c_gives_the_save_up(place, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "GRACE", -1.0)
    signalled(monkeypatch, [signal.SIGTERM, signal.SIGTERM])
    assert run(place, tmp_path / "one")[0]["interrupted"]
    # One alone, which Python's handler brings behind the thread that hears it at once.
    signalled(monkeypatch, [signal.SIGINT])
    assert run(place, tmp_path / "two")[0]["interrupted"]
    signalled(monkeypatch, [signal.SIGTERM, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "other")
