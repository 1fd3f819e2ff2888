"""Recommends a method for data, model and hardware, with a config."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax import config as configs
from vlm_jax.config.parse import sources_value
from vlm_jax.data import Encoder, read_records
from vlm_jax.data.records.sources import is_list_of_sources
from vlm_jax.data.statistics import RowChoice, Sizes, choose_row, measure, pixel_limits
from vlm_jax.errors import UserError
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
    try:
        source = sources_value(data) if isinstance(data, str) else data
    except ValueError as error:
        raise UserError(f"--data is {data!r}; expected {error}.") from None
    records = read_records(source, image_folder, split)
    named = isinstance(source, str) or is_list_of_sources(source)  # and no rows in memory
    directory = resolve(model, revision, weights=False)
    access: dict[str, Any] = {
        "image_folder": image_folder,
        "allow_absolute_paths": allow_absolute_paths,
    }
    encoder = Encoder(directory, **access)
    count = len(records)
    band = next(one for one in BANDS if count < one.below)
    methods = _suited(band.method)
    in_4_bits = bool(encoder.hf_config.get("quantization_config"))
    if in_4_bits:
        methods = [at for at in methods if METHODS[at].quantize]
    start = methods[0]

    chosen_at = len(METHODS)
    for max_pixels, reason in pixel_limits(encoder, records):
        limited = encoder.replace(max_pixels=max_pixels)
        found = measure(limited, records, max_pixels, reason)
        row = choose_row(encoder, found.sizes)
        for at in methods:
            made = _config(
                METHODS[at], count, row, found,
                {
                    "model": {"name_or_path": model, "revision": revision},
                    "data": {
                        "train_file": source if named else None,
                        "image_folder": image_folder,
                        "train_split": split,
                        "allow_absolute_paths": allow_absolute_paths or None,
                    },
                    "training": {"output_dir": output_dir},
                },
            )  # fmt: skip
            # Copies of the model where one device holds it, else one copy that all share.
            alone = _need(made, encoder, row.shape)
            for shards in sorted({1, 1 if machine is None else machine.count}):
                need = alone.over(shards)
                if machine is None or need.total <= machine.usable:
                    chosen_at = at
                    break
            if chosen_at < len(METHODS):
                made |= _mesh(machine, shards)
                break
        if chosen_at < len(METHODS):
            break
    else:
        assert machine is not None
        raise UserError(
            f"No method fits {machine.name} ({machine.count} x {machine.memory / GB:.0f} GB) by "
            f"estimate: {METHODS[-1].name} with rows of {row.shape[0]} tokens and {row.shape[1]} "
            f"patches needs {need.total / GB:.1f} GB a device. Take more or larger devices, a "
            f"smaller model, or shorter examples."
        )
    if in_4_bits:
        made["model"].pop("quantize", None)
    devices, budget = (1, _here()) if machine is None else (machine.count, machine.usable)
    rows = max(1, round(band.batch / row.density / devices))
    for micro_batches in (2**n for n in range(rows.bit_length() + 1)):
        at_once = max(1, round(rows / micro_batches))
        made["training"] |= {
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": micro_batches if at_once > 1 else rows,
        }
        need = _need(made, encoder, row.shape, at_once).over(shards)
        if at_once == 1 or need.total <= budget:
            break
    reasons = _reasons(count, band, start, chosen_at, row, found, need, machine, made)
    return Recommendation(METHODS[chosen_at], reasons, made, need, machine)


def _suited(start: int) -> list[int]:
    """Return the methods to try from one on: the dearest first, none of a larger rank."""
    most = METHODS[start].rank or math.inf
    return [i for i, one in enumerate(METHODS) if i >= start and one.rank <= most]


# The config


def _config(
    method: Method,
    count: int,
    row: RowChoice,
    found: Sizes,
    given: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    band = next(one for one in BANDS if count < one.below)
    made: dict[str, dict[str, Any]] = {
        "model": {
            **given["model"],
            "quantize": "nf4-dq" if method.quantize else None,
            "vision_encoder_lr_scale": method.vision,
        },
        "lora": {"enabled": method.rank > 0},
        "training": {
            **given["training"],
            "num_train_epochs": band.epochs,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,  # gradients are summed: what needs most
            "learning_rate": method.rate,
            "optim": method.optim,
        },
        "data": {
            **given["data"],
            "eval_share": float(f"{min(EVAL_SHARE, EVAL_MOST / count):.1g}") if count > 1 else None,
            "max_seq_length": row.shape[0],
            "max_pixels": found.max_pixels,
            "packing": row.packing,
            "on_bad_example": "skip" if found.bad else "raise",
        },
    }
    if method.rank:
        made["lora"] |= {"r": method.rank, "alpha": 2 * method.rank}
    return {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in made.items()
    }


def _mesh(machine: Hardware | None, shards: int) -> dict[str, dict[str, int]]:
    if machine is None or machine.count == 1:
        return {}
    copies = machine.count // shards
    return {"mesh": {"devices": machine.count, "data": copies, "fsdp": shards}}


def _need(
    made: dict[str, dict[str, Any]], encoder: Encoder, shape: tuple[int, int], rows: int = 1
) -> Estimate:
    flat: dict[str, Any] = configs.flatten_config(made)
    flat |= {"model.name_or_path": encoder.directory, "model.revision": None}
    return estimate(configs.load(None, flat), shape, rows, len(encoder.tokenizer))


def _here() -> int:
    """Return the bytes that a program may have of this machine's first device; 0: nothing says."""
    try:
        return int(memory_of(jax.local_devices()[0]) * USABLE)
    except UserError:
        return 0


