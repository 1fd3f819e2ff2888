"""Memory traffic of a compiled program, counted from its schedule.

XLA's own "bytes accessed" counts the body of a loop once. Here each instruction of the schedule
counts as often as it runs, by the arrays that it takes and makes; a slice of an array counts as
what is taken of it or written in it, and what lies in another memory (on a TPU's chip, S(1); of
the host, S(5)) not at all.
"""

import math
import re
from collections.abc import Mapping

import jax

from vlm_jax.plan.program import (
    KIND,
    Instruction,
    Program,
    bits,
    called_by,
    exchanges,
    parse,
    run_times,
)

# They name, order or pass on what lies in memory, or start what another instruction ends.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota "
    "partition-id replica-id opt-barrier async-start async-update copy-done slice-done "
    "all-gather-done all-reduce-done collective-permute-done async-done".split()
)
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
        for name in re.findall(r"\b(?:calls|to_apply)=%?([^\s,)]+)", instruction.text)
    }
    whole = 0
    for name, count in times.items():
        if name in inside:
            continue
        made = {instruction.name: instruction for instruction in program[name]}
        whole += count * sum(_accessed(i, made, program) for i in program[name])
    fused = {id(i): {j.name: j for j in program[name]} for name in inside for i in program[name]}
    for _, instruction, count in exchanges(program, times):
        if id(instruction) in fused:  # carried by what is computed meanwhile
            whole += count * _accessed(instruction, fused[id(instruction)], program)
    return whole


def _accessed(instruction: Instruction, made: Mapping[str, Instruction], program: Program) -> int:
    opcode = instruction.opcode
    if opcode in FREE:
        return 0
    operands = [made[name] for name in _operands(instruction) if name in made]
    written = _size(instruction.result)
    if opcode in ("dynamic-slice", "slice", "gather"):
        from_memory = bool(operands) and _size(operands[0].result) > 0
        # What is taken may go to the chip's own memory: read it is all the same.
        return written + from_memory * _whole(instruction.result)
    if opcode == "dynamic-update-slice":
        part = _size(operands[1].result) if len(operands) > 1 else 0
        return part + min(part, written)
    if opcode in ("copy-start", "slice-start"):  # (to, from, context): each side once
        arrays = [_bytes(*found) for found in LAYOUT.findall(instruction.result)]
        least = min((n for _, n in arrays[:2]), default=0)
        return sum(min(seen, least) for seen, _ in arrays[:2])
    called = re.search(r"\bcalls=%?([^\s,)]+)", instruction.text)
    if opcode == "fusion" and called and called[1] in program:
        return _fused(program[called[1]], operands, written, program)
    return written + sum(_size(operand.result) for operand in operands)


def _fused(
    body: list[Instruction], operands: list[Instruction], written: int, program: Program
) -> int:
    """Return what a fusion reads and writes: of what it only slices, the slices."""
    read = 0
    for index, parameter in _parameters(body):
        if index < len(operands):
            read += _taken(body, parameter, _size(operands[index].result), program)
    named = {i.name: i for i in body}
    root = _root(body)
    while root.opcode == "bitcast" and _operands(root)[0] in named:
        root = named[_operands(root)[0]]
    if root.opcode == "dynamic-update-slice":
        update = named.get(_operands(root)[1])
        written = min(written, _whole(update.result) if update else written)
    if root.opcode == "tuple":
        results = [named[name] for name in _operands(root) if name in named]
        written = sum(_size(i.result) for i in results if not _carried(i))
    elif _carried(root):
        written = 0
    return read + written


def _carried(instruction: Instruction) -> bool:
    """Return whether a fusion only passes on what this makes, or what of it is in flight.

    Collectives are counted by themselves, once.
    """
    return instruction.opcode == "parameter" or bool(re.fullmatch(KIND, instruction.opcode))


def _taken(body: list[Instruction], name: str, most: int, program: Program) -> int:
    """Return the bytes that a fused computation reads of one of its values, which has `most`."""
    if _root(body).name == name:
        return most
    part = 0
    for user in body:
        operands = _operands(user)
        if name not in operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            part += _whole(user.result)
        elif user is _root(body) and user.opcode == "tuple":
            pass  # passed on
        elif _carried(user):
            pass
        elif user.opcode == "bitcast":
            part += _taken(body, user.name, most, program)
        elif user.opcode == "fusion":
            inner = program[called_by(user)[0]]
            for index, parameter in _parameters(inner):
                if operands[index] == name:
                    part += _taken(inner, parameter, most, program)
        elif user.opcode == "dynamic-update-slice" and operands[0] == name:
            pass  # written in place
        else:
            return most
    return min(part, most)


def _parameters(body: list[Instruction]) -> list[tuple[int, str]]:
    """Return (number, name) of a computation's parameters."""
    found = []
    for instruction in body:
        number = re.search(r" parameter\((\d+)\)", instruction.text)
        if instruction.opcode == "parameter" and number:
            found.append((int(number[1]), instruction.name))
    return found


def _root(body: list[Instruction]) -> Instruction:
    return next((i for i in body if i.text.lstrip().startswith("ROOT")), body[-1])


def _operands(instruction: Instruction) -> list[str]:
    inside = instruction.text.split(f" {instruction.opcode}(", 1)
    return re.findall(r"%([^\s,)]+)", inside[1].split(")", 1)[0]) if len(inside) > 1 else []


def _bytes(dtype: str, dims: str, layout: str) -> tuple[int, int]:
    """Return (bytes in the device's memory, bytes) of an array."""
    size = math.prod(int(n) for n in dims.split(",") if n) * bits(dtype) // 8
    return (0 if re.search(r"S\([1-9]", layout) else size), size


def _size(result: str) -> int:
    """Return the bytes of a result in the device's memory."""
    return sum(_bytes(*found)[0] for found in LAYOUT.findall(result))


def _whole(result: str) -> int:
    return sum(_bytes(*found)[1] for found in LAYOUT.findall(result))
