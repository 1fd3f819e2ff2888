"""A config's own training step, compiled ahead of time; nothing of the model is allocated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax.data.image_settings import make_processor, read_settings
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.plan.topologies import OPTIONS, devices
from vlm_jax.train.abstract import abstract_run
from vlm_jax.train.base import base_name
from vlm_jax.train.compile import abstract_batch, out_of_memory_explained
from vlm_jax.train.compile import compile_step as compile_run
from vlm_jax.train.run import mesh_of, rows_of
from vlm_jax.train.step import make_step


def compile_step(
    config: str | Path | ConfigDict,
    topology: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    patches: int | None = None,
) -> jax.stages.Compiled:
    """Return the training step of a config, compiled for a topology that need not be here.

    It is the very program that `vlm-jax train` runs on such devices, for one shape of batch:
    `.memory_analysis()`, `.cost_analysis()` and `.as_text()` tell of it, and `vlm_jax.plan` reads
    them. config: a file, as for `vlm_jax.config.load`, or a config. topology: see
    `vlm_jax.plan.devices`. overrides: {"lora.r": 64}. mesh: its sizes, as {"fsdp": 4}.
    rows: of the whole step; default: the config's batch size x micro-batches x shards.
    tokens, patches: of a row; default: data.max_seq_length, and one image of the largest size.
    Neither data, tokenizer nor weights are read. Raises `UserError` for what the config lacks, for
    an unknown topology, and where a program does not fit its memory.
    """
    changes = {**(overrides or {}), **{f"mesh.{name}": n for name, n in (mesh or {}).items()}}
    if isinstance(config, ConfigDict):
        c = configs.load(None, {**configs.flatten_config(config), **changes})
    else:
        c = configs.load(config, changes)
    found = devices(topology)
    over = mesh_of(c, found)
    model, tx, state, frozen = abstract_run(c, over)
    parts = c.training.gradient_accumulation_steps
    shards = over.shape["data"] * over.shape["fsdp"]
    tokens = _whole("tokens", tokens, c.data.max_seq_length)
    unit = model.family.patch_unit(model.config)
    patches = _whole("patches", patches, image_patches(c, model), unit, least=0)
    rows = _whole("rows", rows, rows_of(c, over), shards * parts)
    shape = tokens, patches
    run = make_step(model, tx, parts)
    batch = abstract_batch(model, rows, shape, over)
    with out_of_memory_explained():
        return compile_run(run, state, frozen, batch, OPTIONS[found[0].platform])[0]


def _whole(name: str, given: int | None, default: int, unit: int = 1, least: int = 1) -> int:
    """Return a size, or raise `UserError` where no batch has it."""
    size = default if given is None else given
    if size < least or size % unit:
        raise UserError(
            f"{name} is {size}; expected a multiple of {unit} from {max(least, unit * least)} on "
            f"(rows divide among micro-batches and the devices of mesh.data x mesh.fsdp)."
        )
    return size


def image_patches(config: ConfigDict, model: Model) -> int:
    """Return the patches of a row that holds one image of the largest size."""
    family, d = model.family, config.data
    unit = family.patch_unit(model.config)
    if not family.HAS_GRIDS:  # an image has one size
        return unit
    directory = Path(base_name(config)).expanduser()
    settings = read_settings(directory) if directory.is_dir() else None
    if settings is None and not (d.max_pixels or d.image_resolution):
        raise UserError(
            f"Nothing says how large an image may be: '{directory}' is no directory with image "
            f"settings. Set data.max_pixels or data.image_resolution, or give the patches of a row."
        )
    vision = model.config.vision
    own = {"image_processor_type": family.IMAGE_PROCESSOR, "merge_size": vision.merge}
    processor = make_processor(
        settings or {**own, "patch_size": vision.patch_shape[-1]},
        min_pixels=d.min_pixels,
        max_pixels=d.max_pixels,
        image_resolution=d.image_resolution or None,
    )
    assert processor.largest is not None
    return -(-processor.largest // unit) * unit
