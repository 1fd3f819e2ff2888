"""Proves that a run on 1,000,000 conversations takes its first step within 60 s and 2 GB.

    python scripts/prove/million_rows.py [--rows 1000000]

The data (about 1 GB of JSONL, images among them) is indexed and never loaded. Time is that of
`vlm-jax train` with max_steps=1 on the tiny base, from its start to its end, adapter written; memory
is the most that its process held.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import data_files

SECONDS, BYTES = 60, 2e9
RUN = """
import sys
from pathlib import Path
from vlm_jax.cli import main
code = main(sys.argv[1:])
line = next(s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
print("peak", line.split()[1])
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory(prefix="million_rows.") as name:
        folder = Path(name)
        data = data_files.write_records(folder, 1000, pictures=8)
        lines = data.read_text().splitlines()
        with data.open("w") as file:
            for number in range(rows):
                text = lines[number % 1000].replace(f'"c{number % 1000}"', f'"r{number}"', 1)
                file.write(text + "\n")
        print(f"{rows:,} rows, {data.stat().st_size / 1e9:.2f} GB")
        settings = {
            "model.name_or_path": data_files.TINY,
            "data.train_file": data,
            "data.max_seq_length": 1024,
            "training.output_dir": folder / "run",
            "training.max_steps": 1,
            "training.per_device_train_batch_size": 4,
            "lora.r": 4,
        }
        config = folder / "config.yaml"
        config.write_text("{}\n")
        keys = [f"--config.{key}={value}" for key, value in settings.items()]
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", RUN, "train", "--config", str(config), *keys],
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if run.returncode:
            print(run.stdout)
            return 1
        peak = 1024 * int(run.stdout.rsplit("peak ", 1)[1])
        print(f"first step done after {seconds:.1f} s with {peak / 1e9:.2f} GB at most")
        return 0 if seconds < SECONDS and peak < BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
