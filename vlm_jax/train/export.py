"""A run turned into files for others: an adapter or a merged checkpoint, read back and compared."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vlm_jax.batch import Batch
from vlm_jax.data import Encoder
from vlm_jax.errors import UserError
from vlm_jax.hub.load import load
from vlm_jax.hub.save import save_pretrained
from vlm_jax.lora import requantization_error
from vlm_jax.model import Model
from vlm_jax.sharding import mesh_under
from vlm_jax.train.reading import load_adapted, load_run
from vlm_jax.train.result import write_adapter
from vlm_jax.train.run import make_encoder
from vlm_jax.trees import flatten
from vlm_jax.weights import is_quantized


@dataclasses.dataclass(frozen=True)
class Exported:
    """difference: the largest |logit| difference between the run and what was read back, on a
    probe batch whose logits have the given standard deviation. into: what LoRA was merged into, or
    None. lost: see `vlm_jax.lora.requantization_error`, where kernels were quantized again."""

    directory: str
    into: str | None
    difference: float
    deviation: float
    lost: tuple[float, float] | None = None

    def __str__(self) -> str:
        rounding = ""
        if self.into is not None:
            rounding = (
                f" LoRA was merged into {self.into}; rounding to the base's dtype is part of it."
            )
        if self.lost is not None:
            rounding += (
                f" Quantizing the sums again changed them by {100 * self.lost[0]:.2f} % of their "
                f"norm, which is {self.lost[1]:.2f} times the norm of what was learned: leave "
                f"--quantized out to keep it."
            )
        return (
            f"Wrote '{self.directory}' and read it back: the largest logit difference on a probe "
            f"batch is {self.difference:.2e} (logits have a standard deviation of "
            f"{self.deviation:.2f}).{rounding}"
        )


def probe(encoder: Encoder) -> Batch:
    """Return a small batch that runs every part of the model: a drawn image and a question."""
    content: list[dict[str, str]] = [{"type": "text", "text": "What is in this picture?"}]
    images = []
    if encoder.media.processor is not None:
        ramp = np.arange(64, dtype=np.uint8) * 4
        pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), -1)
        images.append(Image.fromarray(pixels))
        content.insert(0, {"type": "image"})
    example = encoder.prompt({"messages": [{"role": "user", "content": content}], "images": images})
    return encoder.collate([[example]], len(example["tokens"]), len(example["patches"]))


def _logits(model: Model, params: Mapping[str, Any], batch: Batch) -> np.ndarray:
    apply = jax.jit(lambda params, batch: model.apply({"params": params}, batch))
    return np.asarray(apply(dict(params), batch))


def export(run: str | Path, out: str | Path, merge: bool, quantized: bool = False) -> Exported:
    """Write a run's result to `out` and return how far what was read back differs.

    merge: a whole checkpoint for `transformers`, LoRA merged, in the base's dtype and layout;
    otherwise the adapter in PEFT's format. quantized: of a run on a 4-bit base, quantize merged
    kernels again, as bitsandbytes stores them. `out` appears whole or not at all.
    Raises `UserError` where `out` holds files already, or the run has nothing to export.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"The output directory '{out}' exists and is not empty. Take a new one.")
    model, params, config = load_run(run, exact=True)
    encoder = make_encoder(config, model)
    batch = probe(encoder)
    into = lost = None
    if quantized and not merge:
        raise UserError("--quantized says how a merged checkpoint is stored: add --merge.")
    if merge and model.adapter is not None:
        raise UserError(
            f"The run '{run}' trained bottleneck adapters, which no weight can stand for: they "
            f"cannot be merged. Leave --merge out for the adapter's own files."
        )
    if not merge and model.lora is None and model.adapter is None:
        raise UserError(
            f"The run '{run}' trained the language model in full: there is no adapter to export. "
            f"Add --merge for a whole checkpoint."
        )
    mesh = mesh_under(params)  # one copy of them may need several devices
    before = _logits(model, params, batch)
    if merge:
        if model.lora is not None:
            four = any(is_quantized(leaf) for leaf in flatten(params).values())
            into = "the decoded 4-bit weights that it was trained on" if four else "the base"
        if quantized:
            lost = requantization_error(model, params)
        images, videos = encoder.image_settings(), encoder.video_settings()
        save_pretrained(
            model, params, out, quantized=quantized, processor=images, video_processor=videos
        )
        del params  # two models may not have room
        again, read = load(str(out), str(model.dtype), mesh=mesh)
    else:
        write_adapter(model, params, out, encoder)
        del params
        again, read = load_adapted(config, out, mesh)
    after = _logits(again, read, batch)
    difference = float(np.abs(before - after).max())
    return Exported(str(out), into, difference, float(before.std()), lost)
