"""Which layers of a Linen module a LoRA's targets mean."""

import re
from collections.abc import Sequence

from vlm_jax.errors import UserError, nearest
from vlm_jax.limits import check_patterns
from vlm_jax.linen.parts import Layer, Other
from vlm_jax.targets import PRESETS


def chosen(found: Sequence[Layer | Other], targets: str | tuple[str, ...]) -> list[Layer]:
    """Return the layers that are meant, in the tree's order.

    A suffix matches whole parts at the end of a layer's dotted name; one that names no layer but a
    module around some, such as an attention module, means all linear layers in it. A preset is a
    list of suffixes, any other string a regex over the whole name, "all-linear" every linear layer,
    a head too: what is the head of a foreign module cannot be known. Modules that have a kernel
    but are no layer of these, convolutions for one, are passed over by presets, "all-linear" and
    by the name of a module around them, and are an error where they are named themselves.
    Raises `UserError` for a target that matches nothing, or what cannot be adapted.
    """
    if targets == "all-linear":
        hits = [one for one in found if _is_linear(one)]
        if not hits:
            raise _nothing("all-linear", found)
        return _layers("all-linear", hits)
    if isinstance(targets, str) and targets not in PRESETS:
        check_patterns([targets], [one.name for one in found], "LoRA target")
        hits = [one for one in found if re.fullmatch(targets, one.name)]
        if not hits:
            raise _nothing(targets, found)
        return _layers(targets, hits, named=True)
    names = PRESETS[targets] if isinstance(targets, str) else targets
    if not names:
        raise UserError(
            f"LoRA's targets are empty. Name suffixes, a preset ({', '.join(PRESETS)}), "
            f"'all-linear', or one regex over whole names."
        )
    wanted: set[str] = set()
    for name in names:
        hits, named = [one for one in found if _ends(one.name, name)], targets not in PRESETS
        if not hits:
            hits = [one for one in found if _is_linear(one) and _lies_in(one.name, name)]
            named = False
        layers = _layers(name, hits, named)
        if not layers:
            raise _nothing(name, found)
        wanted |= {layer.path for layer in layers}
    return [one for one in found if isinstance(one, Layer) and one.path in wanted]


def _is_linear(one: Layer | Other) -> bool:
    return one.unknown if isinstance(one, Other) else one.weight == "kernel"


def _ends(name: str, suffix: str) -> bool:
    return f".{name}".endswith(f".{suffix}")


def _lies_in(name: str, module: str) -> bool:
    """Return whether one of the modules around `name` is named so."""
    parts = name.split(".")
    return any(_ends(".".join(parts[:i]), module) for i in range(1, len(parts)))


def _layers(target: str, hits: Sequence[Layer | Other], named: bool = False) -> list[Layer]:
    for one in hits:
        if isinstance(one, Other) and (named or one.unknown):
            raise UserError(
                f"The LoRA target '{target}' means '{one.name}', which cannot be adapted: "
                f"{one.why}. LoRA goes on nn.Dense, nn.DenseGeneral, nn.Einsum without a batch "
                f"axis and nn.Embed."
            )
    return [one for one in hits if isinstance(one, Layer)]


def _nothing(target: str, found: Sequence[Layer | Other]) -> UserError:
    names = [one.name for one in found if isinstance(one, Layer)]
    ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return UserError(
        f"The LoRA target '{target}' matches no linear layer or embedding of the module"
        f"{nearest(target, ends)}. It has {', '.join(ends[:20]) or 'none'}. Name suffixes, a "
        f"preset ({', '.join(PRESETS)}), 'all-linear', or one regex over whole names such as "
        f"'{names[0] if names else 'layers_0.q_proj'}'."
    )
