"""Descriptions of methods on a frozen base: LoRA and Adapter."""

import dataclasses
from collections.abc import Mapping

from vlm_jax.errors import UserError, nearest
from vlm_jax.models.layers.bottleneck import KINDS, LIBRARY_NAMES, Bottleneck
from vlm_jax.models.layers.linear import LoRAScale


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which linear layers get low-rank matrices, and of which rank (PEFT's `LoraConfig`).

    rank, alpha: the update is alpha/rank (x A) B; dropout acts on the input of A while training.
    targets: name suffixes ("q_proj", "mlp.up_proj"), one regex over a module's whole name (a
        string that is not a preset), "all-linear", or a preset of `adapters.targets.PRESETS`. Only
        a regex reaches outside `components`, but for "embed_tokens", which must be named.
    modules_to_save: modules trained in full beside the matrices and saved with them: "projector",
        or Hugging Face's names ("merger", "multi_modal_projector", "lm_head", "embed_tokens").
    rslora: the update is alpha/sqrt(rank). dora: columns of the sum have norms that are learned
        (https://arxiv.org/abs/2402.09353).
    components: where suffixes, presets and "all-linear" look, of "vision", "projector",
        "language_model" and "head"; "all-linear" leaves the head out.
    rank_pattern, alpha_pattern: other ranks and alphas by regex, {"layers.0.*q_proj": 32}, matched
        against the end of a module's name from a dot on; the first that matches counts.
    layers_to_transform: the only layers that are adapted, () for all; what lies in no layer is then
        left out, but for a module whose whole name is a target, as "lm_head" (as in PEFT).
        layers_pattern: what stands before such a number in names, ("layers",); () for the first.
    exclude_modules: name suffixes, or one regex over whole names, of what is not adapted.
    bias: which biases train beside the matrices and are saved with them: "none", "all", or
        "lora_only", those of adapted modules.
    init: how matrices start, PEFT's `init_lora_weights`: True, "gaussian", "orthogonal", "pissa",
        "pissa_niter_16", "olora", "loftq"; see `vlm_jax.adapters.lora_init`.
    left_out: set by `add_lora` and `load_peft`: modules without matrices of stacks that have some.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ()
    rslora: bool = False
    components: tuple[str, ...] = ("language_model", "head")
    dora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    bias: str = "none"
    init: bool | str = True
    left_out: tuple[str, ...] = ()

    @property
    def scale(self) -> LoRAScale:
        return LoRAScale(float(self.alpha), float(self.dropout), self.rslora)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Bottleneck adapters: small MLPs beside a frozen block's sums.

    x goes into a block's attention or MLP (before its norm), h comes out, and A is
    scaling * up(f(down(.))) with down [D, D / reduction_factor], both with biases:
    kind: "houlsby": x + h + A(h), after attention and MLP (https://arxiv.org/abs/1902.00751);
        "pfeiffer": x + h + A(x + h), after the MLP (https://arxiv.org/abs/2005.00247);
        "parallel": x + h + A(x), beside the MLP (https://arxiv.org/abs/2110.04366).
    These are the `adapters` library's formulas of double_seq_bn, seq_bn and par_bn in pre-norm
    models, which names stand for the same.
    reduction_factor, non_linearity, scaling: None: the kind's own (16, swish, 1; 16, relu, 1;
        2, relu, 4). norm: a LayerNorm on what A reads. dropout: on what A gives, in training.
    init_weights: "mam_adapter" (up is zero: the model starts equal to the base), or "bert" or
        "houlsby", small random numbers, as in the library.
    components: of "language_model" and "vision". modules_to_save: as LoRA's.
    targets: for foreign modules alone (`adapt`), which have no such blocks: the modules whose
        output gets an adapter, as suffixes of whole parts ("attn", "mlp.fc2") or one regex over
        whole dotted names.
    """

    kind: str = "pfeiffer"
    reduction_factor: float | None = None
    non_linearity: str | None = None
    scaling: float | None = None
    norm: bool = False
    dropout: float = 0.0
    init_weights: str = "mam_adapter"
    components: tuple[str, ...] = ("language_model",)
    modules_to_save: tuple[str, ...] = ()
    targets: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kind = LIBRARY_NAMES.get(self.kind, self.kind)
        if kind not in KINDS:
            raise UserError(
                f"There is no adapter of kind '{self.kind}'{nearest(self.kind, KINDS)}. Known are "
                f"{', '.join(KINDS)}, or {', '.join(LIBRARY_NAMES)}."
            )
        object.__setattr__(self, "kind", kind)
        for name in ("reduction_factor", "non_linearity", "scaling"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(KINDS[kind], name))

    @property
    def form(self) -> Bottleneck:
        return Bottleneck(
            KINDS[self.kind].reads,
            str(self.non_linearity),
            float(self.scaling or 0),
            self.dropout,
        )
