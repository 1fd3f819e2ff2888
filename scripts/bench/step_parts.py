"""Where the cycles of a compiled step go: the part of the model and the phase of each instruction.

A fusion has the name of its root alone, so what is inside of it is looked at too.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlm_jax.plan.program import ARRAY, KIND, Instruction, Program, called_by, first, operands
from vlm_jax.plan.schedule import Timed, is_kernel

PHASES = ("forward", "recomputed", "backward", "once")
HASH = "2246822507"  # 0x85EBCA6B of murmur3's finaliser, which makes dropout's bits
TOWER = r"visual|vision|TowerBlock|patch_embed|EncoderLayer"
# The part of a Pallas kernel, by the beginning of its name.
KERNELS = {"splash": "attention kernels", "nf4": "NF4 decode kernels", "": "other kernels"}
PLAIN_ATTENTION = r"BTKGH|BKGTS|softmax|SKH"


class Seen(NamedTuple):
    """What is known of an instruction: its own name, all names inside, operations, rank or not."""

    instruction: Instruction
    name: str
    names: str
    operations: frozenset[str]
    text: str  # of all that is inside
    thin: bool  # its products all have a side of LoRA's rank

    def has(self, *operations: str) -> bool:
        return any(one in self.operations for one in operations)

    @property
    def multiplies(self) -> bool:
        return self.has("convolution", "dot")


class Reader:
    """Looks into the computations of a program; rank: LoRA's, 0 for none."""

    def __init__(self, program: Program, rank: int):
        self.program, self.rank = program, rank
        self.inside = functools.cache(self._inside)

    def _inside(self, name: str) -> tuple[Instruction, ...]:
        """Return the instructions of a computation and of those that it calls."""
        own = self.program.get(name, [])
        return tuple(own) + tuple(i for one in own for c in called_by(one) for i in self.inside(c))

    def seen(self, instruction: Instruction) -> Seen:
        inner = [i for c in called_by(instruction) for i in self.inside(c)]
        every = [instruction, *inner]
        names = [first(r'op_name="([^"]*)"', i.text) for i in every]
        return Seen(
            instruction,
            names[0],
            " ".join(names),
            frozenset(i.opcode for i in every),
            "\n".join(i.text for i in every),
            self._thin(every),
        )

    def _thin(self, every: Sequence[Instruction]) -> bool:
        """Return whether each product has a side whose one dimension is LoRA's rank."""
        shapes = {i.name: _shape(i.result) for i in every}
        products = [i for i in every if i.opcode in ("convolution", "dot")]
        return bool(products) and all(
            any(
                self.rank in side and len(side) <= 2
                for side in (shapes[i.name], *(shapes.get(name, []) for name in operands(i)))
            )
            for i in products
        )


def _shape(result: str) -> list[int]:
    """Return the dimensions of a result, those of 1 left out."""
    found = ARRAY.search(result)
    return [int(n) for n in found[2].split(",") if n and n != "1"] if found else []


def phase(name: str) -> str:
    """Return when an operation runs, by its name: forward, recomputed, backward or once."""
    if "rematted_computation" in name:
        return "recomputed"
    if "transpose(" in name:
        return "backward"
    return "forward" if "jvp(" in name else "once"


def in_tower(seen: Seen) -> bool:
    return bool(re.search(TOWER, seen.name)) or ("TowerBlock" in seen.names)


def in_projector(seen: Seen) -> bool:
    return bool(re.search(r"merger|projector", seen.name))


def in_layers(seen: Seen) -> bool:
    return bool(re.search(r"/layers/|DecoderLayer|Stack", seen.name))


def drops(seen: Seen) -> bool:
    """Whether random bits are made inside."""
    return HASH in seen.text or bool(re.search(r"random_bits|threefry|bernoulli", seen.names))


def decodes(seen: Seen) -> bool:
    return bool(re.search(r"\b[us]4\[", seen.text)) and seen.has("select", "gather", "convert")


def is_copy(seen: Seen) -> bool:
    return bool(
        re.match(r"copy|slice-|transpose|bitcast|async-|dynamic-slice", seen.instruction.opcode)
    )


def attends(seen: Seen) -> bool:
    inside = re.search(PLAIN_ATTENTION, seen.names)
    softmax = (
        re.search(r"(self_)?attn/", seen.name)
        and re.search(r"reduce_|/exp|max|select_n|/sub|/div", seen.name)
        and not re.search(r"_proj|splash", seen.name)
    )
    return bool(inside or (softmax and not seen.multiplies))


def stores(seen: Seen) -> bool:
    """Whether it only writes into a stack, as activations that are kept for the backward pass."""
    return seen.has("dynamic-update-slice") and not seen.multiplies


# The part of an instruction: the first row that holds. Order matters: what comes first is what a
# reader of the table looks for, wherever in the model it is.
PARTS: tuple[tuple[str, Callable[[Seen], bool]], ...] = (
    ("projector", in_projector),
    ("dropout bits", lambda s: drops(s) and not s.multiplies),
    ("tower: attention", lambda s: in_tower(s) and attends(s)),
    ("tower: products", lambda s: in_tower(s) and s.multiplies),
    ("copies, layout", is_copy),
    ("tower: elementwise", in_tower),
    ("attention", attends),
    ("NF4 decode", lambda s: decodes(s) and not s.multiplies),
    (
        "loss head",
        lambda s: (
            not in_layers(s)
            and bool(re.search(r"lm_head|logits|logsumexp|take_along_axis|head_loss", s.names))
        ),
    ),
    ("LoRA products, dropout inside", lambda s: s.thin and drops(s)),
    ("LoRA products", lambda s: s.thin),
    ("products, NF4 decode inside", lambda s: s.multiplies and decodes(s)),
    ("products", lambda s: s.multiplies),
    ("stores, optimizer", stores),
    ("slices of stacked layers", lambda s: s.name.endswith("/dynamic_slice")),
    ("collectives", lambda s: any(re.match(rf"({KIND})", one) for one in s.operations)),
    ("stores, optimizer", lambda s: phase(s.name) == "once"),
    ("elementwise, norms, rope", lambda s: True),
)  # fmt: skip


class Row(NamedTuple):
    """An instruction of the schedule, with its part and phase."""

    timed: Timed
    part: str
    phase: str
    name: str


def rows(program: Program, schedule: Sequence[Timed], rank: int) -> list[Row]:
    """Return what of a schedule takes time, kernels included."""
    reader, found = Reader(program, rank), []
    for one in schedule:
        if is_kernel(one.instruction):
            name = first(r'op_name="([^"]*)"', one.instruction.text)
            kernel = one.instruction.name.rsplit(".", 1)[0]
            part = next(part for words, part in KERNELS.items() if re.match(words, kernel))
            where = "tower: " if re.search(TOWER, name) else ""
            found.append(Row(one, f"{where}{part}", phase(name), name))
        elif one.cycles:
            seen = reader.seen(one.instruction)
            part = next(part for part, holds in PARTS if holds(seen))
            found.append(Row(one, part, phase(seen.name), seen.name))
    return found
