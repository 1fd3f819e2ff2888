"""Proves that killed data pipelines go on with the very next example, whoever reads them.

    python scripts/prove/data_resume.py [--kills 20]

A process that reads batches and notes each one's examples, bytes and next position is killed by
SIGKILL at random moments; each time another one goes on from the last position noted, with 0 or 2
worker processes, as one host or two. All that was noted must equal a run that never stopped.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import data_files
import numpy as np

from vlm_jax.data import Pipeline

STEPS = 120


def read(folder: Path, log: Path, steps: int, workers: int, hosts: int) -> None:
    """Append a line a batch to the log, from its last whole line on."""
    lines = log.read_text().splitlines() if log.exists() else []
    state = json.loads(lines[-1])["after"] if lines else None
    readers = [
        Pipeline(
            folder / "base",
            folder / "data" / "data.jsonl",
            rows=4,
            max_length=2048,
            packing=True,
            seed=3,
            workers=workers,
            process_index=host,
            process_count=hosts,
        ).batches(state)
        for host in range(hosts)
    ]
    with log.open("a") as file:
        for _ in range(len(lines), steps):
            parts = [next(reader) for reader in readers]
            digest = hashlib.sha256()
            each = [batch for batch, *_ in parts]
            for name, array in vars(each[0]).items():
                if array is not None:
                    rows = np.concatenate([getattr(batch, name) for batch in each])
                    digest.update(rows.tobytes())
            line = {"ids": [name for _, ids, _ in parts for name in ids], "after": parts[0][2]}
            file.write(json.dumps({**line, "digest": digest.hexdigest()}) + "\n")
            file.flush()
    for reader in readers:
        reader.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", nargs=4, metavar=("FOLDER", "LOG", "WORKERS", "HOSTS"))
    options = parser.parse_args()
    if options.read:
        folder, log, workers, hosts = options.read
        read(Path(folder), Path(log), options.steps, int(workers), int(hosts))
        return 0
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="data_resume.") as name:
        folder = Path(name)
        data_files.write_checkpoint(folder / "base")
        data_files.write_records(folder / "data", 12 * options.steps, pictures=24)
        straight, killed = folder / "straight.jsonl", folder / "killed.jsonl"
        start = time.perf_counter()
        read(folder, straight, options.steps, 0, 1)
        seconds = time.perf_counter() - start
        kills = 0
        while True:
            workers, hosts = random.choice((0, 2)), random.choice((1, 2))
            command = [sys.executable, __file__, "--steps", str(options.steps), "--read"]
            running = subprocess.Popen([*command, *map(str, (folder, killed, workers, hosts))])
            try:
                last = kills >= options.kills
                # Time to start, and a share of the reading.
                running.wait(None if last else 8 + random.uniform(0, 2 * seconds / options.kills))
                break
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
                kills += 1
                text = killed.read_text() if killed.exists() else ""
                killed.write_text(text[: text.rfind("\n") + 1])  # a line cut short was not noted
                done = text.count("\n")
                print(f"kill {kills} (workers {workers}, hosts {hosts}): {done} steps", flush=True)
        lines, others = (path.read_text().splitlines() for path in (straight, killed))
        same = lines == others
        for number, (line, other) in enumerate(zip(lines, others, strict=False), start=1):
            if line != other:
                print(f"step {number}:\n  {line}\n  {other}")
                break
        examples = sum(len(json.loads(line)["ids"]) for line in lines)
        print(
            f"{kills} kills; {len(lines)} steps of {examples} examples "
            f"{'are equal to the byte' if same else 'DIFFER'}"
        )
        return 0 if same and running.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
