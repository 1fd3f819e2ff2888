"""Recommends a method for data, model and hardware, with a config."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from vlm_jax import config as configs
from vlm_jax.config.parse import sources_value
from vlm_jax.config.specs import DataSpec
from vlm_jax.data import Encoder, read_records
from vlm_jax.data.records.sources import is_list_of_sources
from vlm_jax.data.statistics import RowChoice, Sizes, choose_row, measure, pixel_limits
from vlm_jax.errors import UserError, explained, refuse
from vlm_jax.hardware import GB, USABLE, Hardware, hardware
from vlm_jax.hub.load import resolve
from vlm_jax.train.estimate import Estimate, estimate
from vlm_jax.train.mesh import memory_of


class Method(NamedTuple):
    """A way of fine-tuning. rank: of LoRA, 0: full training. vision: its learning rate's scale."""

    name: str
    rank: int
    vision: float
    quantize: bool
    rate: float
    optim: str = "adamw"


# From the dearest to the cheapest: what does not fit falls to the next one whose rank is no larger.
# Weights in 4 bits cost time, so they come where 16 bits do not fit.
METHODS = (
    Method("full fine-tuning", 0, 0.1, False, 1e-5),
    Method("LoRA r=32, vision tower at a tenth", 32, 0.1, False, 1e-4),
    Method("LoRA r=16, vision tower at a tenth", 16, 0.1, False, 1e-4),
    Method("LoRA r=16, vision tower frozen", 16, 0.0, False, 2e-4),
    Method("LoRA r=8, vision tower frozen", 8, 0.0, False, 2e-4),
    Method("LoRA r=4, vision tower frozen", 4, 0.0, False, 2e-4),
    Method("QLoRA r=16, vision tower frozen", 16, 0.0, True, 2e-4),
    Method("QLoRA r=4, vision tower frozen", 4, 0.0, True, 2e-4),
    Method("QLoRA r=4, 8-bit moments in pages", 4, 0.0, True, 2e-4, "paged_adamw_8bit"),
)


EVAL_SHARE = 0.1  # of the records, for evaluation
EVAL_MOST = 1_000  # of them: more take time and tell little


class Band(NamedTuple):
    """Data sets below `below` records: the method, and how long and in what batches."""

    below: float
    method: int
    epochs: float
    batch: int  # examples of a step
    why: str


BANDS = (
    Band(1_000, 5, 3, 8, "few examples: a small adapter on frozen weights forgets least"),
    Band(3_000, 4, 3, 16, "some thousand examples: a modest adapter, vision as it is"),
    Band(10_000, 3, 2, 16, "thousands of examples: an adapter of rank 16, vision as it is"),
    Band(30_000, 2, 2, 32, "enough to move the vision tower a little"),
    Band(100_000, 1, 1, 32, "enough for a larger adapter and a vision tower at a low rate"),
    Band(math.inf, 0, 1, 64, "enough examples to train every weight"),
)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """reasons: (what, value, why) of each choice; config: what a run needs, and no more keys."""

    method: Method
    reasons: list[tuple[str, str, str]]
    config: dict[str, dict[str, Any]]
    estimate: Estimate
    hardware: Hardware | None


class _Candidate(NamedTuple):
    """A config of a method, the sample that it fits, and its memory where shards hold a copy."""

    method: Method
    sample: Sizes
    row: RowChoice
    config: dict[str, dict[str, Any]]
    shards: int
    need: Estimate


