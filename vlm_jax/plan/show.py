"""A plan as tables in the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_jax.plan.fit import Trial
from vlm_jax.plan.report import COMPILED, Report
from vlm_jax.plan.speed import ROOFLINE

UNKNOWN = "not known"


def show(report: Report, console: Console | None = None) -> None:
    """Print a plan; its parameters too, where it has them."""
    console = console or Console(highlight=False)
    title = f"{report.model} on {report.topology}: {report.basis}"
    table = Table("", "", "", title=title, show_header=False)
    for what, value, note in _rows(report):
        if not what:
            table.add_section()
        else:
            table.add_row(Text(what), Text(value), Text(note))
    console.print(table)
    if report.remedy is not None:
        console.print(report.remedy, markup=False, soft_wrap=True)  # a line to copy
    if report.parameters is None:
        return
    listed = Table(title=f"{len(report.parameters)} parameters")
    listed.add_column("parameter", overflow="fold", ratio=1)  # a path is never cut
    for name in ("shape", "stored as", "sharded by", "bytes a device"):
        listed.add_column(name)
    for leaf in report.parameters:
        storage = f"{leaf.storage}, trains" if leaf.trains else leaf.storage
        shape = " x ".join(map(str, leaf.shape))
        listed.add_row(*map(Text, (leaf.path, shape, storage, leaf.spec, f"{leaf.bytes:,}")))
    console.print(listed)


def _rows(report: Report) -> Iterator[tuple[str, str, str]]:
    speed, work = report.speed, report.flops["all"]
    yield "verdict", report.verdict, report.said
    yield (
        "memory per device",
        f"{size(report.peak)} of {size(report.capacity)}",
        f"{report.peak / report.capacity:.0%} of the usable memory",
    )
    for name, part in report.parts.items():
        if part:
            yield f"  {name}", size(part), ""
    if report.moments_host:
        yield "  moments in pages", size(report.moments_host), "in the host's memory, not counted"
    yield "", "", ""
    mesh = ", ".join(f"{name} {length}" for name, length in report.mesh.items())
    yield "mesh", mesh, f"{report.devices} device{'s' * (report.devices > 1)}"
    parts = f", in {report.micro_batches} micro-batches" if report.micro_batches > 1 else ""
    row = f"{report.tokens:,} tokens, {report.patches:,} patches each{parts}"
    yield "rows per step", f"{report.rows:,}", row
    kept = "what each block keeps for the backward pass"
    yield "remat policy", report.remat_policy, kept
    for chosen in report.attention or ():
        name, _, what = chosen.partition(" for ")
        yield "attention", name, what
    yield "", "", ""
    named = {"forward": "forward", "activations": "by activations", "weights": "by weights"}
    split = ", ".join(f"{words} {work[key] / work['model']:.0%}" for key, words in named.items())
    yield "FLOPs of the model", flops(work["model"]), split
    yield "  recomputed", flops(work["recomputed"]), "rematerialisation"
    if report.bytes_accessed is not None:
        yield "memory traffic", size(report.bytes_accessed), "per device and step, reads and writes"
    if report.exchanges is None:
        yield "collectives", UNKNOWN, report.basis
    for one in report.exchanges or ():
        yield f"{one.kind} {one.dtype}", size(one.bytes), f"{one.count:,} per step"
    yield "", "", ""
    for name in ("compute", "memory", "network"):
        value = getattr(speed, name)
        why = "not published by the maker, or not compiled" if value is None else ""
        yield f"bound by {name}", seconds(value), why
    at_most, at_least = ("at most ", "at least ") if speed.rule == ROOFLINE else ("", "")
    yield "time per step", at_least * (speed.step is not None) + seconds(speed.step), speed.rule
    if speed.step is not None and report.fits:
        yield "tokens per second", f"{at_most}{speed.tokens_per_second:,.0f}", "all devices"
        if speed.mfu is not None:
            yield "MFU", f"{at_most}{speed.mfu:.1%}", "without recomputation and masked attention"
    for used in report.kernels or ():
        share = used.cycles / report.cycles if report.cycles else 0.0
        yield (
            f"  {used.name}",
            f"{share:.1%}",
            f"of the time, {used.runs:,} calls, by their bundles",
        )
    if report.cycles is not None and speed.compiler is None:
        yield "cycles", f"{report.cycles:,}", "the compiler's; the chip's clock is not published"
    yield "", "", ""
    yield "host, while loading", size(report.host_memory), f"an estimate: {report.host_rule}"
    if report.basis == COMPILED and report.compile_seconds is not None:
        yield "compilation", f"{report.compile_seconds:.0f} s", "on this machine"


def trial_line(trial: Trial) -> str:
    """Return one line of a search: the setting, whether it fits, how fast it is."""
    report = trial.report
    rate = report.speed.tokens_per_second
    speed = f", {rate:,.0f} tokens/s" if rate is not None and report.fits else ""
    return f"{report.verdict}: {size(report.peak)}{speed}  {trial.flags}"


def size(count: int) -> str:
    """Return bytes in words."""
    if abs(count) >= 10**8:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:.2f} MB" if abs(count) >= 10**4 else f"{count:,} B"


def flops(count: int) -> str:
    """Return FLOPs in words."""
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1e6:,.2f} MFLOP"


def seconds(value: float | None) -> str:
    """Return seconds in words."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"
