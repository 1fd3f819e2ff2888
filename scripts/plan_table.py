"""Plan usual runs on usual hardware, and write the table of docs/PERFORMANCE.md.

    python scripts/plan_table.py [--only REGEX ...] [--page FILE] [--measure-nothing]

Needs no accelerator: `pip install "vlm_jax[plan]"`. A cell takes up to some minutes. What is found
is kept in a JSON file beside the page; a later run fills in only the cells that are missing, so it
may be stopped at any time. --only: cells whose name, as "Qwen2-VL 7B / QLoRA / v5e-4", holds it.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from vlm_jax import UserError, config
from vlm_jax.hardware import hardware
from vlm_jax.plan import plan_step
from vlm_jax.plan.report import COMPILED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "PERFORMANCE.md"
MODELS = {
    "Qwen2-VL 2B": "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen2-VL 7B": "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen2-VL 72B": "Qwen/Qwen2-VL-72B-Instruct",
    "Qwen2.5-VL 7B": "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen3-VL 8B": "Qwen/Qwen3-VL-8B-Instruct",
    "Gemma 3 12B": "google/gemma-3-12b-it",
    "LLaVA-1.5 7B": "llava-hf/llava-1.5-7b-hf",
    "LLaVA-1.5 13B": "llava-hf/llava-1.5-13b-hf",
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"lora.enabled": False},
    "LoRA": {"lora.r": 64},
    "QLoRA": {"lora.r": 64, "model.quantize": "nf4-dq"},
}
HARDWARE = ("v5e-1", "v5e-4", "v5e-16", "v5p-8", "v6e-8", "h100:1", "h100:8", "rtx4090")
# One row of 2,048 tokens and one image a device; all devices of a slice share one copy, by fsdp.
ROW: dict[str, Any] = {
    "data.max_seq_length": 2048,
    "data.max_pixels": 200704,
    "training.remat_policy": "auto",
}
KEPT = ("basis", "verdict", "said", "peak", "capacity", "mesh", "rows", "compile_seconds", "parts",
        "exchanges", "bytes_accessed", "remat_policy", "attention", "kernels",
        "cycles")  # fmt: skip


class Cell(NamedTuple):
    model: str
    method: str
    hardware: str

    @property
    def name(self) -> str:
        return " / ".join(self)


def cells(only: list[str]) -> Iterator[Cell]:
    for model in MODELS:
        for method in METHODS:
            for name in HARDWARE:
                cell = Cell(model, method, name)
                if not only or any(re.search(text, cell.name) for text in only):
                    yield cell


def measure(cell: Cell) -> dict[str, Any]:
    """Return what the page says of a cell, or {"error": why} where it cannot be planned here."""
    changes: dict[str, Any] = {"model.name_or_path": MODELS[cell.model]}
    changes |= {**ROW, **METHODS[cell.method]}
    count = hardware(cell.hardware).count
    changes |= {"mesh.data": 1, "mesh.fsdp": count}
    if cell.model.startswith(("LLaVA", "Gemma 3")):
        del changes["data.max_pixels"]  # its images have one size
    try:
        report = plan_step(config.load(None, changes), cell.hardware)
        if not report.fits and count > 4 and report.peak < 2 * report.capacity:
            changes |= {"mesh.fsdp": count // 4, "mesh.tensor": 4}
            report = plan_step(config.load(None, changes), cell.hardware)
    except UserError as error:
        return {"error": str(error)}
    tree = report.to_json()
    speed = {name: tree["speed"][name] for name in ("step", "rule", "tokens_per_second", "mfu")}
    return {**{name: tree[name] for name in KEPT}, **speed}


def words(found: dict[str, Any] | None) -> str:
    """Return a cell of the table."""
    if found is None or "error" in found:
        return ""
    mark = "" if found["basis"] == COMPILED else "~"
    tensor = " †" if found["mesh"]["tensor"] > 1 else ""
    memory = f"{mark}{found['peak'] / 1e9:.1f} GB{tensor}"
    if found["verdict"] != "FITS":
        return f"no, {memory}"
    if found["tokens_per_second"] is None:
        return memory
    bound = "" if found["rule"].startswith("the TPU") else "≤ "
    speed = f"{bound}{found['tokens_per_second']:,.0f} t/s, {bound}{found['mfu']:.0%}"
    return f"{memory}, {speed}, {found.get('remat_policy', 'before')}"


def page(known: dict[str, dict[str, Any]]) -> str:
    """Return docs/PERFORMANCE.md."""
    lines = [
        "# What fits where, and how fast",
        "",
        "Made by `scripts/plan_table.py`; nothing here was run on a device. A step has one",
        "row of 2,048 tokens and one image a device, AdamW in float32, and one copy of the",
        "model over all devices (fsdp; †: fsdp x tensor 4, where that alone does not fit, and",
        "a quarter of the rows). A cell: memory of a device, tokens a second of all devices,",
        "MFU without recomputation and without attention above the diagonal, the remat",
        'policy. TPU and H100 programs are compiled; "no" is the compiler\'s refusal, or more',
        "than 92 % of a GPU's memory. Seconds of TPUs are their compiler's and the bundles of",
        'Pallas kernels, without waiting on other chips; "≤" is a roofline; "~" is estimated',
        "from shapes: where there is no compiler, or weights and moments alone are too large.",
        '"before": a cell made with plain attention and every block recomputed, whose MFU counts',
        "all of attention. An empty cell has not been measured yet.",
        "",
        "| | | " + " | ".join(HARDWARE) + " |",
        "|" + "---|" * (len(HARDWARE) + 2),
    ]
    for model in MODELS:
        for method in METHODS:
            row = [words(known.get(Cell(model, method, name).name)) for name in HARDWARE]
            lines.append(f"| {model} | {method} | " + " | ".join(row) + " |")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="REGEX")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument(
        "--measure-nothing", action="store_true", help="write the page from the JSON"
    )
    options = parser.parse_args(arguments)
    kept = options.page.with_suffix(".json")
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for cell in () if options.measure_nothing else cells(options.only):
        if known.get(cell.name, {}).keys() >= set(KEPT):
            continue
        known[cell.name] = measure(cell)
        print(cell.name, "|", known[cell.name].get("error") or words(known[cell.name]), flush=True)
        text = json.dumps(known, indent=1, sort_keys=True) + "\n"
        kept.write_text(text, encoding="utf-8")
        options.page.write_text(page(known), encoding="utf-8")
    options.page.write_text(page(known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
