"""FLOPs of a training step, counted from the model, kernel by kernel.

A product of N rows with a kernel [in, out] is 2 x N x in x out; its gradient by the rows is as much
again, and so is that by the kernel, where it trains. Attention is 4 x T^2 x width a layer and row
(scores, and values by weights), causal or not; `masked` counts what lies above the diagonal.
Elementwise work and look-ups are left out. What is recomputed (rematerialisation) is counted by
itself.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from vlm_jax.model import Model
from vlm_jax.models.layers.bottleneck import ATTENTION, OUTPUT
from vlm_jax.models.layers.remat import ATTENDED, GATE, KEPT, LOW, MID, QKV, UP
from vlm_jax.trees import flatten

# Components in the order in which values flow through them, and so gradients back.
ORDER = ("vision", "projector", "embeddings", "language_model", "head")
KERNELS = ("kernel", "lora_A", "lora_B", "added", "start_A", "start_B")
# The module of a product with a weight -> the name of the value that it ends in.
ENDS_IN = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv"), QKV),
    **dict.fromkeys(("o_proj", "out_proj", "proj"), MID),
    **{"gate_proj": GATE, "up_proj": UP, "fc1": UP, "linear_fc1": UP},
}


class Work(NamedTuple):
    """FLOPs of all devices together in one step."""

    forward: int = 0
    activations: int = 0  # gradients by activations
    weights: int = 0  # gradients by weights that train
    recomputed: int = 0  # forward products that the backward pass does again

    @property
    def model(self) -> int:
        """What the mathematics asks for: all but what is computed twice."""
        return self.forward + self.activations + self.weights

    @property
    def total(self) -> int:
        return self.model + self.recomputed


def total(works: Iterable[Work]) -> Work:
    """Return the sum of works, of a step's components for instance."""
    return Work(*map(sum, zip(*works, strict=True)))


def count(
    model: Model,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    rows: int,
    tokens: int,
    patches: int,
) -> dict[str, Work]:
    """Return {component: its work} of a step of `rows` rows of tokens and patches.

    trainable, frozen: trees of arrays, shapes or 4-bit leaves. Every position of a row counts as
    carrying loss: the head does less where few do.
    """
    cfg, trained = model.config, set(flatten(trainable))
    leaves = {**flatten(frozen), **flatten(trainable)}
    owner = {path: model.component(path) for path in leaves}
    trains = {owner[path] for path in trained}
    # Whether gradients by activations are asked for at a component's input, and inside of it.
    enters = {name: bool(trains & set(ORDER[:i])) for i, name in enumerate(ORDER)}
    inside = {name: enters[name] or name in trains for name in ORDER}
    positions = {
        "vision": rows * patches,
        "projector": rows * cfg.features(patches),
        "language_model": rows * tokens,
        "head": rows * tokens,
    }
    layers = {"vision": cfg.vision_layers, "language_model": cfg.text.num_layers}
    # The module of a component's first product, by the order of names.
    kernels = {
        name: [p for p in leaves if p.endswith("/kernel") and owner[p] == name] for name in ORDER
    }
    firsts = {name: min(own, default="/").rsplit("/", 1)[0] for name, own in kernels.items()}
    stacks = tuple(f"{prefix}/" for prefix in cfg.stacks)

    def product(path: str) -> Work:
        # Where matrices started is one product with them, gradients included (see lora_init.py).
        name = path.replace("start_", "lora_").rsplit("/", 1)[1]
        learns, in_stack = path in trained or "/start_" in path, path.startswith(stacks)
        component = "head" if owner[path] == "embeddings" else owner[path]  # a tied one
        once = 2 * positions[component] * math.prod(leaves[path].shape[-2:])
        once *= layers[component] if in_stack else 1
        redone = False
        if component == "head":
            back = enters["head"]  # made with the logits, whatever the blocks recompute
        elif in_stack:
            back = inside[component]
            redone = back and again(model, path, leaves)
        elif component == "vision":  # it sees pixels, by which nothing asks for a gradient
            back = inside[component] and name == "lora_B"
        else:
            # Before a component's first product there may be a norm that trains.
            is_first = path.rsplit("/", 1)[0] == firsts[component] and name != "lora_B"
            norm = any(owner[p] == component and p.endswith("/scale") for p in trained)
            back = enters[component] or norm if is_first else inside[component]
        return Work(once, once * back, once * learns, once * redone)

    found: dict[str, list[Work]] = {name: [] for name in ORDER if name != "embeddings"}
    for path in leaves:
        name = path.rsplit("/", 1)[1]
        if owner[path] == "embeddings":
            if cfg.text.tied and name in ("embedding", "added"):
                found["head"].append(product(path))
            if name == "lora_B":  # of A rows are looked up
                once = 2 * rows * tokens * math.prod(leaves[path].shape)
                found["language_model"].append(Work(once, once, once))
        elif name in KERNELS:
            found[owner[path]].append(product(path))
    for name, keys, wide in (
        ("vision", cfg.attended_patches(patches), cfg.vision.width),
        ("language_model", tokens, cfg.text.num_heads * cfg.text.head_dim),
    ):
        once = 4 * positions[name] * keys * wide * layers[name]
        redone = int(once * attention_again(model.remat)) * inside[name]
        found[name].append(Work(once, 2 * once * inside[name], 0, redone))
    return {name: total(works) for name, works in found.items()}


def again(model: Model, path: str, leaves: Collection[str]) -> bool:
    """Return whether the backward pass recomputes a product of a block.

    path: of its kernel, below a stack. leaves: paths of the whole tree. What an adapter reads, and
    what DoRA's norms are multiplied by, is needed itself, whatever it ends in.
    """
    if model.remat in ("none", "dots"):
        return False
    kept = {*itertools.chain(*KEPT[model.remat])}
    part, module, leaf = path.rsplit("/", 2)
    block, name = part.rsplit("/", 1)
    if leaf in ("lora_A", "start_A"):
        return LOW not in kept
    if module == "adapter_down" or f"{part}/{module}/lora_magnitude" in leaves:
        return True
    if name == ATTENTION or ENDS_IN.get(module) == MID:
        adapter, needed = ATTENTION, MID not in kept
    elif name == OUTPUT or module in model.config.LAST:
        behind = name != OUTPUT and path.startswith(f"model/{model.config.TEXT}/")
        adapter, needed = OUTPUT, behind and model.config.text.norms_behind and MID not in kept
    else:
        return ENDS_IN[module] not in kept
    reads = model.adapter is not None and model.adapter.form.reads != "input"
    is_read = f"{block}/{adapter}/adapter_down/kernel" in leaves and name != adapter
    return needed or (reads and is_read)


def attention_again(remat: str) -> float:
    """Return how much of attention's two products is recomputed: with its result kept, scores.

    A kernel that never holds scores does so even where everything is kept.
    """
    if remat == "none":
        return 0
    return 0.5 if ATTENDED in KEPT[remat][0] else 1


def masked(model: Model, trainable: Mapping[str, Any], rows: int, tokens: int) -> int:
    """Return the FLOPs of `count` above the diagonal of the decoder's attention.

    They are half of its scores and of values by weights: the mathematics asks for none of them, and
    a kernel that skips blocks does few of them.
    """
    text = model.config.text
    once = 2 * rows * tokens**2 * text.num_heads * text.head_dim * text.num_layers
    before = {"vision", "projector", "embeddings", "language_model"}
    back = any(model.component(path) in before for path in flatten(trainable))
    return once * (3 if back else 1)
