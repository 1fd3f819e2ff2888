"""Rotary position embeddings as a config.json describes them; `layers.rope` computes with them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError, refuse
from vlm_jax.files.limits import number


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions become angles; the names are those of Hugging Face's `rope_parameters`."""

    head_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    max_position: int = 0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    mrope_section: tuple[int, ...] = ()


_KNOWN = frozenset(
    """rope_type type rope_theta factor original_max_position_embeddings low_freq_factor
    high_freq_factor beta_fast beta_slow attention_factor truncate mscale mscale_all_dim
    mrope_section partial_rotary_factor""".split()
)
KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_from_hf(
    parameters: Mapping[str, Any] | None, theta: float, head_dim: int, max_position: int, where: str
) -> Rope:
    """Return the `Rope` of `rope_parameters` (5.x) or `rope_scaling` (4.x), or raise by name."""
    given = {name: value for name, value in (parameters or {}).items() if value is not None}
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise UserError(f"The rope parameters of the {where} hold unknown fields: {unknown}.")
    section = given.get("mrope_section", ())
    for name, value in given.items():
        if name in ("rope_type", "type", "truncate", "mrope_section"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"The {where} has the rope parameter {name} = {value!r}, no number.")
        number(name, value, where)
    number("rope_theta", float(given.get("rope_theta", theta)), where, above=0)
    if not isinstance(section, list | tuple) or not all(isinstance(n, int) for n in section):
        raise UserError(f"The {where} has mrope_section = {section!r}; expected whole numbers.")
    kind = given.get("rope_type", given.get("type", "default"))
    # "mrope" is 4.x's name of the default frequencies with three axes.
    kind = "default" if kind == "mrope" else kind
    refuse(
        (
            kind not in KINDS,
            f"The {where} asks for rope type '{kind}', which is not supported; supported: "
            f"{', '.join(KINDS)} and mrope.",
        ),
        (
            given.get("partial_rotary_factor", 1.0) != 1.0,
            f"The {where} sets partial_rotary_factor, which is not supported.",
        ),
        (
            section and sum(section) != head_dim // 2,
            f"The mrope_section {list(section)} of the {where} sums to {sum(section)}, but half "
            f"the head dimension is {head_dim // 2}; the two must be equal.",
        ),
    )
    original = given.get("original_max_position_embeddings") or max_position
    stretch = max_position / original if kind == "yarn" else 1.0
    return Rope(
        head_dim=head_dim,
        theta=float(given.get("rope_theta", theta)),
        kind=kind,
        factor=float(given.get("factor") or stretch),
        max_position=max_position,
        original_max_position=original,
        low_freq_factor=given.get("low_freq_factor", 1.0),
        high_freq_factor=given.get("high_freq_factor", 4.0),
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        attention_factor=given.get("attention_factor"),
        truncate=given.get("truncate", True),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        mrope_section=tuple(section),
    )
