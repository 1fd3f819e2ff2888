"""Compile a config's training step for TPU chips that are not here, and say where time goes.

    python scripts/bench/tpu_step.py configs/qwen2_vl_7b_lora.py [--topology v5e:2x2]
        [--tokens 2048 --rows 4 --patches 1024] [--set lora.r=64 ...] [--mesh fsdp=4 ...]
        [--options NAME=VALUE ...] [--json] [--list N] [--keep FILE.hlo.gz]
    python scripts/bench/tpu_step.py --read FILE.hlo.gz

Needs no TPU: `pip install "vlm_jax[plan]"`. A step of 7B takes minutes; --keep keeps its text, and
--read looks at it again. --rows: of the whole step. Seconds are the compiler's own estimate and the
kernels' bundles, without waiting for other chips. MFU counts what the mathematics asks for: no
recomputation, of attention the causal half, the head at every position.
"""

import argparse
import gzip
import json
import os
import resource
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from step_parts import PHASES, Row, rows

from vlm_jax import UserError
from vlm_jax.hardware import DEVICES, hardware
from vlm_jax.plan import kernels, work
from vlm_jax.plan.program import memory, parse_text
from vlm_jax.plan.schedule import is_kernel, schedule
from vlm_jax.plan.step import load, prepare
from vlm_jax.plan.topologies import devices
from vlm_jax.train.compile import OPTIONS

MARK = "// "  # of the first line of a kept file, which holds what the text does not say
MIB = 1 << 20


def value(text: str) -> Any:
    """Return a number or a word of the command line."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def pairs(texts: list[str]) -> dict[str, Any]:
    """Return {"key": value} of "key=value"."""
    return {key: value(text) for key, _, text in (one.partition("=") for one in texts)}


def compiled_step(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return (facts of the step, the text of its program)."""
    mesh = pairs(options.mesh)
    changes = {"training.gradient_accumulation_steps": 1, **pairs(options.set)}
    if mesh:
        changes |= {"mesh.auto": False, **{f"mesh.{name}": size for name, size in mesh.items()}}
    machine = hardware(options.topology)
    step = prepare(
        load(options.config, changes),
        devices(machine.topology),
        rows=options.rows,
        tokens=options.tokens,
        patches=options.patches,
    )
    kind = DEVICES[machine.device].kind
    given = {**OPTIONS.get(kind, {}), **pairs(options.options)}
    OPTIONS[kind] = {name: value for name, value in given.items() if value is not None}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    compiled = step.compile()
    after = resource.getrusage(resource.RUSAGE_SELF)
    counted = work.count(step.model, step.state.trainable, step.frozen, step.rows, *step.shape)
    masked = work.masked(step.model, step.state.trainable, step.rows, step.shape[0])
    own = memory(compiled)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    facts = {
        "config": str(options.config),
        "set": changes,
        "options": OPTIONS[kind],
        "topology": machine.topology,
        "device": machine.device,
        "devices": step.mesh.size,
        "mesh": step.sizes,
        "rows": step.rows,
        "tokens": step.shape[0],
        "patches": step.shape[1],
        "micro_batches": step.micro_batches,
        "rank": step.config.lora.r if step.config.lora.enabled else 0,
        "remat_policy": step.model.remat,
        "useful_flops": (work.total(counted.values()).model - masked) / step.mesh.size,
        "memory": {"arguments": own.arguments, "temporary": own.temporary, "peak": peak,
                   "total": own.total},
        "compile_seconds": time.perf_counter() - began,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }  # fmt: skip
    return facts, compiled.as_text() or ""


def read(file: Path) -> tuple[dict[str, Any], str]:
    """Return (facts, text) of a file that --keep wrote."""
    with gzip.open(file, "rt", encoding="utf-8") as kept:
        head = kept.readline()
        if not head.startswith(MARK):
            raise UserError(f"'{file}' was not written by --keep: its first line holds no facts.")
        return json.loads(head[len(MARK) :]), kept.read()


def keep(file: Path, facts: dict[str, Any], text: str) -> None:
    with gzip.open(file, "wt", compresslevel=3, encoding="utf-8") as kept:
        kept.write(f"{MARK}{json.dumps(facts)}\n{text}")


def analysed(facts: dict[str, Any], text: str, images: int) -> tuple[dict[str, Any], list[Row]]:
    """Return (what is said of a step as JSON has it, the rows of its schedule).

    images: equal ones in a row's patches.
    """
    device = DEVICES[facts["device"]]
    program, entry = parse_text(text)
    timing = kernels.timing(program, facts["device"], images)
    found = rows(program, schedule(program, entry, timing), facts["rank"])
    parts: dict[str, Counter] = defaultdict(Counter)
    for row in found:
        parts[row.part][row.phase] += row.timed.total
    cycles = sum(row.timed.total for row in found)
    seconds = cycles / device.clock if device.clock else None
    useful = facts["useful_flops"] / device.flops if device.flops else None
    tokens = facts["rows"] * facts["tokens"]
    return {
        **facts,
        "cycles": cycles,
        "seconds": seconds,
        "mfu": useful / seconds if useful and seconds else None,
        "tokens_per_second": tokens / seconds if seconds else None,
        "parts": {name: dict(count) for name, count in parts.items()},
        "kernels": [
            kernel_row(row, facts["device"], images)
            for row in found
            if is_kernel(row.timed.instruction)
        ],
    }, found


