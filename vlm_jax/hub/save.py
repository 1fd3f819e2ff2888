"""Writes a whole checkpoint in the layout, dtypes and tying of its base."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import generation
from vlm_jax.adapters.added_tokens import fold_added
from vlm_jax.adapters.bottleneck import check_no_adapter
from vlm_jax.adapters.lora import merged_leaf
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError, refuse
from vlm_jax.files.atomic import whole_directory, write_json, write_shards
from vlm_jax.hub.base import base_tensors
from vlm_jax.hub.companions import (
    IMAGES,
    VIDEOS,
    adapter_settings,
    companions,
    copy_all,
    write_settings,
)
from vlm_jax.hub.save_4bit import quantization_config, tensors_4bit
from vlm_jax.hub.tensors import DTYPES, open_tensors
from vlm_jax.model import Model, Source
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.names import Place, current_name, disk_places, embedding_name, is_unused, to_disk
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit, bnb, dense
from vlm_jax.weights.quantize import kind as kind_of


def save_pretrained(
    model: Model,
    params: Mapping[str, Any],
    directory: str | Path,
    merge: bool = True,
    *,
    quantized: bool | None = None,
    dtype: Any = None,
    processor: Mapping[str, Any] | None = None,
    video_processor: Mapping[str, Any] | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a checkpoint that `transformers` loads with no missing and no unexpected key.

    Tensor names, dtypes and tying are the base's, and its tokenizer, processor and generation files
    are copied; generation_config.json also lists the token that ends an answer in the chat
    template, without which others would write on. Weights are merged, gathered from their devices
    and written one after another. All of several processes call it; one writes.

    Args:
        model, params: a model and its tree.
        directory: to write.
        merge: whether LoRA is merged into the weights; without it a tree with LoRA is refused, for
            a plain checkpoint cannot hold it.
        quantized: True: write 4-bit kernels as bitsandbytes does, merged ones quantized again;
            False: write all of them decoded. By default they stay in 4 bits unless there is LoRA to
            merge, of which requantizing would round much away.
        dtype: of all computed tensors, instead of the base's.
        processor, video_processor: settings that replace those in preprocessor_config.json and
            video_preprocessor_config.json, where training used others. By default those of a loaded
            adapter's directory, whose tokenizer and chat template are copied too.
        max_shard_size: bytes of a file, and so of the host's memory, at most.

    Raises:
        UserError: where the base's own files are gone, or nothing is in 4 bits to write.
    """
    flat = flatten(params)
    check_no_adapter(flat, "A checkpoint is one without")
    four = any(isinstance(leaf, FourBit) for leaf in flat.values())
    has_lora = any(map(is_lora, flat))
    refuse(
        (
            quantized and not four,
            "quantized=True writes kernels in 4 bits, but these parameters hold none. Load the "
            "base with quantize='nf4-dq', or write it dense.",
        ),
        (
            has_lora and not merge,
            "These parameters hold LoRA factors, which a plain checkpoint cannot. Pass "
            "merge=True, or write an adapter with save_peft.",
        ),
    )
    quantized = four and not has_lora if quantized is None else quantized
    flat = fold_added(flat)
    if dtype is not None:  # codes stand for the dtype of what stands beside them
        flat |= {
            path: dataclasses.replace(leaf, dtype=kind_of(dtype))
            for path, leaf in flat.items()
            if isinstance(leaf, FourBit)
        }
    places = disk_places(model, {p: leaf.shape for p, leaf in flat.items() if not is_lora(p)})
    source, names = model.source, _names(model, places, dtype)
    unread = {n for n, (c, _) in names.items() if c not in places and c not in model.unused}
    # Further tensors of the base's 4-bit weights among those.
    owners = {name: bnb.weight_of(name) for name in source.beside} if source and quantized else {}
    beside = {name: weight for name, weight in owners.items() if weight in unread}
    primary = processes.is_primary()

    def leaf_of(place: Place) -> Any:
        """Return a weight as it is written, on this host; all processes call it."""
        leaf = processes.to_host(
            merged_leaf(model, flat, place.path, place.layer, quantized), primary
        )
        return dataclasses.replace(leaf, used=None) if isinstance(leaf, FourBit) else leaf

    currents = {name: current for name, (current, _) in names.items()} if quantized else {}
    four_bit, tensor_4bit = tensors_4bit(currents, places, flat, leaf_of)
    if source is not None and not Path(source.directory).is_dir():
        raise UserError(
            f"The base checkpoint '{source.directory}' is gone; a full export copies its "
            f"tokenizer and settings. Restore it, or write an adapter with save_peft."
        )
    read_base = base_tensors(model) if source is not None and unread else None

    def tensor(name: str) -> np.ndarray:
        if name in four_bit:
            return tensor_4bit(name)
        if name in beside or name in beside.values():  # the very codes of the base
            assert source is not None
            file, _ = (source.beside if name in beside else source.tensors)[name]
            with open_tensors(Path(source.directory) / file) as tensors:
                read = tensors.get_tensor(name)
            # Codes lie in bytes, as config.json will say, whatever bnb_4bit_quant_storage was.
            return read if name in beside else read.reshape(-1).view(np.uint8)[:, None]
        current, kind = names[name]
        if current in model.unused:  # never computed with: as it is in the adapter
            return model.unused[current].astype(DTYPES.get(kind, model.unused[current].dtype))
        if current not in places:  # or in the base
            assert read_base is not None
            return read_base(current)
        place = places[current]
        leaf = leaf_of(place)
        if isinstance(leaf, FourBit):
            leaf = dense(jax.tree.map(jnp.asarray, leaf), jnp.float32)
        return to_disk(place, np.asarray(leaf).astype(stored(kind)))

    def stored(kind: str) -> np.dtype:
        return jnp.dtype(dtype or DTYPES.get(kind, kind))

    sizes = {
        name: stored(kind).itemsize * math.prod(places[current].shape) if current in places else 0
        for name, (current, kind) in names.items()
        if name not in four_bit
    }
    sizes |= {name: size for name, (_, size) in four_bit.items()} | dict.fromkeys(beside, 0)
    if not primary:  # it helps to gather what the first one writes, in its order
        for name in dict.fromkeys(
            four_bit[name][0] if name in four_bit else name for name in sizes
        ):
            if name not in beside and names[name][0] in places:
                leaf_of(places[names[name][0]])
    else:
        decoding = generation.exported(model)
        with whole_directory(directory) as folder:
            write_shards(folder, sizes, tensor, max_shard_size)
            config = _config(model, dtype)
            if four_bit:
                others = {names[name][0]: name in beside.values() for name in unread}
                config["quantization_config"] = quantization_config(model, places, flat, others)
            write_json(folder / "config.json", config)
            _write_companions(
                folder, source, decoding, {IMAGES: processor, VIDEOS: video_processor}
            )
    processes.wait_for_all("the checkpoint is written")


