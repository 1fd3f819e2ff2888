"""What a compiled TPU program runs, instruction by instruction, and how long each takes.

The compiler writes an estimate of its own beside each instruction, in cycles. Waiting for other
chips is in none of them, and a Pallas kernel has none (see `kernels.py`).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from vlm_jax.errors import UserError
from vlm_jax.hardware import DEVICES
from vlm_jax.plan.program import Instruction, Program, called_by, first, parse, trips

KERNEL = 'custom_call_target="tpu_custom_call"'


class Timed(NamedTuple):
    """An instruction of the schedule. times: how often a step runs it. cycles: of one run."""

    instruction: Instruction
    times: int
    cycles: int

    @property
    def total(self) -> int:
        return self.times * self.cycles


def is_kernel(instruction: Instruction) -> bool:
    """Return whether it runs a Pallas kernel, of which XLA has no estimate."""
    return instruction.opcode == "custom-call" and KERNEL in instruction.text


def schedule(
    program: Program, entry: str, kernel: Callable[[str, Instruction], int] = lambda *_: 0
) -> list[Timed]:
    """Return what a TPU program runs, in order.

    kernel: (computation, custom call) -> cycles of a Pallas kernel, as `kernels.timing` gives them.

    Loops count as often as they run, of a branch the longest side. Raises `UserError` for a program
    of another compiler.
    """
    if not any('"estimated_cycles"' in i.text for lines in program.values() for i in lines):
        raise UserError(
            "This program carries no estimated cycles: only the TPU compiler gives them."
        )

    @functools.cache
    def cycles(name: str) -> int:
        return sum(one.total for one in run(name, 1))

    def run(name: str, times: int) -> Iterator[Timed]:
        for instruction in program[name]:
            if instruction.opcode == "conditional":
                yield from run(max(called_by(instruction), key=cycles), times)
            elif instruction.opcode == "while":
                for called in called_by(instruction):
                    yield from run(called, times * trips(program, instruction))
            elif instruction.opcode in ("call", "async-start"):
                for called in called_by(instruction):
                    yield from run(called, times)
            elif is_kernel(instruction):
                yield Timed(instruction, times, kernel(name, instruction))
            else:
                yield Timed(instruction, times, _estimate(instruction))

    return list(run(entry, 1))


def estimated_cycles(compiled: jax.stages.Compiled) -> int:
    """Return the cycles of a TPU program, as its compiler estimates each instruction's.

    The time of Pallas kernels is not in it. See `schedule` for errors.
    """
    return sum(one.total for one in schedule(*parse(compiled)))


def estimated_seconds(compiled: jax.stages.Compiled) -> float:
    """Return the seconds of a TPU program: `estimated_cycles` at the chip's clock.

    Raises `UserError` where the clock is not known; see `estimated_cycles` for what is left out.
    """
    cycles = estimated_cycles(compiled)
    shardings = jax.tree.leaves(compiled.input_shardings)
    kind = next(iter(shardings[0].device_set)).device_kind
    clock = next((device.clock for device in DEVICES.values() if device.kind == kind), None)
    if clock is None:
        raise UserError(f"The clock of '{kind}' is not published; use estimated_cycles.")
    return cycles / clock


def _estimate(instruction: Instruction) -> int:
    count = int(first(r'"estimated_cycles":"(\d+)"', instruction.text, "0"))
    # Of what it has no estimate the compiler writes -1, in 64 bits without a sign.
    return count if count < 2**63 else 0
