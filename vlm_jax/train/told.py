"""What a run says of its data and its step before it begins: one line, and the details."""

from typing import Any

from vlm_jax.data import Pipeline
from vlm_jax.model import Model


def headline(data: Pipeline, held_out: Pipeline | None, rows: int, total: int, mesh: Any) -> str:
    """Return how many records are trained and evaluated on, and in how many rows and steps."""
    report = data.report
    kept, seen, records = (report[key] for key in ("examples", "measured", "records"))
    words = f"{kept:,} of {_many(records, 'record')}"
    if seen < records:
        words = f"{_many(records, 'record')}, {kept:,} of the {seen:,} looked at fit"
    left_out = [f"{count:,} {reason}" for reason, count in report["dropped"].items()]
    changed = (("shrunk", "with smaller images"), ("turns_dropped", "without old turns"))
    notes = [f"{report[key]:,} {said}" for key, said in changed if report[key]]
    if left_out:
        notes.insert(0, f"left out: {', '.join(left_out)}")
    if notes:
        words += f" ({'; '.join(notes)})"
    if held_out is not None:
        words += f", {held_out.report['records']:,} to evaluate on"
    words += f"; {_many(rows, 'row')} a step"
    if mesh.size > 1:
        sizes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1)
        words += f" on {mesh.size} devices ({sizes})"
    words += f"; {_many(total, 'step')}"
    epoch = data.steps_per_epoch
    return words if epoch is None else f"{words}, {epoch:,} an epoch"


def details(data: Pipeline, model: Model) -> list[str]:
    """Return what `--verbose` prints: the shapes of rows, what stays empty, how a step computes."""
    report = data.report
    shapes = ", ".join(f"{tokens} x {patches}" for tokens, patches in data.shapes)
    again = "kept for" if model.remat == "none" else "computed again in"
    return [
        f"{'packed rows' if report['packing'] else 'rows'} of tokens x patches: {shapes}; "
        f"{report['padding']:.1%} of tokens and {report['patch_padding']:.1%} of patches stay "
        f"empty",
        f"norms and softmax in float32; layers are {again} the backward pass ({model.remat}); no "
        f"gradient is taken of frozen weights, so inputs need none",
    ]


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"