def kernel_row(row: Row, chip: str, images: int) -> dict[str, Any]:
    """Return what is said of a kernel's call: its bundles and how often they run."""
    kernel = kernels.read(row.timed.instruction)
    near, far = kernels.table()[chip][kernel.name][kernel.key]
    run = kernels.steps(kernel, row.timed.instruction.result, images)
    return {
        "name": kernel.name,
        "phase": row.phase,
        "grid": kernel.grid,
        "runs": row.timed.times,
        "steps": run._asdict(),
        "bundles": {"near": near, "far": far},
        "cycles": row.timed.total,
    }


def show(said: dict[str, Any], listed: list[Row]) -> None:
    """Print tables of 80 columns."""
    clock = DEVICES[said["device"]].clock
    unit, scale = ("ms", 1e3 / clock) if clock else ("M cycles", 1e-6)
    mesh = " ".join(f"{name} {size}" for name, size in said["mesh"].items() if size > 1)
    print(f"{said['config']}  {said['topology']}  {mesh}")
    print(
        f"{said['rows']} rows of {said['tokens']:,} tokens and {said['patches']:,} patches, "
        f"{said['micro_batches']} micro-batches, rank {said['rank']}, {said['remat_policy']}"
    )
    print(f"\n{unit:36}" + "".join(f"{name:>9}" for name in (*PHASES[:1], "again", *PHASES[2:])) +
          "    all      %")  # fmt: skip
    by_size = sorted(said["parts"].items(), key=lambda item: -sum(item[1].values()))
    total: Counter = Counter()
    for name, count in by_size:
        total.update(count)
        _row(name, count, scale, said["cycles"])
    _row("all", total, scale, said["cycles"])
    for one in said["kernels"]:
        run, (step, block, edge) = one["steps"], one["bundles"]["near"]
        took = f"{one['cycles'] * scale:.2f} {unit}"
        print(f"\n{one['name']}, {one['phase']}, {one['runs']} runs: {took}")
        print(
            f"  {run['all']} steps x {step} to {one['bundles']['far'][0]}, "
            f"{run['blocks']} blocks x {block}, {run['edges']} results x {edge} bundles"
        )
    memory = {name: size / 1e9 for name, size in said["memory"].items()}
    print(
        f"\nmemory  arguments {memory['arguments']:.2f}  temporary {memory['temporary']:.2f}  "
        f"peak {memory['peak']:.2f} GB"
    )
    print(f"compile {said['processor_seconds']:.0f} s of processor time")
    if said["seconds"]:
        print(
            f"step    {said['seconds']:.3f} s  {said['tokens_per_second']:,.0f} tokens/s  MFU "
            f"{said['mfu']:.1%} of {said['useful_flops'] / 1e12:.1f} useful TFLOP a chip"
        )
    for row in listed:
        cycles = row.timed.total * scale
        print(f"{cycles:8.2f} x{row.timed.times:<4} {row.phase[:4]} {row.part[:22]:22} "
              f"{row.name[-38:]}")  # fmt: skip


def _row(name: str, count: Counter, scale: float, cycles: int) -> None:
    each = "".join(f"{count[one] * scale:9.1f}" if count.get(one) else " " * 9 for one in PHASES)
    whole = sum(count.values())
    print(f"{name[:36]:36}{each}{whole * scale:7.1f} {whole / cycles:6.1%}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("--topology", default="v5e:2x2", metavar="NAME", help="v5e:2x2, v5e-1, ...")
    parser.add_argument("--tokens", type=int, metavar="N", help="of a row")
    parser.add_argument("--rows", type=int, metavar="N", help="of the whole step")
    parser.add_argument("--patches", type=int, metavar="N", help="of a row")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="equal ones in a row")
    for name, what in (
        ("set", "of the config, as lora.r=64"),
        ("mesh", "its sizes, as fsdp=4"),
        ("options", "the compiler's, as xla_tpu_scoped_vmem_limit_kib=65536; none takes one away"),
    ):
        parser.add_argument(f"--{name}", nargs="*", default=[], metavar="KEY=VALUE", help=what)
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead")
    parser.add_argument("--list", type=int, default=0, metavar="N", help="the N dearest as well")
    parser.add_argument("--only", default="", metavar="PART", help="of this part, for --list")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the program, as .hlo.gz")
    parser.add_argument("--read", type=Path, metavar="FILE", help="what --keep wrote")
    options = parser.parse_args(arguments)
    if (options.config is None) == (options.read is None):
        parser.error("give a config, or --read FILE")
    try:
        facts, text = read(options.read) if options.read else compiled_step(options)
        if options.keep:
            keep(options.keep, facts, text)
        said, found = analysed(facts, text, options.images)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(said))
        return 0
    dearest = sorted(found, key=lambda row: -row.timed.total)
    show(said, [row for row in dearest if options.only in row.part][: options.list])
    return 0


if __name__ == "__main__":
    sys.exit(main())
