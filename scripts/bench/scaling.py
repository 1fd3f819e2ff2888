"""How a training step's time and memory grow: compiled for TPU chips, one size at a time.

    python scripts/bench/scaling.py [--only tokens rank ...] [--chip v5e] [--json FILE]

Needs no TPU: `pip install "vlm_jax[plan]"`. A small Qwen2-VL of 512 wide is compiled some times for
each of tokens, patches, images a row, rows, rank, layers and chips, everything else as it was. The
exponent is that of the power of the size that fits best: 1 is as much as the size, 2 its square;
of chips it is that of one chip's share, and near 0 where work is shared out evenly. Cycles are the
compiler's and the kernels' bundles. Memory is what a step needs besides its arguments.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vlm_jax import config
from vlm_jax.hardware import hardware
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.plan import kernels
from vlm_jax.plan.program import memory, parse
from vlm_jax.plan.schedule import schedule
from vlm_jax.plan.step import prepare
from vlm_jax.plan.topologies import devices


class Setting(NamedTuple):
    """A step's sizes. rows: of one chip. patches: of one image."""

    tokens: int = 1024
    patches: int = 256
    images: int = 1
    rows: int = 1
    rank: int = 16
    layers: int = 4
    chips: int = 1


SWEEPS: dict[str, tuple[int, ...]] = {
    "tokens": (1024, 2048, 4096),
    "patches": (256, 1024, 4096),
    "images": (1, 4, 16),
    "rows": (1, 2, 4),
    "rank": (16, 64, 256),
    "layers": (4, 8, 16),
    "chips": (1, 4, 8),
}
# What stands still while a size grows: images are large, so that they are what a row costs; a
# row's length leaves room for theirs.
STILL: dict[str, dict[str, int]] = {
    "patches": {"tokens": 2048},
    "images": {"tokens": 4096, "patches": 1024},
}
MEASURES = ("cycles", "temporary", "arguments")


def checkpoint(directory: Path, layers: int) -> Path:
    """Write the config.json of a small Qwen2-VL, and return its directory."""
    tree: dict[str, Any] = {**KNOWN["Qwen/Qwen2-VL-7B-Instruct"]}
    tree |= {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192,
        "image_token_id": 8000, "video_token_id": 8001,
    }  # fmt: skip
    vision = {"depth": 4, "embed_dim": 320, "num_heads": 4, "hidden_size": 512}
    tree["vision_config"] = {**tree["vision_config"], **vision}
    place = directory / f"{layers}"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return place


def measure(setting: Setting, chip: str, directory: Path) -> dict[str, int]:
    """Return {measure: of one chip} of a step, compiled."""
    machine = hardware(f"{chip}-{setting.chips}")
    changes = {
        "model.name_or_path": str(checkpoint(directory, setting.layers)),
        "data.max_seq_length": setting.tokens,
        "data.max_pixels": setting.patches * 14 * 14,
        "lora.r": setting.rank,
        "mesh.auto": False,
        "mesh.fsdp": setting.chips,
    }
    step = prepare(
        config.load(None, changes), devices(machine.topology), rows=setting.rows * setting.chips,
        tokens=setting.tokens, patches=setting.patches * setting.images,
    )  # fmt: skip
    compiled = step.compile()
    program, entry = parse(compiled)
    timing = kernels.timing(program, machine.device, setting.images)
    own = memory(compiled)
    return {
        "cycles": sum(one.total for one in schedule(program, entry, timing)),
        "temporary": own.temporary,
        "arguments": own.arguments,
    }


def exponent(sizes: Sequence[float], amounts: Sequence[float]) -> float:
    """Return the e of the least squares of log(amount) = e log(size) + c."""
    xs, ys = ([math.log(value) for value in side] for side in (sizes, amounts))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def table(found: dict[str, list[dict[str, int]]]) -> str:
    """Return the exponents of each sweep, and its numbers, in 80 columns."""
    lines = [f"{'grows':10}{'from, to':>14}" + "".join(f"{name:>17}" for name in MEASURES)]
    for name, points in found.items():
        sizes = [point["size"] for point in points]
        fitted = (exponent(sizes, [point[one] for point in points]) for one in MEASURES)
        ends = f"{sizes[0]:,}, {sizes[-1]:,}"
        lines.append(f"{name:10}{ends:>14}" + "".join(f"{value:17.2f}" for value in fitted))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(SWEEPS), choices=SWEEPS, metavar="SIZE")
    parser.add_argument("--chip", default="v5e", metavar="NAME", help="v5e or v5p")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, int]]] = {}
    known: dict[Setting, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="vlm_jax.scaling.") as directory:
        for name in options.only:
            for size in SWEEPS[name]:
                setting = Setting(**{**STILL.get(name, {}), name: size})
                if setting not in known:
                    known[setting] = measure(setting, options.chip, Path(directory))
                found.setdefault(name, []).append({"size": size, **known[setting]})
                print(f"{name} {size:,}: {known[setting]}", flush=True)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
