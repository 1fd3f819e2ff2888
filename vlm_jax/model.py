"""Model: its family and sizes and where it came from, with everything one does to one model."""

import dataclasses
import functools
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch, Example
from vlm_jax.errors import UserError, nearest
from vlm_jax.models import read_family
from vlm_jax.models.family import NAMES_OF_MEDIA, Family, Grid
from vlm_jax.models.layers.attention import KERNELS
from vlm_jax.models.layers.block import Compute
from vlm_jax.models.layers.remat import REMAT
from vlm_jax.models.methods import Adapter, LoRA
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.trees import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint that a model was read from: what an export needs to be its like.

    tensors: each tensor's name on disk -> (file name, dtype on disk), in the order of the files.
    repo: what the user called it: a hub id or a path. revision: of the hub, or None.
    beside: likewise the further tensors of 4-bit weights that nothing here reads.
    adapter: the directory of the adapter that was loaded onto it, whose image settings, tokenizer
        and chat template stand in place of the checkpoint's where it has them.
    """

    directory: str
    tensors: dict[str, tuple[str, str]]
    repo: str
    revision: str | None = None
    beside: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    adapter: str | None = None


class Files(Protocol):
    """What a model reads of its checkpoint later on; `vlm_jax.load` gives it one."""

    def prompt(self, model: "Model", record: dict[str, Any], options: dict[str, Any]) -> Example:
        """Return the example of a conversation that awaits its answer."""

    def turn_end(self, model: "Model") -> int | None:
        """Return the id of the token that the chat template ends an answer with."""

    def tensors(self, model: "Model") -> Callable[[str], np.ndarray]:
        """Return a function from a tensor's name, in the current layout, to the base's array."""


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: hashable, so jit takes it as static
class Model:
    """A vision-language model without its parameters.

    `apply({"params": params}, batch)` is pure; parameters are a nested dict, see `vlm_jax.load`.
    config: sizes, of its family's class. files: what is read of the checkpoint later on, as for
    `encode`; None of a model that was not loaded. unused: tensors of a loaded adapter that nothing
    here reads, for exports: {name: array}. attention: a key of `layers.attention.KERNELS`; None:
    the fastest of them for each attention's shapes. dropout_rng: what makes dropout's masks, a key
    of `layers.dropout.KEEP`.
    """

    config: Family
    dtype: Any
    hf_config: dict[str, Any]
    source: Source | None = None
    lora: LoRA | None = None
    remat: str = "none"
    unused: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    adapter: Adapter | None = None
    files: Files | None = None
    attention: str | None = None
    dropout_rng: str = "hashed"

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The modules that are trained in full and saved beside LoRA's or an adapter's leaves."""
        own = self.adapter or self.lora
        return () if own is None else own.modules_to_save

    @property
    def module(self) -> VisionLanguageModel:
        """The Linen module: `module.apply` with `method=` reaches its parts."""
        lora, adapter, rng = self.lora, self.adapter, self.dropout_rng
        compute = Compute(
            self.dtype,
            None if lora is None else dataclasses.replace(lora.scale, rng=rng),
            self.remat,
            None if adapter is None else dataclasses.replace(adapter.form, rng=rng),
            self.attention,
        )
        return pkgutil.resolve_name(self.config.MODULE)(self.config, compute)

    def apply(
        self,
        variables: dict[str, Any],
        batch: Batch,
        *,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
        method: str | None = None,
    ) -> Any:
        """Return float32 logits [B, T, V], meaningful where `batch.segments` is not 0.

        train: apply the dropout of LoRA or adapters, with `rngs={"dropout": key}`.
        """
        if train and not rngs and any(own and own.dropout > 0 for own in (self.lora, self.adapter)):
            raise ValueError('Training with dropout needs rngs={"dropout": key}.')
        given = jax.tree.map(jnp.asarray, batch)
        return self.module.apply(variables, given, rngs=rngs if train else None, method=method)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        return (self.hf_config.get("text_config") or self.hf_config).get(
            "vocab_size", self.config.text.vocab_size
        )

    @functools.cached_property
    def turn_end(self) -> int | None:
        """The id of the token that the checkpoint's chat template ends an answer with.

        None where the model came from no directory, or that has no tokenizer or no template.
        """
        return None if self.files is None else self.files.turn_end(self)

    @property
    def collate(self) -> Callable[..., Batch]:
        """See `Family.collate`."""
        return self.config.collate

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Return random parameters of this architecture, to train from nothing."""
        batch = jax.tree.map(jnp.asarray, self.collate([[]], 2, self.config.patch_unit))
        return jax.jit(self.module.init)(key, batch)["params"]

    def abstract(self, dtype: Any = None) -> dict[str, Any]:
        """Return the base's parameters as shapes in `dtype` (default: the model's)."""
        dtype = dtype or self.dtype
        shapes = _shapes(self.config)  # type: ignore[arg-type]  # mypy: no protocol is hashable
        return unflatten({path: jax.ShapeDtypeStruct(s, dtype) for path, s in shapes.items()})

    def component(self, path: str) -> str:
        """Return vision, projector, language_model, embeddings or head: what owns a parameter."""
        return self.config.component(path)

    def batch(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
        pixel_values_videos: Any = None,
        video_grid_thw: Any = None,
        mm_token_type_ids: Any = None,
        token_type_ids: Any = None,
        labels: Any = None,
        pad_to: int | None = None,
        **more: Any,
    ) -> Batch:
        """Return the `Batch` of the arrays that a Hugging Face processor returns.

        input_ids, attention_mask: int [B, T], padded on either side; T is kept unless `pad_to`
            adds padding on the right.
        pixel_values: of all rows, in order: Qwen2-VL [patches, values] with image_grid_thw [I, 3];
            LLaVA [I, 3, height, width]. Videos likewise.
        mm_token_type_ids, token_type_ids: accepted and not needed: they follow from the tokens.
        labels: int [B, T], -100 where nothing is learned. Without labels every real token that is
            not an image or video placeholder is a target.
        more: what the family's processor returns beside these: of Qwen2.5-VL second_per_grid_ts
            float [V], 1 where it is missing.
        Raises `UserError` where placeholders and images do not match, and for other names.
        """
        cfg = self.config
        for name in more.keys() - set(cfg.OF_VIDEOS):
            raise UserError(
                f"{self.hf_config['model_type']} takes no '{name}'"
                f"{nearest(name, (*inspect.signature(self.batch).parameters, *cfg.OF_VIDEOS))}. "
                f"Expected are the arrays that its Hugging Face processor returns."
            )
        ids = np.asarray(input_ids, np.int32)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise UserError(
                f"input_ids and attention_mask must both be [rows, tokens]; they are "
                f"{ids.shape} and {mask.shape}."
            )
        length = ids.shape[1] if pad_to is None else pad_to
        if length < ids.shape[1]:
            raise UserError(f"pad_to={pad_to} is shorter than the rows' {ids.shape[1]} tokens.")
        real = mask.astype(bool)
        rows = [row[kept] for row, kept in zip(ids, real, strict=True)]
        image_id, video_id = cfg.image_token_id, cfg.video_token_id
        images = _by_row(cfg, "image", image_id, rows, pixel_values, image_grid_thw)
        given = pixel_values_videos, video_grid_thw, more
        videos = _by_row(cfg, "video", video_id, rows, *given)
        examples = []
        for row, tokens in enumerate(rows):
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
                raise UserError(
                    f"Row {row} holds the token ids {tokens.min()} to {tokens.max()}; the model "
                    f"has {self.vocab_size} tokens. Add rows with add_tokens, or use the "
                    f"checkpoint's own tokenizer."
                )
            learned = ~np.isin(tokens, [i for i in (image_id, video_id) if i is not None])
            if labels is not None:
                learned = np.asarray(labels)[row][real[row]] != -100
            layout = cfg.layout(tokens, {**images[row], **videos[row]})
            examples.append({"tokens": tokens, "weights": learned.astype(np.float32), **layout})
        patches = max((len(example["patches"]) for example in examples), default=0)
        batch = self.collate([[example] for example in examples], length, patches)
        return _scatter(batch, np.pad(real, ((0, 0), (0, length - ids.shape[1]))))

    def encode(
        self,
        messages: list[dict],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        **options: Any,
    ) -> Batch:
        """Return the one-row `Batch` of a conversation that awaits its answer.

        messages: chat messages in Hugging Face's form; images: PIL images or paths, one for each
        image part; videos: paths, lists of frames or dicts, one for each video part (see
        docs/DATA.md). Needs the checkpoint's tokenizer, chat template and image settings.
        """
        if self.files is None:
            raise UserError("This model was not loaded from a directory, so it has no tokenizer.")
        example = self.files.prompt(
            self,
            {"messages": messages, "images": list(images), "videos": list(videos)},
            options,
        )
        return self.collate([[example]], len(example["tokens"]), len(example["patches"]))


# Leaves of a batch whose last axis is a row's tokens.
TOKEN_LEAVES = ("tokens", "targets", "weights", "segments", "positions", "image_index")


def _by_row(
    config: Family,
    kind: str,
    token_id: int | None,
    rows: Sequence[np.ndarray],
    values: Any,
    grids: Any,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> list[dict[str, np.ndarray]]:
    """Return the arrays of the media whose placeholders stand in each row's tokens, in order.

    values, grids, more: of a whole batch, as a processor gives them, the last with an entry for
    each of the media; returned by its names of them.
    """
    pixels, sizes = NAMES_OF_MEDIA[kind]
    if not config.HAS_GRIDS and grids is not None:
        raise UserError(f"All {kind}s of this model have one size: it takes no {sizes}.")
    if config.HAS_GRIDS and (values is None) != (grids is None):
        have, lack = (pixels, sizes) if grids is None else (sizes, pixels)
        raise UserError(
            f"The batch has {have} but no {lack}: give both, as the checkpoint's processor "
            f"returns them. The grids say how many patches each {kind} has."
        )
    if grids is not None and np.shape(grids)[1:] != (3,):
        raise UserError(f"{sizes} must be [{kind}s, 3]; it is {list(np.shape(grids))}.")
    if values is None:
        return [{} for _ in rows]
    more = {name: array for name, array in more.items() if array is not None}
    for name, array in more.items():
        if np.shape(array) != (len(grids),):
            raise UserError(f"{name} must be [{kind}s], {len(grids)}; it is {np.shape(array)}.")
    values = np.asarray(values, np.float32)
    each: Sequence[Grid] = [None] * len(values)
    if grids is not None:
        each = [(int(t), int(h), int(w)) for t, h, w in np.asarray(grids)]
    # What the media before each one hold, and all of them.
    placeholders = np.cumsum([0, *map(config.image_tokens, each)])
    starts = np.cumsum([0, *map(config.values_per_image, each)])
    found, first = [], 0
    for row, tokens in enumerate(rows):
        held = 0 if token_id is None else int((tokens == token_id).sum())
        end = placeholders[first] + held
        last = min(int(np.searchsorted(placeholders, end)), len(each))
        if placeholders[last] != end:
            raise UserError(
                f"Row {row} holds {held} {kind} tokens, which no whole number of the batch's "
                f"{kind}s fills (off by {end - placeholders[last]}). Placeholders and {kind}s must "
                f"agree exactly; was the row truncated?"
            )
        found.append({pixels: values[starts[first] : starts[last]]})
        if grids is not None and last > first:
            found[-1][sizes] = np.asarray(each[first:last], np.int64)
            found[-1] |= {name: np.asarray(values)[first:last] for name, values in more.items()}
        first = last
    if first != len(each):
        raise UserError(
            f"The batch has {len(each)} {kind}s, but the rows have placeholders for {first}."
        )
    return found


def _scatter(batch: Batch, real: np.ndarray) -> Batch:
    """Return the batch with each row's tokens moved from its start to the slots of `real` [B, T].

    What lies behind a row's tokens is all padding, so that this is a permutation of each row.
    """
    order = np.argsort(np.argsort(~real, axis=1, kind="stable"), axis=1)
    index = {2: order, 3: order[:, None]}  # positions may be [B, 3, T]
    moved = {
        name: np.take_along_axis(leaf, index[leaf.ndim], axis=-1)
        for name, leaf in vars(batch).items()
        if name in TOKEN_LEAVES
    }
    return dataclasses.replace(batch, **moved)


@functools.lru_cache(maxsize=16)  # a trace of the whole model; a load asks several times
def _shapes(config: Family) -> dict[str, tuple[int, ...]]:
    """Return {path: shape} of the base's parameters."""
    params = jax.eval_shape(Model(config, jnp.dtype("float32"), {}).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def with_adapter_files(model: Model, directory: str | Path) -> Model:
    """Return the model whose encoders take what the directory of a loaded adapter has of theirs."""
    if model.source is None:
        return model
    source = dataclasses.replace(model.source, adapter=str(Path(directory).absolute()))
    return dataclasses.replace(model, source=source)


def from_config(
    hf_config: dict[str, Any],
    dtype: Any = "float32",
    remat: str = "none",
    source: Source | None = None,
    files: Files | None = None,
    attention: str | None = None,
) -> Model:
    """Return the `Model` that a Hugging Face config.json describes; `model.init` makes parameters.

    Args:
        hf_config: the JSON object.
        dtype: of the computation.
        remat: a key of `layers.remat.REMAT`: the activations kept for the backward pass.
        source: where the model was loaded from.
        files: access to that checkpoint's files, for `model.encode`.
        attention: what computes attention: a key of `layers.attention.KERNELS`; None: the fastest.

    Raises:
        UserError: for an unknown family, or a field with an unknown meaning.
    """
    if remat not in REMAT:
        raise UserError(f"Unknown remat policy '{remat}'; known: {', '.join(REMAT)}.")
    if attention is not None and attention not in KERNELS:
        raise UserError(f"Unknown attention '{attention}'; known: {', '.join(KERNELS)}.")
    return Model(
        read_family(hf_config),
        jnp.dtype(dtype),
        dict(hf_config),
        source,
        remat=remat,
        files=files,
        attention=attention,
    )