def _reasons(
    count: int,
    band: Band,
    start: int,
    chosen: int,
    row: RowChoice,
    found: Sizes,
    need: Estimate,
    machine: Hardware | None,
    made: dict[str, dict[str, Any]],
) -> list[tuple[str, str, str]]:
    method, tokens = METHODS[chosen], row.shape[0]
    why = band.why
    if start != band.method:
        why = f"the checkpoint is in 4 bits already, so not {METHODS[band.method].name}"
    if chosen != start and machine is not None:
        why = f"{METHODS[start].name} suits {count:,} examples, but does not fit {machine.name}"
    rows = [
        ("examples", f"{count:,}", f"{len(found.sizes) + found.bad:,} of them measured"),
        ("method", method.name, why),
        (
            "row",
            f"{tokens:,} tokens",
            f"99 of 100 examples have at most {int(np.quantile(found.sizes[:, 0], 0.99)):,}; "
            f"the median {int(np.median(found.sizes[:, 0])):,}",
        ),
        (
            "packing",
            "on" if row.packing else "off",
            f"{row.density:.1f} examples a row, {100 * row.saved:.0f} % less to compute"
            if row.packing
            else "it would save little",
        ),
    ]
    if found.max_pixels is not None:
        side = round(math.sqrt(found.max_pixels))
        text = f"about {side} x {side}: {found.reason}"
        rows.append(("max_pixels", f"{found.max_pixels:,}", text))
    training = made["training"]
    at_once = training["per_device_train_batch_size"]
    micro_batches = training["gradient_accumulation_steps"]
    step = at_once * micro_batches * (machine.count if machine else 1)
    if mesh := made.get("mesh"):
        shared = mesh["fsdp"] > 1
        text = "one device does not hold it all" if shared else "one device holds it all"
        rows.append(("mesh", f"fsdp {mesh['fsdp']}, data {mesh['data']}", text))
    rows += [
        ("learning rate", f"{method.rate:g}", "usual for this method"),
        ("rows a step", f"{step}", f"about {round(step * row.density)} examples"),
        (
            "rows at once",
            f"{at_once}",
            "as many as a step has on a device"
            if micro_batches == 1
            else f"in {micro_batches} micro-batches: more would not fit",
        ),
        (
            "memory",
            f"{size(need.total)} a device",
            f"an estimate: frozen weights {size(need.weights)}, trained ones with gradients "
            f"{size(need.trained)}, moments {size(need.moments)}, activations "
            f"{size(need.activations)}",
        ),
    ]
    if machine is None:
        rows.append(
            (
                "hardware",
                "not named",
                "the method was checked against none, rows at once against this machine: name what "
                "trains by --hardware",
            )
        )
    else:
        rows.append(
            (
                "hardware",
                f"{machine.count} x {machine.device}",
                f"{machine.memory / GB:.0f} GB each, {machine.usable / GB:.1f} of them counted on",
            )
        )
    if share := made["data"].get("eval_share"):
        rows.append(
            (
                "held out",
                f"{share:.0%} of them",
                "to evaluate on; with a file for that set data.eval_file instead",
            )
        )
    if found.bad:
        most = configs.get_config().data.max_bad_share
        stops = found.bad > most * (len(found.sizes) + found.bad)
        text = (
            f" More than data.max_bad_share ({most:.0%}): training stops, so repair them."
            if stops
            else ""
        )
        rows.append(("left out", f"{found.bad} of the sample", found.first + text))
    if row.longer:
        rows.append(("longer", f"{row.longer} of the sample", "treated as data.overlong says"))
    return rows


def size(count: int) -> str:
    """Return bytes in words."""
    return f"{count / GB:.1f} GB" if count >= GB // 10 else f"{count / 1e6:.1f} MB"


def write(recommendation: Recommendation, file: Path) -> None:
    """Write the config as `.yaml` or `.py`, each of which `vlm-jax train --config` takes."""
    told = f"{recommendation.method.name}, as vlm-jax recommend chose it."
    if file.suffix in (".yaml", ".yml"):
        import yaml

        body = yaml.safe_dump(recommendation.config, sort_keys=False, allow_unicode=True)
        file.write_text(f"# {told}\n{body}", encoding="utf-8")
        return
    lines = [f'"""{told}"""', "", "from vlm_jax import config", "", "", "def get_config():"]
    lines.append("    c = config.get_config()")
    for key, value in configs.flatten_config(recommendation.config).items():
        lines.append(f"    c.{key} = {value!r}")
    file.write_text("\n".join([*lines, "    return c", ""]), encoding="utf-8")


def check_out(file: Path) -> None:
    """Raise `UserError` where the config could not be written there."""
    if file.suffix not in (".yaml", ".yml", ".py"):
        raise UserError(f"--out '{file}' must end in .yaml or .py, the forms of a config.")
    if file.exists():
        raise UserError(f"--out '{file}' exists. Delete it, or choose another path.")
