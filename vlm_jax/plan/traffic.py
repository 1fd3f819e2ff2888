"""Memory traffic of a compiled program, counted from its schedule.

XLA's own "bytes accessed" counts the body of a loop once. Here each instruction of the schedule
counts as often as it runs, by the arrays that it takes and makes; a slice of an array counts as
what is taken of it or written in it, and what lies in another memory (on a TPU's chip, S(1); of
the host, S(5)) not at all.
"""

import math
import re
from collections.abc import Iterable, Mapping

import jax

from vlm_jax.plan.program import (
    CALLED,
    KIND,
    Instruction,
    Program,
    bits,
    called_by,
    exchanges,
    first,
    operands,
    parse,
    run_times,
)

# They name, order or pass on what lies in memory, or start what another instruction ends.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota "
    "partition-id replica-id opt-barrier async-start async-update copy-done slice-done "
    "all-gather-done all-reduce-done collective-permute-done async-done".split()
)
SLICES = ("dynamic-slice", "slice", "gather")
LAYOUT = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


def bytes_accessed(compiled: jax.stages.Compiled) -> int:
    """Return the bytes that one device reads and writes of its memory in a run of the program.

    Caches are not in it: a GPU reads less where they hold something.
    """
    program, entry = parse(compiled)
    times = run_times(program, entry)
    inside = {  # computations that are part of one instruction, and touch no memory by themselves
        name
        for instructions in program.values()
        for instruction in instructions
        if instruction.opcode not in ("while", "conditional", "call", "async-start")
        for name in CALLED.findall(instruction.text)
    }
    made = {name: {i.name: i for i in body} for name, body in program.items()}
    scheduled = sum(
        count * accessed(instruction, made[name], program)
        for name, count in times.items()
        if name not in inside
        for instruction in program[name]
    )
    owner = {id(instruction): name for name in inside for instruction in program[name]}
    carried = sum(  # by what is computed meanwhile
        count * accessed(instruction, made[owner[id(instruction)]], program)
        for _, instruction, count in exchanges(program, times)
        if id(instruction) in owner
    )
    return scheduled + carried


def accessed(instruction: Instruction, made: Mapping[str, Instruction], program: Program) -> int:
    opcode = instruction.opcode
    if opcode in FREE:
        return 0
    taken = [made[name] for name in operands(instruction) if name in made]
    written = _size(instruction.result)
    if opcode in SLICES:
        from_memory = bool(taken) and _size(taken[0].result) > 0
        # What is taken may go to the chip's own memory: read it is all the same.
        return written + from_memory * _size_anywhere(instruction.result)
    if opcode == "dynamic-update-slice":
        part = _size(taken[1].result) if len(taken) > 1 else 0
        return part + min(part, written)
    if opcode in ("copy-start", "slice-start"):  # (to, from, context): each side once
        arrays = [_bytes(*found) for found in LAYOUT.findall(instruction.result)][:2]
        least = min((size for _, size in arrays), default=0)
        return sum(min(seen, least) for seen, _ in arrays)
    called = first(r"\bcalls=%?([^\s,)]+)", instruction.text)
    return (
        _fused(program[called], taken, written, program)
        if opcode == "fusion" and called in program
        else written + sum(_size(one.result) for one in taken)
    )


def _fused(
    body: list[Instruction], taken: list[Instruction], written: int, program: Program
) -> int:
    """Return what a fusion reads and writes: of what it only slices, the slices."""
    read = sum(
        _read(body, parameter, _size(taken[index].result), program)
        for index, parameter in _parameters(body)
        if index < len(taken)
    )
    named = {i.name: i for i in body}
    root = _root(body)
    while root.opcode == "bitcast" and operands(root)[0] in named:
        root = named[operands(root)[0]]
    if root.opcode == "dynamic-update-slice":
        update = named.get(operands(root)[1])
        written = min(written, _size_anywhere(update.result) if update else written)
    if root.opcode == "tuple":
        results = (named[name] for name in operands(root) if name in named)
        written = sum(_size(i.result) for i in results if not _carried(i))
    elif _carried(root):
        written = 0
    return read + written


def _carried(instruction: Instruction) -> bool:
    """Return whether a fusion only passes on what this makes, or what of it is in flight.

    Collectives are counted by themselves, once.
    """
    return instruction.opcode == "parameter" or bool(re.fullmatch(KIND, instruction.opcode))


def _read(body: list[Instruction], name: str, most: int, program: Program) -> int:
    """Return the bytes that a fused computation reads of one of its values, which has `most`."""
    root = _root(body)
    if root.name == name:
        return most
    part = 0
    for user in body:
        values = operands(user)
        passes_on = _carried(user) or (user is root and user.opcode == "tuple")
        if name not in values or passes_on:
            continue
        if user.opcode in SLICES:
            part += _size_anywhere(user.result)
        elif user.opcode == "bitcast":
            part += _read(body, user.name, most, program)
        elif user.opcode == "fusion":
            inner = program[called_by(user)[0]]
            part += sum(
                _read(inner, parameter, most, program)
                for index, parameter in _parameters(inner)
                if values[index] == name
            )
        elif user.opcode != "dynamic-update-slice" or values[0] != name:  # else written in place
            return most
    return min(part, most)


def _parameters(body: list[Instruction]) -> list[tuple[int, str]]:
    """Return (number, name) of a computation's parameters."""
    return [
        (int(number), instruction.name)
        for instruction in body
        if instruction.opcode == "parameter"
        for number in re.findall(r" parameter\((\d+)\)", instruction.text)
    ]


def _root(body: list[Instruction]) -> Instruction:
    return next((i for i in body if i.text.lstrip().startswith("ROOT")), body[-1])


def _bytes(dtype: str, dims: str, layout: str) -> tuple[int, int]:
    """Return (bytes in the device's memory, bytes) of an array."""
    size = math.prod(int(n) for n in dims.split(",") if n) * bits(dtype) // 8
    return (0 if re.search(r"S\([1-9]", layout) else size), size


def in_memory(results: Iterable[str]) -> float:
    """Return the share of arrays that lie in the device's memory, and not on its chip."""
    each = [_bytes(*found)[0] > 0 for result in results for found in LAYOUT.findall(result)]
    return sum(each) / max(1, len(each))


def _size(result: str) -> int:
    """Return the bytes of a result in the device's memory."""
    return sum(_bytes(*found)[0] for found in LAYOUT.findall(result))


def _size_anywhere(result: str) -> int:
    """Return the bytes of a result in whichever memory."""
    return sum(_bytes(*found)[1] for found in LAYOUT.findall(result))
