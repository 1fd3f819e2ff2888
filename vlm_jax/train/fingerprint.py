"""Fingerprint of a run, compared at a resume: settings, and digests of the files that it reads."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vlm_jax.config.checks import optimizer_name
from vlm_jax.config.parse import general
from vlm_jax.config.specs import AUTO, RunSpec
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError
from vlm_jax.files.limits import read_json
from vlm_jax.hub.adapter_files import WEIGHTS, is_adapter_directory
from vlm_jax.model import Model
from vlm_jax.train.run_dir import Places
from vlm_jax.train.setup import compute_dtype, quantization_of
from vlm_jax.trees import Table

# Config keys of data that decide which batches come.
DATA_KEYS = (
    *("max_seq_length", "image_resolution", "min_pixels", "max_pixels", "max_shapes"),
    # Not on_bad_example: up to a bad example that stops a run, "skip" gives the same batches.
    *("train_split", "shuffle", "train_on", "max_patches", "packing", "overlong"),
    *("video_fps", "video_min_frames", "video_max_frames", "video_min_pixels", "video_max_pixels"),
)

# Where things lie, which may differ from host to host.
PLACES = (
    *("model.name_or_path", "model.adapter", "training.output_dir", "training.run_name"),
    "training.compilation_cache_dir",
    *("data.train_file", "data.eval_file", "data.image_folder"),
    *("evaluators.*.file", "evaluators.*.image_folder"),
)

# training.*: the rows of a step on a device.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# training.*: what runs had that began before there was such a key.
BEFORE = {"dropout_rng": "threefry"}


def identity(config: RunSpec, model: Model, table: Table, rows: int) -> dict[str, Any]:
    """Return what must be the same when a run goes on, as JSON values.

    Schedules, limits, logging and the places of files may change; what the state and the order of
    the data mean may not.
    """
    assert model.source is not None
    d, t, quantized = config.data, config.training, quantization_of(config)
    adapter = config.model.adapter
    bottleneck = adapter and is_adapter_directory(adapter)
    weights = WEIGHTS if bottleneck else "adapter_model.safetensors"
    own = {} if model.adapter is None else dataclasses.asdict(model.adapter)
    own.pop("targets", None)  # of foreign modules alone: older checkpoints have no such field
    return {
        "base": base_identity(model.source.directory),
        "model": {
            "dtype": compute_dtype(config),
            "adapter": file_identity(Path(adapter, weights)) if adapter else "",
            **({} if quantized is None else {"quantize": str(quantized)}),
        },
        "training table": [list(row) for row in table],
        "lora": None if model.lora is None else dataclasses.asdict(model.lora),
        "adapter": own or None,
        "data": {
            "train_file": sources_identity(d.train_file),
            **{key: getattr(d, key) for key in DATA_KEYS},
            **({"columns": d.columns} if d.columns else {}),
            **({"eval_share": d.eval_share} if d.eval_share else {}),
        },
        "training": {
            "rows": rows,
            "gradient_accumulation_steps": t.gradient_accumulation_steps,
            "seed": t.seed,
            "dataloader_drop_last": t.dataloader_drop_last,
            "dropout_rng": model.dropout_rng,
            # Absent where unset, as in checkpoints that are older than these keys.
            **{
                key: value
                for key in ("data_seed", "train_sampling_strategy")
                if (value := getattr(t, key)) is not None
            },
            # Paging moves moments and changes no number: a run may resume without it, or with it.
            "optim": optimizer_name(t.optim).removeprefix("paged_"),
        },
    }


def resumed(config: RunSpec, places: Places) -> tuple[RunSpec, list[str]]:
    """Return the config with the settings of `BEFORE` as the run began, and lines that say so.

    All processes call it. Where the run's config.json is lost, as logs of a run in a bucket may be,
    or cannot be read, nothing is taken: the checkpoint's identity is compared in any case. Raises
    `UserError` where the config names another value than the run's.
    """
    stored: dict[str, Any] | None = None
    saved: dict[str, Any] | None = None
    if processes.is_primary():
        with contextlib.suppress(UserError):
            stored = read_json(places.directory / "config.json").get("training")
        if not isinstance(stored, dict) and config.training.remat_policy == AUTO:
            saved = _settings_saved(places)
    stored, saved = processes.gather("settings of the run", [stored, saved])[0]
    taken: dict[str, Any] = {}
    lines: list[str] = []
    if not isinstance(stored, dict):
        taken, lines = (taken, lines) if saved is None else _policy_resumed(config, saved)
        return _having(config, taken), lines
    for key, before in BEFORE.items():
        own, named = stored.get(key) or before, getattr(config.training, key)
        taken[key] = own
        if named not in (None, own):
            raise UserError(
                f"The run in '{places.directory}' has training.{key}={own}, and cannot be "
                f"resumed with training.{key}={named}. Leave the key out, or choose another "
                f"training.output_dir."
            )
        if key not in stored:
            lines.append(
                f"This run is older than training.{key}: it resumes with {before}, as it began."
            )
    again, words = _policy_resumed(config, stored)
    taken, lines = {**taken, **again}, lines + words
    return _having(config, taken), lines


def _having(config: RunSpec, training: Mapping[str, Any]) -> RunSpec:
    """Return the config with settings of its training section changed."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def chosen_settings(config: RunSpec) -> dict[str, Any]:
    """Return the settings that `train.mesh` chooses, as a checkpoint records them."""
    return {key: getattr(config.training, key) for key in ("remat_policy", *BATCH)}


