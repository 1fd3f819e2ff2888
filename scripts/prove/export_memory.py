"""Merge LoRA into a Qwen2-VL-2B-shaped base of random weights and write it: what memory is taken?

    python scripts/prove/export_memory.py [DIR]

Needs 10 GB of disk and of memory. Exits with 1 where writing takes more memory than one file of the
checkpoint and one weight in float32 beside what it is written from.
"""

import sys
import tempfile
import time
from pathlib import Path

import jax
from load_in_4bit import peak, write_checkpoint

import vlm_jax
from vlm_jax.adapters.targets import PRESETS
from vlm_jax.trees import flatten

FILE = 1_000_000_000  # bytes of one file
MARGIN = 1_000_000_000  # float32 copies of the largest weight, temporaries, what malloc keeps


def forget_peak() -> None:
    """Let `peak` count from what the process holds now: making the base took more than all else."""
    Path("/proc/self/clear_refs").write_text("5")


def main(directory: Path) -> int:
    base, out = directory / "base", directory / "merged"
    if not base.is_dir():
        write_checkpoint(base)
    forget_peak()
    model, params = vlm_jax.load(str(base), "bfloat16")
    loading = peak()
    lora = vlm_jax.LoRA(rank=64, alpha=64, targets=PRESETS["llama"])
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    forget_peak()
    before = peak()
    start = time.perf_counter()
    vlm_jax.save_pretrained(model, params, out, max_shard_size=FILE)
    took, seconds = peak() - before, time.perf_counter() - start
    held = sum(leaf.nbytes for leaf in flatten(params).values())
    print(
        f"{held / 1e9:.2f} GB of parameters; loading them took at most {loading / 1e9:.2f} GB, and "
        f"merging and writing {took / 1e9:.2f} GB more than the {before / 1e9:.2f} GB before, in "
        f"{seconds:.0f} s"
    )
    return int(took > FILE + MARGIN)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory(prefix="export_memory.") as name:
        sys.exit(main(Path(name)))
