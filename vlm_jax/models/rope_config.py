"""Rotary position embeddings as a config.json describes them; `layers.rope` computes with them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError, refuse
from vlm_jax.files.limits import number


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions become angles; the names are those of Hugging Face's `rope_parameters`.

    partial_rotary_factor: the share of a head that turns, its first numbers; the angles of kind
    "proportional" are 0 behind it. mrope_interleaved: frequencies turn with time, height, width,
    time, ... as far as mrope_section goes, not section by section. pairs: neighbours turn
    together, not the two halves.
    """

    head_dim: int
    theta: float
    kind: str = "default"
    partial_rotary_factor: float = 1.0
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
    mrope_interleaved: bool = False
    pairs: bool = False

    @property
    def turned(self) -> int:
        """How many numbers of a head turn: the width of its cosines and sines, doubled."""
        whole = self.kind == "proportional"
        return self.head_dim if whole else int(self.head_dim * self.partial_rotary_factor)


_KNOWN = frozenset(
    """rope_type type rope_theta factor original_max_position_embeddings low_freq_factor
    high_freq_factor beta_fast beta_slow attention_factor truncate mscale mscale_all_dim
    mrope_section mrope_interleaved partial_rotary_factor""".split()
)
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "proportional")


def rope_from_hf(
    parameters: Mapping[str, Any] | None,
    theta: float,
    head_dim: int,
    max_position: int,
    where: str,
    *,
    partial: bool = False,
    interleaved: bool = False,
    pairs: bool = False,
) -> Rope:
    """Return the `Rope` of `rope_parameters` (5.x) or `rope_scaling` (4.x), or raise by name.

    partial: whether the reference's class reads `partial_rotary_factor`. interleaved, pairs: how
    it computes, whatever a config.json says of it.
    """
    given = {name: value for name, value in (parameters or {}).items() if value is not None}
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise UserError(f"The rope parameters of the {where} hold unknown fields: {unknown}.")
    section = given.get("mrope_section", ())
    for name, value in given.items():
        if name in ("rope_type", "type", "truncate", "mrope_section", "mrope_interleaved"):
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
    share = given.get("partial_rotary_factor", 1.0)
    refuse(
        (
            kind not in KINDS,
            f"The {where} asks for rope type '{kind}', which is not supported; supported: "
            f"{', '.join(KINDS)} and mrope.",
        ),
        (
            share != 1.0 and not partial,
            f"The {where} sets partial_rotary_factor, which is not supported.",
        ),
        (
            not 0 < share <= 1,
            f"The {where} has partial_rotary_factor = {share}; expected more than 0 and at most 1.",
        ),
        (
            given.get("mrope_interleaved", interleaved) is not interleaved,
            f"The {where} has mrope_interleaved = {given.get('mrope_interleaved')!r}; this model "
            f"computes with {str(interleaved).lower()}, in transformers too.",
        ),
    )
    original = given.get("original_max_position_embeddings") or max_position
    stretch = max_position / original if kind == "yarn" else 1.0
    rope = Rope(
        head_dim=head_dim,
        theta=float(given.get("rope_theta", theta)),
        kind=kind,
        partial_rotary_factor=float(share),
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
        mrope_interleaved=interleaved,
        pairs=pairs,
    )
    turned = rope.turned
    refuse(
        (
            turned % 2 or not turned,
            f"The {where} turns {turned} of a head's {head_dim} numbers (partial_rotary_factor); "
            f"rotary positions turn pairs, so it must be even.",
        ),
        (
            section and not interleaved and sum(section) != turned // 2,
            f"The mrope_section {list(section)} of the {where} sums to {sum(section)}, but half "
            f"of what turns of a head is {turned // 2}; the two must be equal.",
        ),
    )
    return rope