def recommend(
    data: Any,
    model: str,
    hardware_name: str | None = None,
    *,
    image_folder: str | None = None,
    split: str | None = None,
    allow_absolute_paths: bool = False,
    revision: str | None = None,
    output_dir: str = "outputs/recommended",
) -> Recommendation:
    """Return the usual recipe for so many records, as far as it fits the hardware.

    data: whatever data.train_file may be. Of the model only small files are read. Raises
    `UserError` where nothing fits, and for bad data, models and unknown hardware.
    """
    machine = None if hardware_name is None else hardware(hardware_name)
    with explained(ValueError, lambda error: f"--data is {data!r}; expected {error}."):
        source = sources_value(data) if isinstance(data, str) else data
    records = read_records(source, image_folder, split)
    named = isinstance(source, str) or is_list_of_sources(source)  # and no rows in memory
    encoder = Encoder(
        resolve(model, revision, weights=False),
        image_folder=image_folder,
        allow_absolute_paths=allow_absolute_paths,
    )
    count = len(records)
    band = next(one for one in BANDS if count < one.below)
    in_4_bits = bool(encoder.hf_config.get("quantization_config"))
    most = METHODS[band.method].rank or math.inf  # no cheaper method has a larger rank
    methods = [
        one
        for one in METHODS[band.method :]
        if one.rank <= most and (one.quantize or not in_4_bits)
    ]
    given: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": model, "revision": revision},
        "data": {
            "train_file": source if named else None,
            "image_folder": image_folder,
            "train_split": split,
            "allow_absolute_paths": allow_absolute_paths or None,
        },
        "training": {"output_dir": output_dir},
    }

    def candidates() -> Iterator[_Candidate]:
        """Yield what to try, the best first."""
        for max_pixels, reason in pixel_limits(encoder, records):
            sample = measure(encoder.replace(max_pixels=max_pixels), records, max_pixels, reason)
            row = choose_row(encoder, sample.sizes)
            for method in methods:
                made = _config(method, band, count, row, sample, given)
                # Copies of the model where one device holds it, else one copy that all share.
                alone = _need(made, encoder, row.shape)
                for shards in sorted({1, 1 if machine is None else machine.count}):
                    yield _Candidate(method, sample, row, made, shards, alone.over(shards))

    for best in candidates():
        if machine is None or best.need.total <= machine.usable:
            break
    else:
        assert machine is not None
        raise UserError(
            f"No method fits {machine.name} ({machine.count} x {machine.memory / GB:.0f} GB) by "
            f"estimate: {METHODS[-1].name} with rows of {best.row.shape[0]} tokens and "
            f"{best.row.shape[1]} patches needs {best.need.total / GB:.1f} GB a device. Take more "
            f"or larger devices, a smaller model, or shorter examples."
        )
    made = best.config
    if machine is not None and machine.count > 1:
        made["mesh"] = {
            "devices": machine.count,
            "data": machine.count // best.shards,
            "fsdp": best.shards,
        }
    if in_4_bits:
        made["model"].pop("quantize", None)
    best = _with_rows(best, band, encoder, machine)
    why = band.why
    if methods[0] != METHODS[band.method]:
        why = f"the checkpoint is in 4 bits already, so not {METHODS[band.method].name}"
    if best.method != methods[0] and machine is not None:
        why = f"{methods[0].name} suits {count:,} examples, but does not fit {machine.name}"
    return Recommendation(
        best.method, _reasons(best, count, why, machine), made, best.need, machine
    )


def _with_rows(
    best: _Candidate, band: Band, encoder: Encoder, machine: Hardware | None
) -> _Candidate:
    """Return a candidate whose config has the band's batch, in as few micro-batches as fit."""
    devices, budget = (1, _here()) if machine is None else (machine.count, machine.usable)
    rows = max(1, round(band.batch / best.row.density / devices))
    for micro_batches in (2**n for n in range(rows.bit_length() + 1)):
        at_once = max(1, round(rows / micro_batches))
        best.config["training"] |= {
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": micro_batches if at_once > 1 else rows,
        }
        need = _need(best.config, encoder, best.row.shape, at_once).over(best.shards)
        if at_once == 1 or need.total <= budget:
            break
    return best._replace(need=need)


