"""Facts of a compiled program: memory, computations, collectives.

The compiler writes its schedule as text: computations of instructions, one the entry. Loops,
branches and calls name other computations; how often each runs follows from there.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax

from vlm_jax.errors import UserError

KIND = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    "collective-broadcast"
)
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
END = re.compile(r"\}(, execution_thread=.*)?")
CALLED = re.compile(r"\b(?:calls|to_apply)=%?([^\s,)]+)")
BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([^\s,)]+))"
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device. aliased: outputs that lie in arguments' places, as a donated state does."""

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int
    host: int  # arguments, outputs and temporaries in the host's memory, aliases taken off

    @property
    def total(self) -> int:
        """What the program needs of a device's own memory while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that chips exchange. kind: as "all-gather". dtype: XLA's, as "bf16" or "u4".

    shape, bytes: of the result on one device. times: how often a step runs it; that of a branch
    counts as taken. where: the operation of the model that it came from. group: devices that
    exchange with one another, 0 where the program does not say.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    where: str
    group: int = 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: str  # its type
    text: str  # all of it


Program = dict[str, list[Instruction]]


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Return the memory that a compiled program needs on each device."""
    m = compiled.memory_analysis()
    if m is None:
        raise UserError("This compiler does not tell how much memory its programs need.")
    host = m.host_argument_size_in_bytes + m.host_output_size_in_bytes + m.host_temp_size_in_bytes
    return Memory(
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes,
        aliased=m.alias_size_in_bytes,
        temporary=m.temp_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        host=host - m.host_alias_size_in_bytes,
    )


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Return what the devices exchange, each array once, in the program's order.

    The parts that an asynchronous collective falls into are one.
    """
    program, entry = parse(compiled)
    return [
        Collective(
            kind,
            dtype,
            shape,
            math.prod(shape) * bits(dtype) // 8,
            times,
            first(r'op_name="([^"]*)"', instruction.text),
            _group(instruction),
        )
        for kind, instruction, times in exchanges(program, run_times(program, entry))
        for dtype, shape in _results(instruction)
    ]


def exchanges(program: Program, times: Mapping[str, int]) -> list[tuple[str, Instruction, int]]:
    """Return (kind, instruction, how often it runs) of what the devices exchange.

    times: see `run_times`. Start, carriers and end of an asynchronous collective share their
    channel and are one; carriers inside a loop that it is in flight for do not repeat it.
    """
    found: dict[tuple[str, str], tuple[Instruction, int]] = {}
    for name, instructions in program.items():
        for instruction in instructions:
            kind = re.fullmatch(rf"({KIND})(-start)?", instruction.opcode)
            if not kind or not times.get(name):
                continue
            own = f"{name}/{instruction.name}"  # where it has no channel
            key = (kind[1], first(r"channel_id=(\d+)", instruction.text, own))
            start, least = found.get(key, (instruction, times[name]))
            found[key] = start, min(least, times[name])
    return [(key[0], *one) for key, one in found.items()]


def parse(compiled: jax.stages.Compiled) -> tuple[Program, str]:
    """Return ({computation: its instructions}, the entry's name).

    A custom call may hold line breaks and braces of its own: a computation ends only at a line
    that is a brace, behind which the thread that runs it may be named.
    """
    return parse_text(compiled.as_text() or "")


def parse_text(text: str) -> tuple[Program, str]:
    """Return what `parse` does, of a program's text."""
    program: Program = {}
    entry = ""
    body: list[Instruction] | None = None  # of the computation that goes on
    for line in text.splitlines():
        if body is None:
            if head := re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line):
                body = program[head[2]] = []
                entry = head[2] if head[1] else entry
        elif END.fullmatch(line):
            body = None
        elif found := re.match(r"\s+(?:ROOT )?%?([^\s=]+) = (.*?)\s([a-z][a-z0-9-]*)\(", line):
            body.append(Instruction(found[1], found[3], found[2], line))
        elif body:  # a custom call's metadata goes over several lines
            body[-1] = dataclasses.replace(body[-1], text=f"{body[-1].text}\n{line}")
    return program, entry


def first(pattern: str, text: str, default: str = "") -> str:
    """Return the group of a pattern's first match in a text."""
    match = re.search(pattern, text)
    return match[1] if match else default


def operands(instruction: Instruction) -> list[str]:
    """Return the names of the values that an instruction takes."""
    _, _, arguments = instruction.text.partition(f" {instruction.opcode}(")
    return re.findall(r"%([^\s,)]+)", arguments.partition(")")[0])


def called_by(instruction: Instruction) -> list[str]:
    """Return the computations that an instruction runs: all branches, no loop's condition."""
    if instruction.opcode == "while":
        return re.findall(r"\bbody=%?([^\s,)]+)", instruction.text)
    branches = [
        name.strip().lstrip("%")
        for several, one in BRANCHES.findall(instruction.text)
        for name in (several or one).split(",")
    ]
    return branches or CALLED.findall(instruction.text)


def trips(program: Program, loop: Instruction) -> int:
    """Return how often a loop runs: as the compiler says, or the bound that its condition holds."""
    if known := first(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known)
    body = {i.name: i for i in program[first(r"\bcondition=%?([^\s,)]+)", loop.text)]}
    for i in body.values():
        if i.opcode == "compare" and "direction=LT" in i.text:
            if bound := first(r" constant\((\d+)\)", body[operands(i)[1]].text):
                return int(bound)
    raise UserError(
        f"How often the loop '{loop.name}' runs is not known before it does: its condition holds "
        f"no constant. The program can be compiled and run, but its time is unknown."
    )


def run_times(program: Program, entry: str) -> dict[str, int]:
    """Return {computation: how often a run of the program runs it}, all branches taken."""
    times: dict[str, int] = {}

    def run(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for instruction in program[name]:
            loops = trips(program, instruction) if instruction.opcode == "while" else 1
            for called in called_by(instruction):
                run(called, count * loops)

    run(entry, 1)
    return times


def _results(instruction: Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """Return (dtype, shape) of each array that a collective makes."""
    arrays = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in ARRAY.findall(instruction.result)
    ]
    if instruction.opcode == "all-gather-start":  # (operands, results)
        return arrays[len(arrays) // 2 :]
    if instruction.opcode == "collective-permute-start":  # (operand, result, contexts)
        return arrays[1:2]
    return arrays


def _group(instruction: Instruction) -> int:
    """Return how many devices exchange with one another, 0 where it is not said.

    {{0,1},{2,3}}, or [2,2]<=[4], or of a named mesh: mesh['axis_0'=2,'axis_1'=2] {'axis_0'}.
    """
    groups = instruction.text.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    if counted := re.match(r"\[\d+,(\d+)\]", groups):
        return int(counted[1])
    if named := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 0


def bits(dtype: str) -> int:
    """Return the bits of an element; of pred, a byte."""
    return int(first(r"^[a-z]+(\d+)", dtype, "8"))
