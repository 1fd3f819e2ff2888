"""What towers, projectors and decoders share: how they compute, MLPs, the pre-norm block.

Letters: D model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.family import TowerSizes
from vlm_jax.models.layers.activations import ACTIVATIONS, gated
from vlm_jax.models.layers.bottleneck import ATTENTION, OUTPUT, Bottleneck, Residual
from vlm_jax.models.layers.linear import Linear, LoRAScale
from vlm_jax.models.layers.norm import LayerNorm
from vlm_jax.models.layers.remat import GATE, MID, UP


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the parts of a model compute.

    dtype: of activations. lora: alpha and dropout where the tree holds LoRA leaves. remat: a key of
    `layers.remat.REMAT`. adapter: how bottleneck adapters compute. attention: a key of
    `layers.attention.KERNELS`; None: the fastest for each attention's shapes.
    """

    dtype: Any
    lora: LoRAScale | None = None
    remat: str = "none"
    adapter: Bottleneck | None = None
    attention: str | None = None

    def linear(self, name: str, features: int, use_bias: bool = True) -> Linear:
        """Return a linear layer for the module that is running, which may carry LoRA."""
        return Linear(features, use_bias, self.dtype, self.lora, name=name)


class MLP(nn.Module):
    """Two layers with an activation between: [..., in] to [..., out].

    names, widths: of the two layers, in order.
    """

    names: tuple[str, str]
    widths: tuple[int, int]
    activation: str
    compute: Compute
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = (
            self.compute.linear(name, width, self.use_bias)
            for name, width in zip(self.names, self.widths, strict=True)
        )
        return second(ACTIVATIONS[self.activation](checkpoint_name(first(x), UP)))


class GatedMLP(nn.Module):
    """SwiGLU, https://arxiv.org/abs/2002.05202: [..., D] to [..., D], of width `hidden` between.

    down_proj(activation(gate_proj(x)) * up_proj(x)).
    """

    hidden: int
    activation: str
    compute: Compute
    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = functools.partial(self.compute.linear, use_bias=self.use_bias)
        gate = checkpoint_name(linear("gate_proj", self.hidden)(x), GATE)
        up = checkpoint_name(linear("up_proj", self.hidden)(x), UP)
        return linear("down_proj", x.shape[-1])(gated(gate, up, self.activation))


class Block(nn.Module):
    """Pre-norm block of Llama, https://arxiv.org/abs/2302.13971, and of ViTs.

    x + attention(norm(x)), then x + mlp(norm(x)): x [..., D] to (x, what attention gives beside
    it), as `Stack` calls it. norm, attention, mlp: make these; `attention(x, context, layer)`.
    names: of the two norms and of attention. keep: give x itself beside x (features of several
    layers). behind: names of two more norms, of what is added
    (https://arxiv.org/abs/2408.00118, section 2).
    """

    norm: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    names: tuple[str, str, str]
    compute: Compute
    keep: bool = False
    behind: tuple[str, str] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: Any, layer: Any) -> tuple[jax.Array, Any]:
        adapter, dtype = self.compute.adapter, self.compute.dtype
        norm1, norm2, attention = self.names
        attended, out = self.attention(name=attention)(self.norm(name=norm1)(x), context, layer)
        if self.behind is not None:  # kept before the norms, whose gradients need it
            attended = self.norm(name=self.behind[0])(checkpoint_name(attended, MID))
        x = Residual(adapter, dtype, name=ATTENTION)(x, attended)
        x = checkpoint_name(x, MID) if self.behind is None else x
        mapped = self.mlp(name="mlp")(self.norm(name=norm2)(x))
        if self.behind is not None:
            mapped = self.norm(name=self.behind[1])(checkpoint_name(mapped, MID))
        x = Residual(adapter, dtype, name=OUTPUT)(x, mapped)
        return x, (x if self.keep else out)


def tower_block(
    vision: TowerSizes,
    attention: Callable[..., nn.Module],
    names: tuple[str, str, str],
    epsilon: float,
    compute: Compute,
    norm: Callable[..., nn.Module] = LayerNorm,
    mlp: tuple[str, ...] = ("fc1", "fc2"),
) -> Callable[..., Block]:
    """Return what makes a ViT's block, https://arxiv.org/abs/2010.11929.

    attention: made of (heads, compute). mlp: the names of its layers; three: a gated one's.
    """
    hidden, activation = vision.intermediate_size, vision.activation
    make_mlp: Callable[..., nn.Module] = functools.partial(
        MLP, (mlp[0], mlp[-1]), (hidden, vision.width), activation, compute
    )
    if len(mlp) == 3:
        make_mlp = functools.partial(GatedMLP, hidden, activation, compute, True)
    return functools.partial(
        Block,
        norm=functools.partial(norm, epsilon, compute.dtype),
        attention=functools.partial(attention, vision.num_heads, compute),
        mlp=make_mlp,
        names=names,
        compute=compute,
    )
