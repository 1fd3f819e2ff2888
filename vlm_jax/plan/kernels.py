"""Cycles of Pallas kernels, of which XLA has no estimate, from the bundles of their programs.

A TPU runs one bundle of instructions a cycle, in order. `kernels.json` has those of each kernel,
counted by `scripts/bench/pallas_bundles.py` in what the compiler writes, stalls of the matrix unit
included. What a step of the grid loads is loaded while the one before computes, so a kernel takes
its bundles, or its bytes at the bandwidth of the memory, whichever is more.
"""

import base64
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jax.experimental.mosaic.dialects import tpu  # of a kernel's text
from jax.extend.mlir import ir

from vlm_jax.errors import UserError
from vlm_jax.hardware import DEVICES
from vlm_jax.plan.program import Instruction, Program, first, operands
from vlm_jax.plan.schedule import Timed, is_kernel
from vlm_jax.plan.traffic import accessed, in_memory

TABLE = Path(__file__).parent / "kernels.json"
TWO_CORES = ("v4", "v5p")  # a device of which is two cores that share a grid's parallel dimensions


class Kernel(NamedTuple):
    """A Pallas kernel as a program has it.

    grid: its dimensions. parallel: which of them cores may share. blocks: what a step sees of each
    array, as "512x128xbf16". tables: whether it skips blocks by tables. operations: of vectors, in
    its text.
    """

    name: str
    grid: tuple[int, ...]
    parallel: tuple[bool, ...]
    blocks: tuple[str, ...]
    tables: bool
    operations: int

    @property
    def key(self) -> str:
        """Its blocks and operations: what its bundles depend on."""
        return f"{' '.join(self.blocks)}, {self.operations} operations"


class Bundles(NamedTuple):
    """Bundles of a kernel. step: what each step of the grid runs. block: besides, where it computes
    one. edge: besides, where a result begins and ends.
    """

    step: float
    block: float
    edge: float


class Layout(NamedTuple):
    """Where a kernel's grid has attention's blocks: dimensions of heads, queries and keys.

    by_key: whether a result is one of a key block and a head of keys, or of a query block.
    """

    heads: int
    queries: int
    keys: int
    by_key: bool = False


# Of kernels that skip blocks and sum into a result over steps. Others run all of their program in
# each step.
LAYOUTS = {
    r"splash_m[hq]a_(fwd|dq).*": Layout(0, 1, 2),
    r"splash_m[hq]a_dkv.*": Layout(1, 2, 0, by_key=True),
}

# Kernels whose blocks are whole columns, of as many rows as a model has.
COLUMNS, MOST_ROWS = ("nf4_scales",), 512


def read(instruction: Instruction) -> Kernel:
    """Return the kernel that a custom call runs."""
    return decoded(first(r'"body":"([^"]*)"', instruction.text))


@functools.cache
def decoded(body: str) -> Kernel:
    """Return the kernel of a custom call's body, in base 64."""
    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context:
        module = ir.Module.parse(base64.b64decode(body))
        function = module.body.operations[0]
        attributes = function.attributes
        kind: Any = ir.TypeAttr(attributes["function_type"]).value
        parallel: Any = attributes["dimension_semantics"]
        blocks = (re.match(r"memref<([^,>]*).*vmem", str(one)) for one in kind.inputs)
        computing: list[bool] = []

        def look(operation: Any) -> Any:
            computing.append(_computes(operation))
            return ir.WalkResult.ADVANCE

        function.operation.walk(look)
        return Kernel(
            ir.StringAttr(attributes["sym_name"]).value,
            tuple(ir.DenseI64ArrayAttr(attributes["iteration_bounds"])),
            tuple("parallel" in str(one) for one in parallel),
            tuple(re.sub(r"^(1x)+(?=\d+x\d)", "", one[1]) for one in blocks if one),
            ir.IntegerAttr(attributes["scalar_prefetch"]).value > 0,
            sum(computing),
        )


def _computes(operation: Any) -> bool:
    """Return whether an operation computes vectors: others differ with how a kernel is traced."""
    computing = re.match(
        r"(\w+\.)?(arith|math|tpu|vector)\.(?!shape_cast|broadcast)", operation.name
    )
    return bool(computing) and any(str(one.type).startswith("vector") for one in operation.results)


@functools.cache
def table() -> dict[str, dict[str, dict[str, list[list[int]]]]]:
    """Return {chip: {kernel: {key: [near, far]}}}, each [step, block, edge].

    near: all that it takes and gives lies in the chip's own memory, far: in the device's, to and
    from which it copies.
    """
    return json.loads(TABLE.read_text(encoding="utf-8"))


