"""Load a Qwen2-VL-2B-shaped checkpoint of random weights in 4 bits: memory and speed.

Needs the test extra (bitsandbytes, for comparison) and 5 GB of disk: `python
scripts/prove/load_in_4bit.py [DIR]`. Exits with 1 where a bound is not met.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

import vlm_jax
from vlm_jax.files.atomic import write_json, write_shards
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.names import disk_places
from vlm_jax.quantization import summary
from vlm_jax.trees import flatten
from vlm_jax.weights import NF4, FourBit
from vlm_jax.weights.packing import pack
from vlm_jax.weights.quantize import encode

BASE = "Qwen/Qwen2-VL-2B-Instruct"
MARGIN = 2e9  # bytes above the quantized size that the process may take
SPEED = 150e6  # parameters a second, on two cores


def write_checkpoint(directory: Path) -> None:
    """Write random bf16 weights in shards of 2 GB."""
    model = vlm_jax.from_config(KNOWN[BASE], "bfloat16")
    shapes = {path: leaf.shape for path, leaf in flatten(model.abstract()).items()}
    places = disk_places(model, shapes)
    rng = np.random.default_rng(0)
    some = (rng.standard_normal(1 << 24) * 0.02).astype(ml_dtypes.bfloat16)

    def tensor(name: str) -> np.ndarray:
        size = int(np.prod(places[name].shape))
        start = int(rng.integers(0, 1 << 20))
        return np.resize(some[start:], size).reshape(places[name].shape)

    directory.mkdir(parents=True, exist_ok=True)
    sizes = {name: 2 * int(np.prod(place.shape)) for name, place in places.items()}
    write_shards(directory, sizes, tensor, shard_bytes=2_000_000_000)
    write_json(directory / "config.json", KNOWN[BASE])


def peak() -> int:
    """Return the most memory that this process has held, in bytes; pages of files count too.

    Not getrusage's: a child inherits its parent's.
    """
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return int(line.split()[1]) * 1024


def load(directory: str) -> None:
    """Load in a process of its own and print its figures as JSON."""
    before = peak()
    start = time.perf_counter()
    model, params = vlm_jax.load(directory, "bfloat16", quantize="nf4-dq")
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    leaves = flatten(params).values()
    values = {
        "seconds": seconds,
        "peak": peak(),
        "before": before,
        "size": sum(leaf.nbytes for leaf in leaves),
        "quantized": sum(int(np.prod(leaf.shape)) for leaf in leaves if isinstance(leaf, FourBit)),
        "summary": summary(model, params),
    }
    print(json.dumps(values))


def speeds(shape: tuple[int, int], rounds: int = 5) -> tuple[float, float]:
    """Return parameters a second of quantizing a weight [out, in], ours and bitsandbytes'."""
    import bitsandbytes.functional
    import torch

    weight = (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(ml_dtypes.bfloat16)
    theirs = torch.tensor(weight.astype(np.float32)).to(torch.bfloat16)
    best = [float("inf"), float("inf")]
    for _ in range(rounds + 1):  # the first compiles
        start = time.perf_counter()
        pack(encode(NF4, weight, 64, True, "a weight"), shape[::-1], 64)
        best[0] = min(best[0], time.perf_counter() - start)
    for _ in range(rounds):
        start = time.perf_counter()
        bitsandbytes.functional.quantize_4bit(theirs, quant_type="nf4", compress_statistics=True)
        best[1] = min(best[1], time.perf_counter() - start)
    size = shape[0] * shape[1]
    return size / best[0], size / best[1]


def main(place: str) -> int:
    directory = Path(place)
    if not (directory / "config.json").exists():
        write_checkpoint(directory)
    disk = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    output = subprocess.run(
        [sys.executable, __file__, "--load", place],
        check=True, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ).stdout  # fmt: skip
    found = json.loads(output.splitlines()[-1])
    print(*found["summary"], sep="\n")
    print(
        f"{disk / 1e9:.2f} GB on disk, {found['size'] / 1e9:.2f} GB loaded, peak of the process "
        f"{found['peak'] / 1e9:.2f} GB (of which {found['before'] / 1e9:.2f} GB before), "
        f"{found['seconds']:.1f} s"
    )
    ours, theirs = speeds((8960, 1536))
    print(f"quantizing: {ours / 1e6:.0f} M parameters/s, bitsandbytes {theirs / 1e6:.0f} M/s")
    good = found["peak"] <= found["size"] + MARGIN and ours >= max(SPEED, theirs)
    print("all bounds are met" if good else "a bound is not met")
    return 0 if good else 1


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2])
    elif len(sys.argv) > 1:
        sys.exit(main(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(main(folder))
