"""Count the bundles of Pallas kernels, and write them to vlm_jax/plan/kernels.json.

    python scripts/bench/pallas_bundles.py FILE.hlo.gz ...
    python scripts/bench/pallas_bundles.py --usual [--chips v5e v5p v6e] [--longest 8192]

Needs no TPU: `pip install "vlm_jax[plan]"`. Each kernel is compiled alone, some seconds each, and
libtpu writes its program, bundle by bundle. What the table has already is left out; --again counts
it too. --usual: attention's kernels, in bfloat16, for rows of up to --longest positions, and those
of 4-bit weights. FILE: what tpu_step.py --keep wrote.

A bundle takes a cycle. Bundles are counted before the compiler folds those in which it only waits
for the matrix unit into delays. A kernel is one loop over its grid; blocks of it that a branch may
skip are counted by themselves: the largest computes, the others begin and end a result.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from tpu_step import read as read_kept

from vlm_jax import from_config, quantization
from vlm_jax.hardware import DEVICES
from vlm_jax.models.layers.attention import splash
from vlm_jax.models.layers.attention.mask import Form, Mask, Side
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.plan import kernels
from vlm_jax.plan.program import ARRAY, first, operands, parse_text
from vlm_jax.plan.schedule import is_kernel
from vlm_jax.plan.topologies import devices
from vlm_jax.plan.traffic import in_memory
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit

DUMP = Path(tempfile.gettempdir()) / f"vlm_jax.bundles.{os.getpid()}"
HEADS = 2
BF16, F32 = jnp.bfloat16, jnp.float32
SMALL = 32  # bundles of a branch, or a loop, that starts or awaits copies: part of each step
DELAY = 5  # a branch and the bundles behind it that run whatever it does
BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]+:)? *: *[> ]*\{")
BRANCH = re.compile(r"sbr\.rel .*?target bundleno = (\d+)")
DTYPES = {"bf16": "bfloat16", "f32": "float32", "s32": "int32", "u32": "uint32", "s8": "int8",
          "u8": "uint8", "f16": "float16"}  # fmt: skip


class Call(NamedTuple):
    """A kernel's call: the configuration of its custom call as JSON, shapes on both sides."""

    config: str
    takes: tuple[jax.ShapeDtypeStruct, ...]
    gives: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def kernel(self) -> kernels.Kernel:
        return kernels.decoded(json.loads(self.config)["body"])


lone = Primitive("lone_kernel")
lone.multiple_results = True


@lone.def_abstract_eval
def _(*_: Any, call: Call) -> list[Any]:
    return [jax.core.ShapedArray(one.shape, one.dtype) for one in call.gives]


def _lowered(context: Any, *operands: Any, call: Call) -> Any:
    results = [mlir.aval_to_ir_type(context.module_context, one) for one in context.avals_out]
    return stablehlo.CustomCallOp(
        results, list(operands), ir.StringAttr.get("tpu_custom_call"),
        backend_config=ir.StringAttr.get(f'{{"custom_call_config": {call.config}}}'),
        api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 1),
    ).results  # fmt: skip


mlir.register_lowering(lone, _lowered, platform="tpu")


def in_program(text: str) -> Iterator[Call]:
    """Yield the kernels of a compiled program."""
    program, _ = parse_text(text)
    for instruction in (i for body in program.values() for i in body if is_kernel(i)):
        config = first(r'"custom_call_config":(\{.*?\})', instruction.text)
        takes = instruction.text.partition("operand_layout_constraints={")[2]
        yield Call(config, _shapes(takes.partition("frontend_attr")[0].partition("metadata")[0]),
                   _shapes(instruction.result))  # fmt: skip


