"""Proves that a run which is killed, told to stop, or out of disk loses nothing but a few steps.

    bash scripts/prove/kills.sh [--kills 20] [--terms 20]

A small run is done once without a stop, then again under SIGKILL and SIGTERM at random moments,
saving included, each time resumed. After each: the checkpoints can be read, SIGKILL costs fewer
than 2 x save_steps steps, SIGTERM none once a step has been done. In the end every logged number
and every byte of the adapter must be equal. Then the same on a file system that is too small for
its checkpoints: the run must end by itself, keep its last good one, and go on when there is room.
Exit code 0 where all of it holds.
"""

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets" / "qwen2_vl_tiny_scenes"
STEPS, SAVE = 240, 4  # of the run, and between checkpoints
SAME = ("step", "loss", "learning_rate", "grad_norm", "tokens", "epoch")
INTERRUPTED = 130


def write_data(folder: Path, count: int = 40) -> Path:
    """Write pictures of one color each, and questions about it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        name = ("red", "green", "blue")[number % 3]
        pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
        pixels[:, :, number % 3] += 180
        Image.fromarray(pixels).save(folder / f"{number}.png")
        turns = [("human", "<image>\nWhat color is it?"), ("gpt", name)]
        talk = [{"from": role, "value": text} for role, text in turns]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": talk})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(data: Path, output: Path, log: Path | None = None) -> subprocess.Popen:
    settings = {
        "model.name_or_path": BASE,
        "data.train_file": data,
        "lora.r": 4,
        "training.output_dir": output,
        "training.max_steps": STEPS,
        "training.save_steps": SAVE,
        "training.save_total_limit": 3,
        "training.logging_steps": 1,
        "training.per_device_train_batch_size": 2,
        "training.bf16": "false",
        "training.report_to": "none",
        "mesh.devices": 1,
    }
    config = data.with_name("run.yaml")
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    command = [sys.executable, "-m", "vlm_jax", "train", "--config", str(config)]
    if (output / "config.json").exists():
        command.append("--resume")
    out = subprocess.DEVNULL if log is None else open(log, "w")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=out, cwd=ROOT)


def logged(output: Path) -> int:
    """Return the last step whose whole line stands in metrics.jsonl."""
    file = output / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def newest(output: Path) -> int:
    """Return the newest checkpoint, having read every one of them."""
    import orbax.checkpoint as ocp

    if not (output / "checkpoints").is_dir():
        return 0
    items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
    with ocp.CheckpointManager(output / "checkpoints") as manager:
        for step in manager.all_steps():
            whole = manager.restore(step, args=items)
            assert whole["state"] and whole["meta"]["data"] is not None
        return manager.latest_step() or 0


def result(output: Path) -> tuple[list, dict[str, bytes]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    files = {path.name: path.read_bytes() for path in (output / "adapter").glob("*.safetensors")}
    assert files
    return [[row[key] for key in SAME] for row in rows], files


def under_signals(
    data: Path, place: Path, kills: int, terms: int, seconds: float, straight: tuple
) -> bool:
    """Train with so many of each signal in random order; return whether each cost what it may.

    Each reaches a run at work; one that ends before all were sent is followed by another. All of
    them must end as the straight run.
    """
    pending = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    random.shuffle(pending)
    good, runs, number = True, 1, 0
    share = seconds / max(1, len(pending))
    while pending:
        output = place / str(runs)
        before, running = logged(output), start(data, output)
        # From the first step on, so that each start gets on, and then at any moment.
        while logged(output) <= before and running.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, share))
        told = running.poll() is None
        if told:
            kind, number = pending.pop(), number + 1
            running.send_signal(kind)
            code, reached, kept = running.wait(), logged(output), newest(output)
            lost = reached - kept
            fine = lost < 2 * SAVE if kind == signal.SIGKILL else lost == 0
            if kind == signal.SIGTERM:
                # All steps done, it may be told while the result is written, which a resume does
                # again.
                fine &= code == INTERRUPTED if reached < STEPS else code in (0, -kind)
            good &= fine
            print(
                f"{number:3d} {kind.name}: run {runs}, exit {code}, step {reached}, checkpoint "
                f"{kept}, {lost} lost{'' if fine else '  NOT AS PROMISED'}",
                flush=True,
            )
        if not told and running.wait() != 0:
            print(f"Run {runs} ended by itself with {running.wait()}.")
            return False
        if running.wait() == 0 or not pending:
            ended = running.wait() == 0 or start(data, output).wait() == 0
            same = ended and result(output) == straight
            words = "are equal to the byte." if same else "DIFFER."
            print(f"Run {runs} ended: metrics and adapter {words}", flush=True)
            good, runs = good and same, runs + 1
    return good


def on_a_full_disk(data: Path, place: Path, straight: tuple) -> bool:
    """Train where the disk fills up, then with room; return whether nothing was lost."""
    place.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(place)], check=True)

    try:
        mount("-o", "size=64M")
    except (OSError, subprocess.CalledProcessError):
        print("No file system could be mounted here: the full disk was not tried.")
        return True
    try:
        output, log = place / "run", place.parent / "full.log"
        running = start(data, output, log)
        while newest_name(output) < 2 * SAVE and running.poll() is None:
            time.sleep(0.05)
        _fill(place / "other")
        code = running.wait()
        kept = newest(output)
        (place / "other").unlink()
        told = [line for line in log.read_text().splitlines() if "no room left" in line]
        print(f"Full disk: exit {code}, checkpoint {kept} can be read. It said: {told}")
        after = start(data, output).wait()
        same = after == 0 and result(output) == straight
        print(f"With room again it {'ends as the straight run' if same else 'DIFFERS'}.")
        return code == 2 and bool(told) and kept >= SAVE and same
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def _fill(file: Path) -> None:
    """Write into a file until its disk is full; the run writes too, so what is free may change."""
    free = os.statvfs(file.parent)
    with open(file, "wb", buffering=0) as other:
        try:
            other.write(b"\0" * max(0, free.f_bavail * free.f_frsize - 8192))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def newest_name(output: Path) -> int:
    """Return the newest checkpoint by its name alone."""
    names = [path.name for path in (output / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    global STEPS
    STEPS = options.steps
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills.") as name:
        folder = Path(name)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        data = write_data(folder / "data")
        for output in (folder / "warm", folder / "straight"):  # the second one does not compile
            running = start(data, output)
            while logged(output) == 0 and running.poll() is None:
                time.sleep(0.01)
            begin = time.perf_counter()
            if running.wait() != 0:
                return 1
        seconds = time.perf_counter() - begin
        straight = result(folder / "straight")
        counts = options.kills, options.terms
        good = under_signals(data, folder / "killed", *counts, seconds, straight)
        full = on_a_full_disk(data, folder / "small", straight)
    return 0 if good and full else 1


if __name__ == "__main__":
    raise SystemExit(main())
