"""Proves that a run killed at random moments and resumed equals one that never stopped.

    python scripts/prove/kill_and_resume.py --config FILE [--kills 10] [--config.section.key=v ...]

Trains once without a stop, then again under `kill -9` at random moments until it ends, and
compares every logged number and every byte of the adapter. Exit code 0 where all are equal.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAME = ("step", "loss", "learning_rate", "grad_norm", "tokens", "epoch")


def train(config: str, output: Path, overrides: list[str], resume: bool) -> subprocess.Popen:
    command = [sys.executable, "-m", "vlm_jax", "train", "--config", config, *overrides]
    command.append(f"--config.training.output_dir={output}")
    if resume:
        command.append("--resume")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def read(directory: Path) -> tuple[list, dict[str, bytes]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    result = next(path for name in ("adapter", "model") if (path := directory / name).is_dir())
    files = {path.name: path.read_bytes() for path in sorted(result.glob("*.safetensors"))}
    return [[row[key] for key in SAME] for row in rows], files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args()
    random.seed(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_and_resume."))
    start = time.perf_counter()
    if train(options.config, folder / "straight", overrides, False).wait() != 0:
        return 1
    seconds = time.perf_counter() - start
    kills, output = 0, folder / "killed"
    while True:
        resume = (output / "config.json").exists()
        running = train(options.config, output, overrides, resume)
        try:
            last = kills >= options.kills
            code = running.wait(None if last else random.uniform(0.2, 1.0) * seconds)
            break
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            kills += 1
            names = [path.name for path in (output / "checkpoints").glob("*")]
            saved = sorted(int(name) for name in names if name.isdigit())
            print(f"kill {kills}: checkpoints {saved}", flush=True)
    if code != 0:
        return 1
    (rows, files), (others, other_files) = read(folder / "straight"), read(output)
    print(f"{kills} kills; metrics equal: {rows == others}; tensors equal: {files == other_files}")
    return 0 if rows == others and files == other_files else 1


if __name__ == "__main__":
    raise SystemExit(main())