def _shapes(text: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(
        jax.ShapeDtypeStruct(tuple(int(n) for n in dims.split(",") if n), DTYPES[dtype])
        for dtype, dims in ARRAY.findall(text)
    )


def in_lowered(lowered: Any) -> Iterator[Call]:
    """Yield the kernels of a program that is not compiled yet."""
    found: list[Any] = []

    def look(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call":
            found.append(operation)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    for one in found:
        if ir.StringAttr(one.attributes["call_target_name"]).value == "tpu_custom_call":
            config = json.loads(ir.StringAttr(one.attributes["backend_config"]).value)
            sides = ([_shape(v.type) for v in side] for side in (one.operands, one.results))
            yield Call(json.dumps(config["custom_call_config"]), *map(tuple, sides))


def _shape(tensor: Any) -> jax.ShapeDtypeStruct:
    kind = ir.RankedTensorType(tensor)
    name = str(kind.element_type).replace("ui", "u").replace("i", "s").replace("su", "u")
    return jax.ShapeDtypeStruct(tuple(kind.shape), DTYPES[name])


def counted(text: str, edges: bool, blocks: bool) -> kernels.Bundles:
    """Return the bundles of a kernel's program, as libtpu writes it.

    edges, blocks: whether it begins and ends results apart from steps, and skips blocks; else all
    of it is a step's.
    """
    branches, last = [], 0
    for line in text.splitlines():
        if place := BUNDLE.match(line):
            last = int(place[1], 16)
            branches += [(last, int(to)) for to in BRANCH.findall(line)]
    loops = [(to, at) for at, to in branches if to <= at and at - to > SMALL]
    if len(loops) > 1:
        raise SystemExit(f"The kernel has {len(loops) - 1} loops inside of that over its grid.")
    start, end = (loops[0][0], loops[0][1] + DELAY) if loops else (0, last + 1)
    jumps = [(at + DELAY, to) for at, to in branches if to > at and start <= at < end]
    skipped = [  # without the one around all of a step, of which a pipeline's first runs nothing
        (a, b) for a, b in jumps if not any(a < c and d <= b and (c, d) != (a, b) for c, d in jumps)
        and len(jumps) > 1
    ]  # fmt: skip
    sizes = [b - a for a, b in skipped if b - a > SMALL] if edges else []
    block = max(sizes, default=0) if blocks else 0
    return kernels.Bundles(end - start - sum(sizes), block, sum(sizes) - block)


def measured(call: Call, chip: str) -> list[kernels.Bundles]:
    """Return the bundles of a kernel, compiled for a chip: its arrays near, and far."""
    edges = any(re.fullmatch(name, call.kernel.name) for name in kernels.LAYOUTS)

    def compiled(function: Any) -> tuple[kernels.Bundles, float]:
        """Return (its bundles, the share of its arrays that are far)."""
        for old in DUMP.glob("*"):
            old.unlink()
        program, entry = parse_text(lowered(chip, function, *call.takes).compile().as_text())
        made = {i.name: i for i in program[entry]}
        (own,) = (i for i in made.values() if is_kernel(i))
        arrays = [own.result, *(made[name].result for name in operands(own))]
        files = [p for p in DUMP.glob("*packed-bundles-post-ra.txt")
                 if "schedule-analysis" not in p.name and "lone_kernel" in p.name]  # fmt: skip
        if len(files) != 1:
            raise SystemExit(f"libtpu wrote {len(files)} programs for '{call.kernel.name}'.")
        text = files[0].read_text(encoding="utf-8")
        return counted(text, edges, call.kernel.tables), in_memory(arrays)

    def alone(*arrays: Any) -> Any:
        return lone.bind(*arrays, call=call)

    def between(*arrays: Any) -> Any:
        """What is made just before, and used just after, XLA keeps on the chip."""
        some = (x + 1 if jnp.issubdtype(x.dtype, jnp.integer) else -x for x in arrays)
        return [y + 1 if jnp.issubdtype(y.dtype, jnp.integer) else -y for y in alone(*some)]

    (far, _), (near, share) = compiled(alone), compiled(between)
    return [far if share else near, far]


def usual(chip: str, longest: int) -> Iterator[Call]:
    """Yield the kernels of rows of up to so many positions, and of 4-bit weights."""
    lengths: dict[tuple, tuple[bool, int]] = {}
    for length in range(splash.LANES, longest + 1, splash.LANES):
        sizes = splash.Sizes.of(length, length)
        form = (sizes.queries, sizes.keys, sizes.fused)
        # The shortest with several blocks of keys, whose edges are apart from its steps.
        lengths[form] = min(lengths.get(form, (True, length)), (length == sizes.keys, length))
    yield from decodes(chip)
    for _, length in sorted(lengths.values(), key=lambda one: one[1]):
        for causal, trains in itertools.product((True, False), repeat=2):
            yield from in_lowered(attention(chip, length, causal, trains))


def decodes(chip: str) -> Iterator[Call]:
    """Yield the kernels of 4-bit weights: every tile, and the scales of the known models."""
    from vlm_jax.weights import NF4
    from vlm_jax.weights import kernels as decoding

    def codes(words: jax.Array, scales: jax.Array) -> list[jax.Array]:
        return [decoding.decode(words, scales, NF4.VALUES, dtype) for dtype in (BF16, F32)]

    for rows, columns in itertools.product(decoding.ROWS, decoding.COLUMNS):
        # Three tiles a side: no larger one divides them.
        words = jax.ShapeDtypeStruct((3 * rows // decoding.CODES, 3 * columns), jnp.int32)
        scales = jax.ShapeDtypeStruct((3 * rows // decoding.BLOCK, 3 * columns), F32)
        yield from in_lowered(lowered(chip, codes, words, scales))
    shapes = {(inputs // decoding.BLOCK, outputs) for inputs, outputs in kernels_of_models()}
    shapes |= {(2**n, 3 * columns) for n in range(3, 10) for columns in decoding.COLUMNS[1:]}
    for shape in sorted(shapes):
        arrays = (jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct((256,), F32))
        yield from in_lowered(lowered(chip, decoding.look_up, *arrays))


def kernels_of_models() -> set[tuple[int, int]]:
    """Return [in, out] of the language models' kernels, of all known checkpoints."""
    found = set()
    for settings in KNOWN.values():
        model = from_config(settings, "bfloat16")
        for path, leaf in flatten(quantization.abstract(model, "nf4-dq")).items():
            if path.endswith("/kernel") and isinstance(leaf, FourBit):
                found.add(tuple(leaf.shape[-2:]))
    return found


def attention(chip: str, length: int, causal: bool, trains: bool) -> Any:
    """Return one row's attention, its gradients too where it trains, not compiled yet."""
    form = Form(causal, 128**-0.5)

    def row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        side = Side(jnp.arange(length, dtype=jnp.int32), segments)
        return splash.attend(q, k, v, Mask(side, side), form)

    def run(dy: jax.Array, *arrays: jax.Array) -> Any:
        if not trains:
            return row(*arrays)
        y, back = jax.vjp(lambda *qkv: row(*qkv, arrays[3]), *arrays[:3])
        return y, back(dy)

    shape = jax.ShapeDtypeStruct((1, length, HEADS, 128), BF16)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return lowered(chip, run, shape, shape, shape, shape, segments)


def lowered(chip: str, function: Any, *shapes: jax.ShapeDtypeStruct) -> Any:
    """Return a function of shapes, traced for one chip and not compiled yet."""
    one = on_chip(chip)
    placed = (jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one) for s in shapes)
    return jax.jit(function).lower(*placed)


def on_chip(chip: str) -> NamedSharding:
    shape = "x".join("1" * DEVICES[chip].dimensions)
    return NamedSharding(Mesh(np.array(devices(f"{chip}:{shape}")[:1]), ("d",)), PartitionSpec())


def add(chip: str, calls: Sequence[Call], again: bool) -> None:
    """Count the kernels that the table does not have, and write it after each."""
    for call in calls:
        kernel, known = call.kernel, kernels.table()
        if kernels.bundles(kernel, chip) is not None and not again:
            continue
        began = time.perf_counter()
        bundles = measured(call, chip)
        known.setdefault(chip, {}).setdefault(kernel.name, {})[kernel.key] = bundles
        text = json.dumps(known, indent=1, sort_keys=True)
        text = re.sub(r"\[[\d\[\],\s]*\]", lambda one: re.sub(r"\s+", "", one[0]), text)
        kernels.TABLE.write_text(f"{text}\n", encoding="utf-8")
        print(f"{chip} {kernel.name} {kernel.key}: {[tuple(one) for one in bundles]}, "
              f"{time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--usual", action="store_true")
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"], metavar="CHIP")
    parser.add_argument("--longest", type=int, default=8192, metavar="N")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args(arguments)
    # Read where libtpu is loaded, with the first topology.
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"
    try:
        for file in options.files:
            facts, text = read_kept(file)
            add(facts["device"], list(in_program(text)), options.again)
        for chip in options.chips if options.usual else ():
            add(chip, list(usual(chip, options.longest)), options.again)
    finally:
        shutil.rmtree(DUMP, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
