"""What FSDP gathers of a QLoRA step against LoRA's in bfloat16: Qwen2-VL-7B, rank 64, 4 v5e chips.

    python scripts/plan_table.py --only "Qwen2-VL 7B / Q?LoRA / v5e-4"
    python scripts/prove/gathers.py

Reads what the first command compiled, in docs/PERFORMANCE.json. What both steps gather in bfloat16
(embedding, head, tower, LoRA) is no quantized linear. Bytes are those that come from other chips:
of an all-gather's result three quarters, and all of what shards that are passed on bring, which is
how XLA gathers some kernels inside their product. Exits with 1 where a bound is not met.
"""

import json
import sys
from pathlib import Path

FOUND = Path(__file__).resolve().parents[2] / "docs" / "PERFORMANCE.json"
# Kind -> the share of its result that comes from the other three chips.
GATHERS = {"all-gather": 3 / 4, "collective-permute": 1.0}
LINEARS, WHOLE = 0.27, 0.36  # the most that may be gathered of LoRA's bytes


def gathered(cells: dict, method: str) -> dict[str, float]:
    """Return the bytes that a chip gathers from others in a step, by dtype."""
    name = f"Qwen2-VL 7B / {method} / v5e-4"
    if not cells.get(name, {}).get("exchanges"):
        sys.exit(f"'{name}' has not been compiled yet: see this script's first command.")
    sums: dict[str, float] = {}
    for one in cells[name]["exchanges"]:
        if one["kind"] in GATHERS:
            came = GATHERS[one["kind"]] * one["bytes"]
            sums[one["dtype"]] = sums.get(one["dtype"], 0.0) + came
    return sums


def main() -> int:
    cells = json.loads(FOUND.read_text(encoding="utf-8"))
    four, dense = gathered(cells, "QLoRA"), gathered(cells, "LoRA")
    codes = sum(size for dtype, size in four.items() if dtype in ("u4", "s4", "u8", "f32"))
    linears = codes / (dense["bf16"] - four["bf16"])
    whole = sum(four.values()) / sum(dense.values())
    print("QLoRA gathers", {name: f"{size / 1e9:.2f} GB" for name, size in four.items()})
    print("LoRA gathers ", {name: f"{size / 1e9:.2f} GB" for name, size in dense.items()})
    print(f"quantized linears {linears:.3f} of LoRA's (at most {LINEARS})")
    print(f"the whole step    {whole:.3f} of LoRA's (at most {WHOLE})")
    return int(linears > LINEARS or whole > WHOLE)


if __name__ == "__main__":
    sys.exit(main())
