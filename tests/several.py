"""Runs of several processes on this machine: started, waited for, and never left behind."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 400  # seconds; only a process that hangs uses them up
OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def environment(devices: int, **more: str) -> dict[str, str]:
    """Return the environment of a process with so many devices, alone unless `more` says else."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    flags = os.environ.get("XLA_FLAGS", "").split()  # the session's, but for its eight devices
    flags = [flag for flag in flags if "device_count" not in flag]
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        "VLM_JAX_HEARTBEAT_TIMEOUT": "200",  # a machine may stand still for a while
        **more,
    }


class Started:
    """One process of a run; what it prints goes to files, since a pipe could fill or leak."""

    def __init__(self, arguments: Sequence[str], output: Path, env: dict[str, str]):
        self.output = output
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stdout=file, stderr=file, env=env
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, words: str) -> None:
        """Wait until it, or who speaks for it after its end, has said these words."""
        end = time.monotonic() + PATIENCE
        while words not in self.text:
            assert time.monotonic() < end, self.text
            time.sleep(0.05)

    def ended(self) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(PATIENCE)


def started(place: Path, config: Path, name: str, count: int, *options: str, devices=8, **env: str):
    """Start `vlm-jax train` in `count` processes of `devices` in all; kill what is left after."""
    output = f"--config.training.output_dir={place / name}"
    train = ("-m", "vlm_jax", "train", f"--config={config}", output, *options)
    return programs(place, train, name, count, devices=devices, **env)


@contextlib.contextmanager
def programs(place: Path, arguments: Sequence[str], name: str, count: int, devices=8, **env: str):
    """Start Python with these arguments in `count` processes, as `started` does."""
    port, processes = free_port(), []
    try:
        for number in range(count):
            own = dict(
                zip(OURS, (f"localhost:{port}", str(count), str(number)), strict=True)
            ) if count > 1 else {}  # fmt: skip
            output = place / f"{name}.{number}.log"
            full = environment(devices // count, **own, **env)
            processes.append(Started(arguments, output, full))
        yield processes
    finally:
        for one in processes:
            one.process.kill()
        for one in processes:
            one.process.wait()


def wait_until(condition, processes) -> None:
    """Wait until a condition holds; fail where a process ends before, with what it printed."""
    end = time.monotonic() + PATIENCE
    while not condition():
        for one in processes:
            assert one.process.poll() is None, one.text
        assert time.monotonic() < end, [one.text for one in processes]
        time.sleep(0.02)


def written(path: Path) -> int:
    """Return how many whole lines a file has."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
