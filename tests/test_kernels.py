"""Times of Pallas kernels in compiled steps, and the scripts that find and show them."""

import gzip
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax import UserError, plan
from vlm_jax.hardware import DEVICES
from vlm_jax.models.layers.attention import splash
from vlm_jax.models.layers.attention.mask import Form, Mask, Side
from vlm_jax.plan import kernels, report
from vlm_jax.plan.program import parse
from vlm_jax.plan.schedule import is_kernel, schedule
from vlm_jax.sharding import make_mesh

SCRIPTS = Path(__file__).parents[1] / "scripts" / "bench"
LENGTH, HEADS, RUNS = 1024, 2, 3


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(SCRIPTS)])


def mask(length, segments=1):
    """Return the mask of one row of equal segments."""
    segments_BT = (jnp.arange(length, dtype=jnp.int32) // (length // segments) + 1)[None]
    side = Side(jnp.arange(length, dtype=jnp.int32), segments_BT)
    return Mask(side, side)


@pytest.fixture(scope="module")
def compiled():
    """Causal attention in a loop, its output multiplied by a kernel, for one v5e."""

    def run(x, w):
        def body(x, _):
            out = splash.attend(x, x, x, mask(LENGTH), Form(True, 1.0))
            return (out.reshape(LENGTH, -1) @ w).reshape(x.shape), None

        return jax.lax.scan(body, x, None, length=RUNS)[0]

    one = NamedSharding(make_mesh(devices=plan.devices("v5e:1x1")), PartitionSpec())
    shapes = ((1, LENGTH, HEADS, 128), (HEADS * 128, HEADS * 128))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in shapes]
    return jax.jit(run).lower(*arrays).compile()


def test_a_kernel_of_a_program_with_its_time(compiled):
    program, entry = parse(compiled)
    timed = schedule(program, entry, kernels.timing(program, "v5e"))
    (own,) = (one for one in timed if is_kernel(one.instruction))
    kernel = kernels.read(own.instruction)
    assert kernel.name.startswith("splash_mha_fwd") and kernel.grid == (HEADS, 2, 1)
    assert kernel.parallel == (True, False, False) and kernel.tables
    assert own.times == RUNS
    # Two products of [512, 1024] scores a block, of 128 x 128 x 4 multiplications a cycle.
    least = HEADS * 2 * 2 * 512 * LENGTH * 128 / (4 * 128 * 128)
    assert least < own.cycles < 2 * least
    rest = plan.estimated_cycles(compiled)
    assert sum(one.total for one in timed) == rest + RUNS * own.cycles
    assert kernels.used(timed) == [(kernel.name, RUNS, RUNS * own.cycles)]


def test_a_kernel_takes_its_bytes_at_least(compiled, monkeypatch):
    table = kernels.table()["v5e"]
    nothing = {n: {key: [[0, 0, 0]] * 2 for key in known} for n, known in table.items()}
    monkeypatch.setattr(kernels, "table", lambda: {"v5e": nothing})
    monkeypatch.setattr(kernels, "accessed", lambda *_: 10**6)
    program, entry = parse(compiled)
    times = schedule(program, entry, kernels.timing(program, "v5e"))
    (own,) = (one for one in times if is_kernel(one.instruction))
    device = DEVICES["v5e"]
    assert own.cycles == math.ceil(10**6 / device.bandwidth * device.clock)


def test_a_kernel_without_an_entry_is_refused(compiled, monkeypatch):
    monkeypatch.setattr(kernels, "table", lambda: {})
    with pytest.raises(UserError, match=r"'splash_mha_fwd.*no bundles on v5e.*needs .* GiB"):
        report._timed(compiled, "v5e")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [1, 4])
def test_blocks_that_run_are_those_that_attention_launches(causal, segments):
    length = 4096
    sizes = splash.Sizes.of(length, length)
    every, run = splash.launched(mask(length, segments), Form(causal, 1.0), HEADS)["forward"]
    grid = (length // sizes.queries, length // sizes.keys)
    seen = kernels.blocks_seen(*grid, sizes.queries, sizes.keys, causal, segments)
    assert (every, run) == (HEADS * grid[0] * grid[1], HEADS * seen)


def test_two_cores_share_what_is_parallel():
    kernel = kernels.Kernel("one", (2, 4), (True, False), ("8x128xf32",), False, 1)
    known, run = kernels.Bundles(10, 0, 0), kernels.Steps(8, 8, 8)
    assert kernels.cycles(kernel, known, run, "v5e") == 80
    assert kernels.cycles(kernel, known, run, "v5p") == 40
    alone = kernel._replace(parallel=(False, False))
    assert kernels.cycles(alone, known, run, "v5p") == 80


# Bundles 0 to 299; a step is 10 to 290. Without its loop's guard, branches skip 40 to 60 (edge),
# 100 to 200 (block), and 220 to 230, which starts a copy.
BRANCHES = {12: 285, 35: 60 + 40, 95: 200, 215: 230, 285: 10}


def bundles(branches):
    """Return a program as libtpu writes it, of so many bundles and {bundle: target} branches."""
    lines = []
    for at in range(300):
        jump = f";;  %9 = sbr.rel (%p1) target bundleno = {branches.get(at)} (0x0), region = 4 "
        label = "LB:" if at == 10 else "   "
        lines.append(f"{at or 0:#5x} {label}: > {{ %v = vld [%s] {jump * (at in branches)}}}")
    return "\n".join(lines)


def test_bundles_of_a_step_and_of_what_it_skips(scripts):
    import pallas_bundles

    text = f"= control target key start\nLH: loop header\n{bundles(BRANCHES)}\n"
    assert pallas_bundles.counted(text, True, True) == (280 - 60 - 100, 100, 60)
    assert pallas_bundles.counted(text, True, False) == (280 - 160, 0, 160)
    assert pallas_bundles.counted(text, False, False) == (280, 0, 0)
    with pytest.raises(SystemExit, match="loops inside"):
        pallas_bundles.counted(bundles({**BRANCHES, 150: 110}), True, True)


def test_where_the_cycles_of_a_kept_step_go(scripts, compiled, tmp_path, capsys):
    import tpu_step

    facts = {
        "config": "a.py", "topology": "v5e:1x1", "device": "v5e", "mesh": {"fsdp": 1}, "rank": 8,
        "rows": 1, "tokens": LENGTH, "patches": 0, "micro_batches": 1, "remat_policy": "block",
        "useful_flops": 1e9, "processor_seconds": 1.0,
        "memory": {"arguments": 1, "temporary": 1, "peak": 2},
    }  # fmt: skip
    file = tmp_path / "step.hlo.gz"
    tpu_step.keep(file, facts, compiled.as_text())
    assert tpu_step.main(["--read", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert sum(sum(phases.values()) for phases in said["parts"].values()) == said["cycles"]
    assert said["parts"]["attention kernels"]["once"] == said["kernels"][0]["cycles"]
    assert said["parts"]["products"]["once"] > 0
    assert said["mfu"] == pytest.approx(1e9 / 197e12 / (said["cycles"] / 1.5e9))
    assert tpu_step.main(["--read", str(file), "--list", "3"]) == 0
    printed = capsys.readouterr().out
    assert "splash_mha_fwd" in printed and max(map(len, printed.splitlines())) <= 80
    with gzip.open(file, "wt") as other:
        other.write("HloModule step\n")
    assert tpu_step.main(["--read", str(file)]) == 1


def test_the_power_of_a_size_that_fits(scripts):
    import scaling

    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert scaling.exponent([1, 4, 16], [5, 5, 5]) == pytest.approx(0)
