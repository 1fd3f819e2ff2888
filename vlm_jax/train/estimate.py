"""Memory estimate of a training step, from shapes alone.

Weights, masters, moments and gradients are counted leaf by leaf. Activations follow from the sizes
of the layers; a compiler may do better or worse: `vlm_jax.plan.compile_step` asks it.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.config.specs import MeshSpec, RunSpec
from vlm_jax.data.media.image_settings import make_processor, read_settings
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.models.layers.attention.choice import SHORT
from vlm_jax.models.layers.cross_entropy import CHUNK_POSITIONS
from vlm_jax.models.layers.remat import (
    ATTENDED,
    BLOCK_INPUT,
    GATE,
    KEPT,
    LOW,
    MID,
    QKV,
    UP,
)
from vlm_jax.sharding import make_mesh
from vlm_jax.train.losses import head_of
from vlm_jax.train.setup import abstract_base, abstract_run, base_name
from vlm_jax.train.step import is_key
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit

Shape = tuple[int, int]  # tokens, patches of a row
Sizes = dict[str, int]  # what is kept -> bytes of a token, or of a patch, and layer
REST = "rest"  # what "none" keeps that has no name; attention's scores are counted by themselves
# Bytes of it for each number of a block's width: float32 values in and around two norms.
NORMS = 24


class Estimate(NamedTuple):
    """Bytes a device."""

    weights: int  # frozen, as they are stored
    trained: int  # masters, their float32 gradients and copies in the compute dtype
    moments: int  # of the optimizer, on the device; and the moving average
    activations: int
    head: int = 0  # a copy of it, and gradients where it trains: see `over`
    layer: int = 0  # a copy of the dense weights of one: see `over`

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.moments + self.activations

    def over(self, shards: int) -> "Estimate":
        """Return the estimate where so many devices share the parameters (mesh.fsdp).

        The loss then gathers the head, and each block its weights.
        """
        if shards == 1:
            return self
        weights, trained, moments = (part // shards for part in self[:3])
        return Estimate(weights, trained, moments, self.activations + self.head + self.layer)


def estimate(config: RunSpec, shape: Shape, rows: int = 1, tokens: int | None = None) -> Estimate:
    """Return what a step of `rows` rows of `shape` at once needs on one device.

    Nothing is allocated. The config's mesh is not looked at. Of the model only config.json is read.
    tokens: as `abstract_run` takes it. Raises `UserError` for what the config lacks.
    """
    one = dataclasses.replace(config, mesh=MeshSpec(devices=1, data=1))
    mesh = make_mesh(devices=jax.devices()[:1])
    model, _, state, frozen = abstract_run(one, mesh, tokens)
    beside = beside_arguments(config, model, state.trainable, frozen, shape, rows)
    on_host = config.training.optim.startswith("paged")
    return Estimate(
        weights=nbytes(frozen),
        trained=nbytes(state.trainable) + beside.copies,
        moments=(0 if on_host else nbytes(state.opt_state)) + nbytes(state.ema),
        activations=beside.activations,
        head=beside.head,
        layer=beside.layer,
    )


class Beside(NamedTuple):
    """Bytes a device that a step takes beside its arguments."""

    copies: int  # float32 gradients of what trains, and copies in the compute dtype
    activations: int
    head: int  # as in `Estimate`
    layer: int  # likewise

    @property
    def gathered(self) -> int:
        """Bytes of what is gathered, where several devices share the parameters."""
        return self.head + self.layer


def beside_arguments(
    config: RunSpec,
    model: Model,
    trainable: Any,
    frozen: Any,
    shape: Shape,
    rows: int,
    platform: str = "gpu",
) -> Beside:
    """Return what a step of `rows` rows at once takes beside its arguments.

    trainable, frozen: shapes with their shardings. platform: "gpu" takes most, attention's scores.
    """
    return Beside(
        beside_masters(config, model, nbytes(trainable)),
        activations(model, shape, rows, tower_trains(model, trainable), largest(frozen), platform),
        gathered_head(model, trainable, frozen),
        gathered_layer(model, trainable, frozen),
    )


def tower_trains(model: Model, trainable: Any) -> bool:
    """Return whether anything of the vision tower trains, so that its activations are kept."""
    return any(model.component(path) == "vision" for path in flatten(trainable))


def beside_masters(config: RunSpec, model: Model, masters: int) -> int:
    """Return the bytes of gradients and copies of so many bytes of masters.

    Gradients are float32, those of one micro-batch and their sum, and copies are of the compute
    dtype, where masters are not what is computed with.
    """
    t = config.training
    elements = masters // jnp.dtype(t.param_dtype).itemsize
    gradients = 2 if t.gradient_accumulation_steps > 1 else 1
    same = t.param_dtype == "bfloat16" and model.dtype == jnp.bfloat16
    return elements * (4 * gradients + (0 if same else model.dtype.itemsize))


def gathered_head(model: Model, trainable: Any, frozen: Any) -> int:
    """Return the bytes of a whole head, and of its gradients where it trains: see `over`."""
    own = f"{head_of(model)}/"
    still, learned = (
        [leaf for path, leaf in flatten(tree).items() if path.startswith(own)]
        for tree in (frozen, trainable)
    )
    gradients = 3 * sum(math.prod(x.shape) for x in learned) * model.dtype.itemsize
    return nbytes(still, whole=True) + gradients


def gathered_layer(model: Model, trainable: Any, frozen: Any) -> int:
    """Return the bytes of the dense leaves of a decoder's layer, whole, in the compute dtype."""
    leaves = {**flatten(frozen), **flatten(trainable)}
    own = (
        leaf
        for path, leaf in leaves.items()
        if model.component(path) == "language_model"
        and path.startswith(tuple(f"{stack}/" for stack in model.config.stacks))
        and not isinstance(leaf, FourBit)
    )
    return sum(math.prod(leaf.shape[1:]) for leaf in own) * model.dtype.itemsize


