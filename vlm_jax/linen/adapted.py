"""A Linen module with additions beside its parameters, and its `apply`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from vlm_jax.errors import UserError
from vlm_jax.linen.intercept import LEAF, Addition, LowRank, interceptor
from vlm_jax.linen.parts import Layer, Site, joined, laid, unboxed
from vlm_jax.linen.targets import beside, site_shapes
from vlm_jax.models.methods import Adapter, LoRA
from vlm_jax.trees import flatten, unflatten

LORA, ADAPTER = "lora", "adapter"  # the collections


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: hashable, so jit takes it as static
class Adapted:
    """A Linen module with an adapter beside it: `apply` is the module's, with additions.

    module: untouched. lora: what was asked for, or None. layers: those that have LoRA.
    quantized: those whose kernels are in 4 bits. adapter: bottlenecks, or None; sites: the modules
    that have them. dropout_rng: what makes dropout's masks, a key of `layers.dropout.KEEP`.
    """

    module: nn.Module
    lora: LoRA | None
    layers: tuple[Layer, ...]
    quantized: tuple[Layer, ...]
    adapter: Adapter | None = None
    sites: tuple[Site, ...] = ()
    dropout_rng: str = "threefry"

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `module.apply` returns, with additions; it takes all that that takes.

        variables: {"params": ..., "lora": ... or "adapter": ...} and whatever other collections the
        module has. Pure and differentiable in "lora" and "adapter". Their dropout acts where `rngs`
        has "dropout", so give that in training alone. Raises `UserError` for leaves of another base
        or size.
        """
        rngs = kwargs.get("rngs")
        if rngs is not None and not isinstance(rngs, Mapping):  # Linen: one key for every stream
            rngs = kwargs["rngs"] = {"params": rngs, "dropout": rngs}
        dropout = rngs is not None and "dropout" in rngs
        ours = {LORA: self.lora, ADAPTER: self.adapter}
        rest = {name: value for name, value in variables.items() if ours.get(name) is None}
        params = dict(flatten(rest.get("params", {})))
        params |= self._additions(params, variables, dropout)
        with nn.intercept_methods(interceptor()):
            out = self.module.apply({**rest, "params": unflatten(params)}, *args, **kwargs)
        if kwargs.get("mutable", False) is False and not kwargs.get("capture_intermediates", False):
            return out
        result, state = out
        return result, {name: _without_additions(value) for name, value in state.items()}

    def _additions(
        self, params: Mapping[str, Any], variables: Mapping[str, Any], dropout: bool
    ) -> dict[str, Addition]:
        """Return {path: addition} to lie beside the parameters, checked against these."""
        made: dict[str, Addition] = {}
        for layer, (a, b) in self.pairs(params, variables):
            assert self.lora is not None
            a, b = laid(layer.stack, (a, b))  # sliced along the same axis as the kernel
            # Where dropout cannot act, `adapt` has warned.
            rate = float(self.lora.dropout) if dropout and layer.takes_dropout else 0.0
            scale = self.lora.scale.scale(self.lora.rank)
            made[joined(layer.path, LEAF)] = LowRank(a, b, scale, rate, self.dropout_rng)
        for site, leaves in self.bottlenecks(variables):
            assert self.adapter is not None
            made[joined(site.path, LEAF)] = beside(
                site, self.adapter, leaves, dropout, self.dropout_rng
            )
        return made

    def pairs(
        self, params: Mapping[str, Any], variables: Mapping[str, Any]
    ) -> list[tuple[Layer, tuple[Any, ...]]]:
        """Return each layer with its A and B, checked; params: by path."""
        if self.lora is None:
            return []
        for layer in self.layers:
            if layer.leaf not in params:
                raise UserError(
                    f"The parameters hold no '{layer.leaf}', which has LoRA. Are they another "
                    f"module's?"
                )
        rank = self.lora.rank
        matrices = {layer: layer.matrices(rank) for layer in self.layers}
        wanted = {
            path: (shape, f"rank {rank} and its {layer.weight}")
            for layer, shapes in matrices.items()
            for path, shape in shapes.items()
        }
        held = _held(variables, LORA, wanted, [layer.name for layer in self.layers])
        return [(layer, tuple(held[p] for p in shapes)) for layer, shapes in matrices.items()]

    def bottlenecks(self, variables: Mapping[str, Any]) -> list[tuple[Site, dict[str, Any]]]:
        """Return each module that has an adapter with its nested leaves, checked."""
        if self.adapter is None:
            return []
        shapes = {site: site_shapes(site, self.adapter) for site in self.sites}
        why = f"reduction_factor {self.adapter.reduction_factor:g} and its width"
        wanted = {path: (shape, why) for one in shapes.values() for path, shape in one.items()}
        held = _held(variables, ADAPTER, wanted, [site.name for site in self.sites])
        return [
            (site, unflatten({path[len(site.path) :].lstrip("/"): held[path] for path in one}))
            for site, one in shapes.items()
        ]


def _held(
    variables: Mapping[str, Any],
    collection: str,
    wanted: Mapping[str, tuple[tuple[int, ...], str]],
    targets: list[str],
) -> dict[str, Any]:
    """Return {path: leaf} of a collection, checked; wanted: {path: (shape, what asks for it)}."""
    if collection not in variables:
        raise UserError(
            f"The variables have no collection '{collection}', only {', '.join(variables)}. Give "
            f"{{'params': ..., '{collection}': ...}}, as adapt and the loaders return them; for "
            f"the base alone call the module's own apply."
        )
    held = {path: unboxed(leaf) for path, leaf in flatten(variables[collection]).items()}
    for path in held.keys() ^ wanted.keys():
        raise UserError(
            f"The leaves of '{collection}' {'lack' if path in wanted else 'hold'} '{path}', unlike "
            f"the adapted module, whose targets are {', '.join(targets[:6])}"
            f"{' ...' if len(targets) > 6 else ''}. They were made for another base or for other "
            f"targets: take those that came with this module from adapt or a loader."
        )
    for path, (shape, why) in wanted.items():
        if held[path].shape != shape:
            raise UserError(
                f"'{path}' in '{collection}' is {list(held[path].shape)}; {why} ask for "
                f"{list(shape)}. It was made for another base or another rank."
            )
    return held


def _without_additions(collection: Any) -> Any:
    if not isinstance(collection, Mapping):
        return collection
    flat = flatten(collection)
    if not any(path.split("/")[-1] == LEAF for path in flat):
        return collection
    return unflatten({path: x for path, x in flat.items() if path.split("/")[-1] != LEAF})