def _config(
    method: Method,
    band: Band,
    count: int,
    row: RowChoice,
    sample: Sizes,
    given: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return the config of a method, without the keys of `given` and others that are None."""
    made: dict[str, dict[str, Any]] = {
        "model": {
            **given["model"],
            "quantize": "nf4-dq" if method.quantize else None,
            "vision_encoder_lr_scale": method.vision,
        },
        "lora": {"enabled": True, "r": method.rank, "alpha": 2 * method.rank}
        if method.rank
        else {"enabled": False},
        "training": {
            **given["training"],
            "num_train_epochs": band.epochs,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,  # gradients are summed: what needs most
            "learning_rate": method.rate,
            "optim": method.optim,
            "remat_policy": "auto",  # estimated here as what keeps least
        },
        "data": {
            **given["data"],
            "eval_share": float(f"{min(EVAL_SHARE, EVAL_MOST / count):.1g}") if count > 1 else None,
            "max_seq_length": row.shape[0],
            "max_pixels": sample.max_pixels,
            "packing": row.packing,
            "on_bad_example": "skip" if sample.bad else "raise",
        },
    }
    return {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in made.items()
    }


def _need(
    made: dict[str, dict[str, Any]], encoder: Encoder, shape: tuple[int, int], rows: int = 1
) -> Estimate:
    """Return the memory of a step of `rows` rows at once on one device."""
    base = {"model.name_or_path": encoder.directory, "model.revision": None}
    config = configs.load(None, {**configs.flatten_config(made), **base})
    return estimate(config, shape, rows, len(encoder.tokenizer))


def _here() -> int:
    """Return the bytes that a program may have of this machine's first device; 0: nothing says."""
    try:
        return int(memory_of(jax.local_devices()[0]) * USABLE)
    except UserError:
        return 0


def _reasons(
    best: _Candidate, count: int, why: str, machine: Hardware | None
) -> list[tuple[str, str, str]]:
    """Return (what, value, why) of each choice; why: of the method."""
    row, sample, need, made = best.row, best.sample, best.need, best.config
    tokens, measured = sample.sizes[:, 0], len(sample.sizes) + sample.bad
    rows = [
        ("examples", f"{count:,}", f"{measured:,} of them measured"),
        ("method", best.method.name, why),
        (
            "row",
            f"{row.shape[0]:,} tokens",
            f"99 of 100 examples have at most {int(np.quantile(tokens, 0.99)):,}; "
            f"the median {int(np.median(tokens)):,}",
        ),
        (
            "packing",
            "on" if row.packing else "off",
            f"{row.density:.1f} examples a row, {100 * row.saved:.0f} % less to compute"
            if row.packing
            else "it would save little",
        ),
    ]
    if sample.max_pixels is not None:
        side = round(math.sqrt(sample.max_pixels))
        text = f"about {side} x {side}: {sample.reason}"
        rows.append(("max_pixels", f"{sample.max_pixels:,}", text))
    if mesh := made.get("mesh"):
        text = "one device does not hold it all" if best.shards > 1 else "one device holds it all"
        rows.append(("mesh", f"fsdp {mesh['fsdp']}, data {mesh['data']}", text))
    at_once = made["training"]["per_device_train_batch_size"]
    micro_batches = made["training"]["gradient_accumulation_steps"]
    step = at_once * micro_batches * (machine.count if machine else 1)
    rows += [
        ("learning rate", f"{best.method.rate:g}", "usual for this method"),
        ("rows a step", f"{step}", f"about {round(step * row.density)} examples"),
        (
            "rows at once",
            f"{at_once}",
            "as many as a step has on a device"
            if micro_batches == 1
            else f"in {micro_batches} micro-batches: more would not fit",
        ),
        ("remat policy", "auto", "recomputes what does not fit: the memory below is the least"),
        (
            "memory",
            f"{size(need.total)} a device",
            f"an estimate: frozen weights {size(need.weights)}, trained ones with gradients "
            f"{size(need.trained)}, moments {size(need.moments)}, activations "
            f"{size(need.activations)}",
        ),
        (
            "hardware",
            "not named",
            "the method was checked against none, rows at once against this machine: name what "
            "trains by --hardware",
        )
        if machine is None
        else (
            "hardware",
            f"{machine.count} x {machine.device}",
            f"{machine.memory / GB:.0f} GB each, {machine.usable / GB:.1f} of them counted on",
        ),
    ]
    if share := made["data"].get("eval_share"):
        text = "to evaluate on; with a file for that set data.eval_file instead"
        rows.append(("held out", f"{share:.0%} of them", text))
    if sample.bad:
        text, most = sample.first, DataSpec.max_bad_share
        if sample.bad > most * measured:
            text += f" More than data.max_bad_share ({most:.0%}): training stops, so repair them."
        rows.append(("left out", f"{sample.bad} of the sample", text))
    if row.longer:
        rows.append(("longer", f"{row.longer} of the sample", "treated as data.overlong says"))
    return rows


def size(count: int) -> str:
    """Return bytes in words."""
    return f"{count / GB:.1f} GB" if count >= GB // 10 else f"{count / 1e6:.1f} MB"


def write(recommendation: Recommendation, file: Path) -> None:
    """Write the config as `.yaml` or `.py`, each of which `vlm-jax train --config` takes."""
    title = f"{recommendation.method.name}, as vlm-jax recommend chose it."
    if file.suffix in (".yaml", ".yml"):
        text = f"# {title}\n" + yaml.safe_dump(
            recommendation.config, sort_keys=False, allow_unicode=True
        )
    else:
        text = (
            f'"""{title}"""\n\nfrom vlm_jax import config\n\n\ndef get_config():\n'
            "    c = config.get_config()\n"
            + "".join(
                f"    c.{key} = {value!r}\n"
                for key, value in configs.flatten_config(recommendation.config).items()
            )
            + "    return c\n"
        )
    file.write_text(text, encoding="utf-8")


def check_out(file: Path) -> None:
    """Raise `UserError` where the config could not be written there."""
    refuse(
        (
            file.suffix not in (".yaml", ".yml", ".py"),
            f"--out '{file}' must end in .yaml or .py, the forms of a config.",
        ),
        (file.exists(), f"--out '{file}' exists. Delete it, or choose another path."),
    )
