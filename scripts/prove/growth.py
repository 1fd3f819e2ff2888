"""What a chip does when there are more of them: Qwen2-VL-2B with LoRA on 4 and on 256 v5e chips.

    python scripts/prove/growth.py [--topologies v5e:2x2 v5e:16x16] [--fsdp 4]

Each chip has one row of 2,048 tokens and one image; `fsdp` chips share a copy of the model. The
step is compiled, not run. Exits with 1 where a chip's FLOPs or memory traffic differ by more than
10 % from those of the first topology. FLOPs are XLA's own, which count a loop's body once.

On a ring of chips, as 2x2 is and a row of a larger slice is not, the TPU compiler gathers some
weights by cutting their products into windows that pass from chip to chip: a collective whose
traffic cannot be told from its product's. It is kept from that here (--windows: it is not), so
that collectives stand apart, and are listed.
"""

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from vlm_jax import config, plan
from vlm_jax.plan.traffic import bytes_accessed

STEP = {
    "model.name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
    "lora.r": 64,
    "data.max_seq_length": 2048,
    "data.max_pixels": 200704,
}
ALLOWED = 0.1
NO_WINDOWS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5e:16x16"])
    parser.add_argument("--fsdp", type=int, default=4)
    parser.add_argument("--windows", action="store_true", help="leave it to the compiler")
    options = parser.parse_args()
    if not options.windows:  # read when libtpu is loaded, for the first topology
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {NO_WINDOWS}"
    first: tuple[float, int] | None = None
    good = True
    for topology in options.topologies:
        chips = len(plan.devices(topology))
        mesh = {"fsdp": options.fsdp, "data": chips // options.fsdp}
        compiled = plan.compile_step(config.load(None, STEP), topology, mesh=mesh)
        figures = compiled.cost_analysis()["flops"], bytes_accessed(compiled)
        first = first or figures
        grown = [now / then - 1 for now, then in zip(figures, first, strict=True)]
        good &= max(map(abs, grown)) <= ALLOWED
        print(
            f"{topology} ({chips} chips, {mesh}): {figures[0] / 1e12:.3f} TFLOP ({grown[0]:+.1%}), "
            f"{figures[1] / 1e9:.1f} GB of traffic ({grown[1]:+.1%}), "
            f"{plan.memory(compiled).total / 1e9:.2f} GB of memory"
        )
        sums: dict[str, list[int]] = {}
        for one in plan.collectives(compiled):
            total = sums.setdefault(f"{one.kind} of {one.dtype}", [0, 0])
            total[0] += one.times
            total[1] += one.times * one.bytes
        for name, (count, size) in sorted(sums.items(), key=lambda item: -item[1][1]):
            print(f"    {name:32s} {count:6d} times {size / 1e9:9.3f} GB", flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