def _settings_saved(places: Places) -> dict[str, Any] | None:
    """Return `chosen_settings` of a run by its newest checkpoint, None where that has none."""
    steps = places.saved_steps()
    with contextlib.suppress(OSError, ValueError, IndexError):
        file = places.checkpoints / str(steps[-1]) / "meta" / "metadata"
        return json.loads(file.read_text()).get("settings")
    return None


def _policy_resumed(config: RunSpec, stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the policy and micro-batch of a run whose config leaves them to `auto`, and lines.

    stored: its training section as it began. A config that names another policy is followed: what
    is kept for the backward pass changes memory and time, and no number.
    """
    t = config.training
    by_default = "block" if stored.get("gradient_checkpointing", True) else "none"
    before = stored.get("remat_policy") or by_default
    if t.remat_policy != AUTO:
        now = t.remat
        other = (
            f"The run began with training.remat_policy={before} and now has {now}: memory and "
            f"time of a step change, its results do not."
        )
        return {}, [other] if before != now else []
    sizes: dict[str, Any] = {key: stored.get(key, getattr(t, key)) for key in BATCH}
    same = math.prod(sizes.values()) == math.prod(getattr(t, key) for key in BATCH)
    return {"remat_policy": before, **(sizes if same else {})}, [
        f"training.remat_policy=auto: {before}, as the run began."
    ]


def settings_of(config: RunSpec) -> dict[str, str]:
    """Return {"section.key": value in words} of a config, but for where things lie."""
    return {key: str(value) for key, value in config.flat().items() if general(key) not in PLACES}


def sources_identity(source: Any) -> Any:
    """Return the digest of a data file, or of each source of a list, beside how it is read."""
    if isinstance(source, list):
        return [sources_identity(one) for one in source]
    if isinstance(source, Mapping):
        rest = {key: value for key, value in source.items() if key not in ("path", "image_folder")}
        return {**rest, "path": sources_identity(source["path"])}
    return file_identity(Path(source).expanduser())


SAMPLE_BYTES = 1 << 10  # of a tensor, three times
FILE_SAMPLE_BYTES = 1 << 20  # of a file that has no tensors, three times
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit: a longer one is no safetensors file


def base_identity(directory: str | Path) -> dict[str, str]:
    """Return {file: digest} of what makes a base checkpoint this one, wherever it lies.

    config.json counts whole; of a weights file its header and three samples of each tensor, so
    that a base of many gigabytes is distinguished in a moment from one with a merged LoRA.
    """
    directory = Path(directory)
    identity = {}
    for path in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        digest = hashlib.sha256()
        # A file system may want buffers of many mebibytes, which each sample would fill.
        with open(path, "rb", buffering=SAMPLE_BYTES) as file:
            digest.update(str(path.stat().st_size).encode())
            for start, length in _samples(file):
                file.seek(start)
                digest.update(file.read(length))
        identity[path.name] = digest.hexdigest()
    return identity


def _samples(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of the bytes that stand for a file, see `base_identity`.

    Files that are called safetensors may be none, such as Git LFS pointers of weights that were
    not fetched: they are sampled as one piece.
    https://huggingface.co/docs/safetensors/index#format
    """
    data = 8 + int.from_bytes(file.read(8), "little")
    try:
        entries = json.loads(file.read(min(data, LONGEST_HEADER) - 8))
        entries.pop("__metadata__", None)
        offsets = sorted(entry["data_offsets"] for entry in entries.values())
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        length, spans = FILE_SAMPLE_BYTES, [(0, os.fstat(file.fileno()).st_size)]
    else:
        length, spans = SAMPLE_BYTES, [(data + start, data + end) for start, end in offsets]
        yield 0, data
    for start, end in spans:
        for at in (start, (start + end) // 2, max(start, end - length)):
            yield at, min(length, end - at)


def file_identity(path: str | Path) -> str:
    """Return the digest of a file's bytes, or "" for what is no file (a directory, a hub id)."""
    path = Path(path)
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
