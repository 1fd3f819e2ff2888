"""Targets of LoRA and bottleneck adapters in a Linen module; the bottleneck's computation.

A module of input x and output y becomes y + A(y) (houlsby, https://arxiv.org/abs/1902.00751) or
y + A(x) (parallel, https://arxiv.org/abs/2110.04366), over last axes, with A of
`layers.bottleneck.bottleneck`. What pfeiffer reads, the sum of y and the residual stream
(https://arxiv.org/abs/2005.00247), no call of a module sees.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax

from vlm_jax.adapters.bottleneck import check_known, leaf_shapes
from vlm_jax.adapters.modules_to_save import owners
from vlm_jax.adapters.targets import PRESETS, means, no_target, resolve_targets, suffixes_of
from vlm_jax.errors import UserError, nearest
from vlm_jax.files.limits import check_patterns
from vlm_jax.linen.intercept import name_of, warn_without_dropout
from vlm_jax.linen.parts import Layer, Other, Site, first_argument, joined, laid, shape_of
from vlm_jax.models.layers.bottleneck import Bottleneck, bottleneck
from vlm_jax.models.methods import Adapter, LoRA


def chosen(found: Collection[Layer | Other], targets: str | tuple[str, ...]) -> list[Layer]:
    """Return the layers that are meant, in the tree's order.

    A suffix matches whole parts at the end of a layer's dotted name; one that names no layer but a
    module around some, such as an attention module, means all linear layers in it. A preset is a
    list of suffixes, any other string a regex over the whole name, "all-linear" every linear layer,
    a head too: what is the head of a foreign module cannot be known. Modules that have a kernel
    but are no layer of these, convolutions for one, are passed over by presets, "all-linear" and
    by the name of a module around them, and are an error where they are named themselves.
    Raises `UserError` for a target that matches nothing, or what cannot be adapted.
    """
    by_name = {one.name: one for one in found}
    layers = {name: one for name, one in by_name.items() if isinstance(one, Layer)}
    linear = [
        one.name
        for one in found
        if (one.weight == "kernel" if isinstance(one, Layer) else one.unknown)
    ]
    meant = resolve_targets(targets, by_name, linear, by_name)
    if not meant:
        raise UserError(
            f"LoRA's targets are empty. Name suffixes, a preset ({', '.join(PRESETS)}), "
            f"'all-linear', or one regex over whole names."
        )
    wanted: set[str] = set()
    for target, names in meant.items():
        named = targets != "all-linear" and targets not in PRESETS
        if not names and target in suffixes_of(targets):
            names = [n for n in linear if any(means((target,), outer) for outer in owners(n))]
            named = False
        for one in (by_name[name] for name in names):
            if isinstance(one, Other) and (named or one.unknown):
                raise UserError(
                    f"The LoRA target '{target}' means '{one.name}', which cannot be adapted: "
                    f"{one.why}. LoRA goes on nn.Dense, nn.DenseGeneral, nn.Einsum without a batch "
                    f"axis and nn.Embed."
                )
        if not layers.keys() & names:
            raise no_target(target, layers, "the module")
        wanted |= layers.keys() & names
    return [layer for name, layer in layers.items() if name in wanted]


@dataclasses.dataclass(frozen=True)
class Beside:
    """An addition: the leaves of one bottleneck, nested as `bottleneck` takes them."""

    idle: ClassVar[str] = (
        "was called, and not its __call__, whose output an adapter changes: it would do nothing. "
        "Leave it out of the adapter's targets, or name the modules that it calls."
    )

    leaves: Any
    form: Bottleneck

    def change(self, y: Any, args: tuple, kwargs: dict, context: Any, within: list[str]) -> Any:
        if context.method_name != "__call__" or "__call__" in within:  # as super()'s
            return None
        module, reads_x = context.module, self.form.reads == "input"
        read = first_argument(context.orig_method, args, kwargs) if reads_x else y
        down, up = (self.leaves[name]["kernel"].shape for name in ("adapter_down", "adapter_up"))
        x_shape, y_shape = shape_of(read), shape_of(y)
        if x_shape[:-1] != y_shape[:-1] or (x_shape[-1:], y_shape[-1:]) != (down[:-1], up[1:]):
            raise UserError(
                f"The adapter of '{name_of(module)}' has the matrices {list(down)} and {list(up)}, "
                f"but reads {x_shape} and changes {y_shape} in this call, unlike in the one that "
                f"adapt traced. Give adapt `inputs=` of such a call, or remove it from the targets."
            )
        if not module.has_rng("dropout"):
            warn_without_dropout("adapter", self.form.dropout, [name_of(module)])
        return y + bottleneck(module, self.form, self.leaves, read, y.dtype)


jax.tree_util.register_dataclass(Beside, data_fields=["leaves"], meta_fields=["form"])


def check_adapter(adapter: Adapter) -> None:
    """Raise `UserError` for what adapters of foreign modules lack, and without targets."""
    check_known(adapter)
    if adapter.form.reads == "sum":
        raise UserError(
            "An adapter of kind 'pfeiffer' reads the sum of the residual stream and a block's "
            "output, which no call of a foreign module sees. Take Adapter('houlsby', ...) with the "
            "MLP alone as target, which reads that output before the sum."
        )
    check_lacking(
        adapter,
        components="looking into components of a vision-language model (targets name modules)",
        modules_to_save="saving further modules in full (train them as leaves of 'params')",
    )
    if not adapter.targets:
        raise UserError(
            "The adapter's targets are empty. Name the modules whose output gets one: suffixes "
            "such as ('attn', 'mlp'), or one regex over whole dotted names."
        )


def check_lacking(method: LoRA | Adapter, **lacking: str) -> None:
    """Raise `UserError` where a field is set; lacking: what each field asks for."""
    for name, what in lacking.items():
        if getattr(method, name) != getattr(type(method)(), name):
            raise UserError(
                f"{type(method).__name__} has {name}={getattr(method, name)!r}, but {what} is not "
                f"supported by adapt. Leave it out."
            )


def chosen_sites(found: Mapping[str, Site | None], adapter: Adapter) -> tuple[Site, ...]:
    """Return the modules that get an adapter, in the tree's order; found: by path.

    Raises `UserError` for a target that matches nothing, and by name for a module that the trace
    did not reach, that gives no single array, or, where A reads its input, takes none that fits.
    """
    targets = adapter.targets
    names = {path.replace("/", "."): site for path, site in found.items()}
    if isinstance(targets, str):
        check_patterns([targets], list(names), "adapter target")
    hits: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        words = targets if isinstance(targets, str) else (target,)
        matched = [name for name in names if means(words, name)]
        if not matched:
            ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if name))
            raise UserError(
                f"The adapter target '{target}' matches no module{nearest(target, ends)}. There "
                f"are {', '.join(ends[:20]) or 'none'}. Name suffixes, or one regex over whole "
                f"names such as '{next((name for name in names if '.' in name), 'block_0.mlp')}'."
            )
        for name in matched:
            _check_site(name, names[name], target, adapter)
        hits |= set(matched)
    return tuple(site for name, site in names.items() if name in hits and site is not None)


def _check_site(name: str, site: Site | None, target: str, adapter: Adapter) -> None:
    """Raise `UserError` where a module cannot have an adapter."""
    reads_x, why = adapter.form.reads == "input", None
    if site is None:
        why = (
            "no call that was traced reached its __call__. Give adapt `inputs=`, what "
            "`module.apply` takes behind the variables, or name the modules that are called"
        )
    elif isinstance(site.y, str):
        why = (
            f"it is a {site.kind} and gives {site.y}, not one array of floating-point numbers. "
            f"Name the module in it that does"
        )
    elif reads_x and (isinstance(site.x, str) or site.x[:-1] != site.y[:-1]):
        why = (
            f"'parallel' reads its first argument, which is {site.x} and gives {site.y}: not one "
            f"row for each of its rows. Use 'houlsby', which reads what it gives"
        )
    elif site.depth and (site.depth > 1 or site.stack is None):
        why = "its parameters are a stack of stacks, or no stack that one nn.scan makes"
    elif site.stack is not None and not site.stack.takes(1):
        why = (
            f"its layers are stacked along axis {site.stack.axis}, which biases have not: take "
            f"nn.scan(..., variable_axes={{'params': 0}})"
        )
    if why is not None:
        where = f"'{name}'" if name else "the whole module"
        raise UserError(f"The adapter target '{target}' means {where}, but {why}.")


def site_shapes(site: Site, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return {path: shape} of the leaves of a module's adapter."""
    read = site.x if adapter.form.reads == "input" else site.y
    assert not isinstance(read, str) and not isinstance(site.y, str)  # `chosen_sites` saw to it
    lead = () if site.stack is None else (site.stack.count,)
    return leaf_shapes(adapter, joined(site.path, ""), read[-1], site.y[-1], lead)


def beside(site: Site, adapter: Adapter, leaves: Any, dropout: bool, rng: str) -> Beside:
    """Return the addition of a module.

    leaves: nested. dropout: whether `apply` has an rng. rng: a key of `layers.dropout.KEEP`.
    """
    rate = float(adapter.dropout) if dropout and site.takes_dropout else 0.0  # else `adapt` warned
    form = dataclasses.replace(adapter.form, dropout=rate, rng=rng)
    return Beside(laid(site.stack, leaves), form)