def nbytes(tree: Any, whole: bool = False) -> int:
    """Return the bytes that a tree of arrays, or their shapes, takes on one device.

    whole: on a device that holds all of it.
    """
    return sum(
        _array_bytes(leaf, leaf.shape if whole else leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _array_bytes(array: Any, shape: tuple[int, ...]) -> int:
    if is_key(array):
        return math.prod(shape) * 8  # two words of 32 bits
    dtype = jnp.dtype(array.dtype)
    bits = 4 if dtype.name.endswith("int4") else 8 * dtype.itemsize
    return -(-math.prod(shape) * bits // 8)


def largest(tree: Any) -> int:
    """Return the values of the largest 4-bit kernel of one layer, which is decoded whole."""
    four = (leaf for leaf in flatten(tree).values() if isinstance(leaf, FourBit))
    return max((math.prod(leaf.shape[-2:]) for leaf in four), default=0)


def activations(
    model: Model, shape: Shape, rows: int, tower: bool, decoded: int, platform: str
) -> int:
    """Return the bytes that a step's activations take.

    tower: whether its own are kept. decoded: values of a kernel that is decoded whole. platform: of
    the device.

    What model.remat keeps is there for all blocks, see `kept`; the rest of a block's inside,
    as of the head's logits, only for one at a time. "none" keeps all of it.
    """
    text, vision, size = model.config.text, model.config.vision, model.dtype.itemsize
    tokens, patches = (rows * n for n in shape)
    # Forward values: q, k, v, the gate and what it gates, residuals; scores in float32.
    scored = rows * text.num_heads * scores(model, shape[0], platform) * 4
    inside = tokens * (3 * text.intermediate_size + 6 * text.hidden_size) * size + scored
    looked = rows * vision.num_heads * scores(model, shape[1], platform) * 4
    mlp = (2 + vision.gated) * vision.intermediate_size
    seen = tokens and patches * (mlp + 6 * vision.width) * size + looked
    # Features that are added in layers, and their gradients.
    added = 2 * model.config.added_features * tokens * text.hidden_size * size
    layer = tokens * kept(decoder_bytes(model), model.remat)[0]
    layer_seen = patches * kept(tower_bytes(model), model.remat)[0]
    if model.remat == "none":
        layer += scored
        layer_seen += looked
    taken = layer * text.num_layers + tower * layer_seen * vision.depth
    head = 2 * min(tokens, max(CHUNK_POSITIONS[platform])) * text.vocab_size * size
    pixels = patches * getattr(vision, "patch_values", 0) * 4
    # Of the largest of them there are values, which may be kept already, and their gradients.
    block = max(inside, 2 * inside - layer)
    return taken + added + pixels + max(block, (1 + tower) * seen, head) + 2 * decoded * size


def scores(model: Model, places: int, platform: str) -> int:
    """Return how many scores of a head are there at a time, in rows of so many places.

    Where rows are long, a kernel makes no more than those of some queries, or keeps them to itself.
    """
    if model.attention == "xla":
        return places**2
    at_once = SHORT[platform]
    return places**2 if places <= at_once else 0 if platform == "tpu" else places * at_once


def decoder_bytes(model: Model) -> Sizes:
    """Return the bytes of each named value of the decoder's blocks."""
    text, size = model.config.text, model.dtype.itemsize
    heads, grouped = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    rank = 0 if model.lora is None else model.lora.rank
    return {
        BLOCK_INPUT: text.hidden_size * size,
        QKV: (heads + 2 * grouped) * size,
        ATTENDED: heads * size + text.num_heads * 4,  # and a float32 log-sum-exp a head
        MID: text.hidden_size * size * (1 + text.norms_behind),
        LOW: 7 * rank * size,  # of all products of a block
        GATE: text.intermediate_size * size,
        UP: text.intermediate_size * size,
        REST: 3 * text.intermediate_size * size + NORMS * text.hidden_size,
    }


def tower_bytes(model: Model) -> Sizes:
    """Return the bytes of each named value of the vision tower's blocks."""
    vision, size = model.config.vision, model.dtype.itemsize
    gate = vision.intermediate_size * vision.gated
    rank = 0 if model.lora is None else model.lora.rank
    return {
        BLOCK_INPUT: vision.width * size,
        QKV: 3 * vision.width * size,
        ATTENDED: vision.width * size + vision.num_heads * 4,
        MID: vision.width * size,
        LOW: 6 * rank * size,
        GATE: gate * size,
        UP: vision.intermediate_size * size,
        REST: (2 * vision.intermediate_size + gate) * size + NORMS * vision.width,
    }


def kept(sizes: Sizes, policy: str) -> tuple[int, int]:
    """Return the bytes of a token and layer that a policy keeps: on the device, on the host."""
    device, host = (sum(sizes[name] for name in names) for names in KEPT[policy])
    rest = sizes[REST] if policy == "none" else 0
    return device + rest + (0 if BLOCK_INPUT in KEPT[policy][1] else sizes[BLOCK_INPUT]), host


def row_shape(config: RunSpec) -> Shape:
    """Return tokens and patches of a full row with one image of the largest size.

    Where nothing says how large an image is, the tokens all stand for patches.
    """
    model, tokens = abstract_base(config)[0], config.data.max_seq_length
    try:
        return tokens, image_patches(config, model)
    except UserError:
        return tokens, _most_patches(config, model, tokens)


def _most_patches(config: RunSpec, model: Model, tokens: int) -> int:
    """Return the patches that so many tokens stand for, or data.max_patches where that is less."""
    unit = model.config.patch_unit
    most = max(model.config.patches_of(tokens) // unit * unit, unit)
    return min(most, config.data.max_patches or most)


def image_patches(config: RunSpec, model: Model, tokens: int | None = None) -> int:
    """Return the patches of a row that holds one image of the largest size.

    tokens: of the row, which holds no more patches than they stand for; None: data.max_seq_length.
    """
    d, unit, own = config.data, model.config.patch_unit, model.config.image_settings
    if own is None:  # an image has one size
        return unit
    directory, adapter = Path(base_name(config)).expanduser(), config.model.adapter
    settings = read_settings(*([] if adapter is None else [Path(adapter).expanduser()]), directory)
    known = model.config.KNOWN_IMAGES if base_name(config) in model.config.KNOWN else {}
    if not (settings or known or d.max_pixels or d.image_resolution):
        raise UserError(
            f"Nothing says how large an image may be: '{directory}' is not a directory with image "
            f"settings. Set data.max_pixels or data.image_resolution, or give the patches of a row."
        )
    processor = make_processor(
        settings or {**own, **known},
        min_pixels=d.min_pixels,
        max_pixels=d.max_pixels,
        image_resolution=d.image_resolution or None,
    )
    assert processor.largest is not None
    most = _most_patches(config, model, tokens or d.max_seq_length)
    return min(-(-processor.largest // unit) * unit, most)