def _names(model: Model, places: Mapping[str, Place], dtype: Any) -> dict[str, tuple[str, str]]:
    """Return {tensor to write: (its name in the current layout, the dtype in the base)}.

    Raises `UserError` where a tensor of the base is made of parameters that there are not.
    """
    on_disk = (
        dict.fromkeys(places, ("", str(jnp.dtype(dtype or model.dtype))))
        if model.source is None
        else model.source.tensors
    )
    names = {name: (current_name(model, name), kind) for name, (_, kind) in on_disk.items()}
    if model.config.text.tied:  # the head is the embedding, though some files write it again
        head = f"{embedding_name(model)}.weight"
        names = {n: (head if c == "lm_head.weight" else c, kind) for n, (c, kind) in names.items()}
    for name, (current, _) in names.items():
        if current not in places and not is_unused(model, current):
            raise UserError(f"The parameters lack what the base's tensor '{name}' is made of.")
    return names


def _write_companions(
    folder: Path,
    source: Source | None,
    decoding: Mapping[str, Any] | None,
    given: Mapping[str, Mapping[str, Any] | None],
) -> None:
    """Write what lies beside weights and config.json.

    decoding: of generation_config.json. given: {file: settings} of images and videos, in the place
    of those of a loaded adapter's directory.
    """
    adapter = Path(source.adapter) if source and source.adapter else None
    if source is not None:
        copy_all(companions(Path(source.directory), adapter), folder)
    if decoding is not None:
        write_json(folder / generation.FILE, decoding)
    for name, asked in given.items():
        settings = asked or (adapter_settings(adapter, name) if adapter else None)
        if settings:
            write_settings(folder, name, settings)


def _config(model: Model, dtype: Any) -> dict[str, Any]:
    """Return config.json without the base's quantization, of another dtype where that is given."""
    config = copy.deepcopy(dict(model.hf_config))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        part.pop("quantization_config", None)
    if dtype is not None or model.source is None:
        word = str(jnp.dtype(dtype or model.dtype))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = word
        for part in parts:
            part |= {key: word for key in ("torch_dtype", "dtype") if key in part}
    return config