def bundles(kernel: Kernel, chip: str, far: float = 1.0) -> Bundles | None:
    """Return the bundles of a kernel on a chip, None where the table has none.

    far: the share of its arrays that lie in the device's memory. Of a kernel of whole columns it
    may be the next larger one's.
    """
    known = table().get(chip, {}).get(kernel.name, {})
    rows = kernel.blocks[-1].partition("x")[0]
    more = range(int(rows), MOST_ROWS + 1, 8) if kernel.name in COLUMNS else ()
    keys = (kernel.key, *(kernel.key.replace(f" {rows}x", f" {n}x") for n in more))
    found = next((known[key] for key in keys if key in known), None)
    if found is None:
        return None
    return Bundles(*((1 - far) * near + far * away for near, away in zip(*found, strict=True)))


class Steps(NamedTuple):
    """How often parts of a kernel run. all: steps of its grid. blocks: those that compute."""

    all: int
    blocks: int
    edges: int


def steps(kernel: Kernel, result: str, images: int = 1) -> Steps:
    """Return how often the parts of a kernel run. result: the type of what it gives.

    Rows are of one segment, but for kernels that see both ways, whose rows are of so many equal
    images. The tables of a row are not in a program.
    """
    every = math.prod(kernel.grid)
    layout = next((one for name, one in LAYOUTS.items() if re.fullmatch(name, kernel.name)), None)
    if layout is None:
        return Steps(every, every, every)
    queries, keys = kernel.grid[layout.queries], kernel.grid[layout.keys]
    # Blocks [queries or keys, width] of q, k, v; int32 ones: segments of queries and keys, then the
    # queries' places where they see only what is before them.
    query, key = (int(one.split("x")[0]) for one in kernel.blocks[:2])
    causal = sum(one.endswith("i32") for one in kernel.blocks) % 2 == 1
    seen = (
        blocks_seen(queries, keys, query, key, causal, 1 if causal else images)
        if kernel.tables
        else queries * keys
    )
    edges = every // keys
    if layout.by_key:
        heads = re.findall(r"\[(\d+),\d+,\d+\]", result)
        edges = keys * int(heads[-1])
    return Steps(every, every * seen // (queries * keys), edges)


def blocks_seen(
    queries: int, keys: int, query: int, key: int, causal: bool, segments: int = 1
) -> int:
    """Return how many blocks of a row compute. query, key: positions of a block.

    segments: how many equal ones the row has; a block computes where one lies in both its sides.
    """
    length = queries * query / segments

    def meet(i: int, j: int) -> bool:
        if causal and j * key >= (i + 1) * query:
            return False
        ends = ((i * query, (i + 1) * query - 1), (j * key, (j + 1) * key - 1))
        (q0, q1), (k0, k1) = ((start // length, end // length) for start, end in ends)
        return q0 <= k1 and k0 <= q1

    return sum(meet(i, j) for i in range(queries) for j in range(keys))


def cycles(kernel: Kernel, known: Bundles, run: Steps, chip: str) -> int:
    """Return the cycles of one run of a kernel, were its data always there."""
    shared = chip in TWO_CORES and any(
        parallel and size % 2 == 0
        for parallel, size in zip(kernel.parallel, kernel.grid, strict=True)
    )
    total = run.all * known.step + run.blocks * known.block + run.edges * known.edge
    return round(total / 2 if shared else total)


class Used(NamedTuple):
    """A kernel of a step. runs: how often the step calls it. cycles: of all of them."""

    name: str
    runs: int
    cycles: int


def used(schedule: Iterable[Timed]) -> list[Used]:
    """Return the kernels of a schedule, by the cycles that they take."""
    runs: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one in schedule:
        if is_kernel(one.instruction):
            name = read(one.instruction).name
            runs[name] += one.times
            total[name] += one.total
    return [Used(name, runs[name], count) for name, count in total.most_common()]


def timing(program: Program, chip: str, images: int = 1) -> Callable[[str, Instruction], int]:
    """Return (computation, custom call) -> its cycles on a chip, for `schedule`.

    The function raises `UserError` for a kernel that the table does not have. images: see `steps`.
    """
    device = DEVICES[chip]
    made = {name: {i.name: i for i in body} for name, body in program.items()}

    def of(computation: str, instruction: Instruction) -> int:
        kernel = read(instruction)
        taken = (made[computation].get(name) for name in operands(instruction))
        results = [instruction.result, *(one.result for one in taken if one is not None)]
        known = bundles(kernel, chip, in_memory(results))
        if known is None:
            raise UserError(
                f"The step runs the Pallas kernel '{kernel.name}' with blocks "
                f"{' '.join(kernel.blocks)}. Its time is unknown: vlm_jax/plan/{TABLE.name} has no "
                f"bundles on {chip} for it. Save the program with scripts/bench/tpu_step.py --keep "
                f"FILE and count the kernel with scripts/bench/pallas_bundles.py FILE."
            )
        least = 0.0
        if device.clock and device.bandwidth:
            moved = accessed(instruction, made[computation], program)
            least = moved / device.bandwidth * device.clock
        run = steps(kernel, instruction.result, images)
        return max(cycles(kernel, known, run, chip), math.ceil(least))

    return of
