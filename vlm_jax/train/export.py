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
from vlm_jax.generation import generate
from vlm_jax.hub.load import load
from vlm_jax.hub.save import save_pretrained
from vlm_jax.lora import requantization_error
from vlm_jax.model import Model
from vlm_jax.sharding import mesh_under
from vlm_jax.train.reading import load_adapted, load_run, open_run
from vlm_jax.train.result import write_adapter
from vlm_jax.trees import flatten
from vlm_jax.weights import is_quantized

# The largest logit difference that rounding explains, in standard deviations of the logits, by the
# dtype computed in. Measured of merged tiny runs: 0.03 to 0.07 in bfloat16, 4e-6 in float32.
EXPLAINED = {"bfloat16": 0.25, "float16": 0.05, "float32": 1e-3}
ANSWER = 8  # tokens of a probe's answer
QUESTIONS = ("What is in this picture?", "Describe the colors.")
TURNS = 4  # pictures of a probe: one drawn ramp, turned


@dataclasses.dataclass(frozen=True)
class Exported:
    """How the files that were written differ from the run, as read back.

    into: what LoRA was merged into, or None. difference: the largest of |logits|, on a batch whose
    logits have the standard deviation `deviation`. dtype: computed in. same: of `probes` greedy
    answers those that agree; none are asked of an adapter, which rounds nothing. lost: see
    `vlm_jax.lora.requantization_error`, where kernels were quantized again.
    """

    directory: str
    into: str | None
    difference: float
    deviation: float
    dtype: str
    same: int
    probes: int
    lost: tuple[float, float] | None = None

    @property
    def explained(self) -> bool:
        """Whether rounding explains the difference; of kernels in 4 bits again `lost` does."""
        # An accelerator multiplies float32 in fewer bits unless it is told otherwise.
        dtype = self.dtype if jax.default_backend() == "cpu" else "bfloat16"
        return self.lost is not None or self.difference <= EXPLAINED[dtype] * self.deviation

    def __str__(self) -> str:
        cost = "the largest logit difference"
        if self.into is not None and self.lost is None and self.explained:
            cost = f"what rounding to {self.dtype} costs of logits"
        judged = f"{self.difference:.2g} is {cost}" if self.difference else "logits are equal"
        if self.probes:
            judged = f"same answers on {self.same} of {self.probes} probes; {judged}"
        words = [
            f"Wrote '{self.directory}' and read it back: {judged} (their standard deviation is "
            f"{self.deviation:.2f})."
        ]
        if self.into is not None:
            words.append(f"LoRA was merged into {self.into}.")
        if self.lost is not None:
            words.append(
                f"Quantizing the sums again changed them by {100 * self.lost[0]:.2f} % of their "
                f"norm, which is {self.lost[1]:.2f} times the norm of what was learned: leave "
                f"--quantized out to keep it."
            )
        if not self.explained:
            words.append(
                f"Warning: this is more than rounding to {self.dtype} explains, so these files are "
                f"not the run. Use the run's adapter instead, and please report it."
            )
        elif self.same < self.probes:
            words.append(
                f"Warning: {self.probes - self.same} answers differ. Before you use these files, "
                f"compare `vlm-jax evaluate` of --model '{self.directory}' with that of the run; "
                f"without --merge nothing is rounded."
            )
        return " ".join(words)


def probe(encoder: Encoder, question: str = QUESTIONS[0], turn: int = 0) -> Batch:
    """Return a small batch that runs every part of the model: a drawn image and a question."""
    return _batch(encoder, [_example(encoder, question, turn)])


def _batch(encoder: Encoder, examples: list[Any]) -> Batch:
    tokens, patches = (max(len(one[name]) for one in examples) for name in ("tokens", "patches"))
    return encoder.collate([[one] for one in examples], tokens, patches)


def _example(encoder: Encoder, question: str, turn: int) -> Any:
    content: list[dict[str, str]] = [{"type": "text", "text": question}]
    images = []
    if encoder.media.processor is not None:
        ramp = np.arange(64, dtype=np.uint8) * 4
        pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), -1)
        images.append(Image.fromarray(np.rot90(pixels, turn)))
        content.insert(0, {"type": "image"})
    return encoder.prompt({"messages": [{"role": "user", "content": content}], "images": images})


def _answers(model: Model, params: Mapping[str, Any], encoder: Encoder) -> np.ndarray:
    """Return int32 [probes, ANSWER]: greedy answers to each question of each picture."""
    asked = [_example(encoder, one, turn) for one in QUESTIONS for turn in range(TURNS)]
    return np.asarray(generate(model, params, _batch(encoder, asked), ANSWER))


def _logits(model: Model, params: Mapping[str, Any], batch: Batch) -> np.ndarray:
    apply = jax.jit(lambda params, batch: model.apply({"params": params}, batch))
    return np.asarray(apply(dict(params), batch))


def export(
    run: str | Path, out: str | Path | None, merge: bool, quantized: bool = False
) -> Exported:
    """Write a run's result to `out` and return how far what was read back differs.

    out: None: the directory `merged` or `exported` in the run's.

    merge: a whole checkpoint for `transformers`, LoRA merged, in the base's dtype and layout;
    otherwise the adapter in PEFT's format. quantized: of a run on a 4-bit base, quantize merged
    kernels again, as bitsandbytes stores them. `out` appears whole or not at all.
    Raises `UserError` where `out` holds files already, or the run has nothing to export.
    """
    config, encoder = open_run(run)  # what is missing is told before weights are read
    name = "merged" if merge else "exported"
    out = Path(run).expanduser() / name if out is None else Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"The output directory '{out}' exists and is not empty. Name a new one by --out."
        )
    if quantized and not merge:
        raise UserError("--quantized says how a merged checkpoint is stored: add --merge.")
    model, params, config = load_run(run, exact=True, encoder=encoder)
    batch = probe(encoder)
    into = lost = None
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
    answers = _answers(model, params, encoder) if merge else np.zeros((0, ANSWER))
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
    repeated = _answers(again, read, encoder) if merge else answers
    return Exported(
        directory=str(out),
        into=into,
        difference=float(np.abs(before - after).max()),
        deviation=float(before.std()),
        dtype=str(model.dtype),
        same=int((answers == repeated).all(1).sum()),
        probes=len(answers),
        lost=lost,
    )
