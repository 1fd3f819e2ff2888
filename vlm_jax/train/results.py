"""Results of a finished run: read back, exported as an adapter or a merged checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vlm_jax import config as configs
from vlm_jax.adapters.added_tokens import is_added
from vlm_jax.adapters.lora import requantization_error
from vlm_jax.adapters.modules_to_save import bias_leaves, saved_modules
from vlm_jax.batch import Batch
from vlm_jax.config.specs import RunSpec
from vlm_jax.data import Encoder
from vlm_jax.distributed import processes
from vlm_jax.errors import UserError, explained, refuse
from vlm_jax.files.atomic import whole_directory, write_json
from vlm_jax.generation import generate
from vlm_jax.hub.adapter_files import load_either, save_adapter
from vlm_jax.hub.companions import copy_all, spoken
from vlm_jax.hub.load import load, resolve
from vlm_jax.hub.peft import save_peft
from vlm_jax.hub.save import save_pretrained
from vlm_jax.hub.tensors import find_tensors
from vlm_jax.model import Model
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.models.layers.linear import is_lora
from vlm_jax.sharding import make_mesh, mesh_under, shard_params
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.fingerprint import identity
from vlm_jax.train.mesh import mesh_for_reading
from vlm_jax.train.placement import of_dtype
from vlm_jax.train.run_dir import RESULTS, places_of
from vlm_jax.train.setup import (
    base_name,
    build,
    compute_dtype,
    encoder_of,
    load_base,
    state_options,
)
from vlm_jax.trees import flatten, join, split, unflatten
from vlm_jax.weights import bnb, is_quantized


def stored_dtype(directory: Path) -> str:
    """Return the widest dtype of a checkpoint's dense tensors: in it none of them is rounded."""
    found = find_tensors(directory)
    four = {bnb.weight_of(name) for name in found}  # 4-bit weights, and None for all others
    kinds = {
        entry.dtype
        for name, entry in found.items()
        if bnb.weight_of(name) is None and name not in four
    }
    narrow = {"BF16": "bfloat16", "F16": "float16"}
    return narrow[kinds.pop()] if len(kinds) == 1 and kinds <= narrow.keys() else "float32"


def open_run(directory: str | Path) -> tuple[RunSpec, Encoder]:
    """Return a run's config and encoder; no weights are read. Raises where it has no weights."""
    config = _config_of(directory := Path(directory).expanduser())
    full = directory / "model"
    if full.is_dir():
        config = config.having({"model.adapter": None})  # the model holds what it had
        return config, encoder_of(config, full)
    adapter = directory / "adapter"
    base = resolve(base_name(config), config.model.revision, weights=False)
    return config, encoder_of(config, base, adapter if adapter.is_dir() else None)


def _config_of(directory: Path) -> RunSpec:
    if not (directory / "config.json").is_file():
        raise UserError(
            f"'{directory}' holds no run: there is no config.json. Give the training.output_dir of "
            f"a run."
        )
    with explained(
        UserError,
        lambda error: (
            f"The run in '{directory}' cannot be read: {error} If this is a checkpoint and no run, "
            f"give it by --model."
        ),
    ):
        config = configs.load(directory / "config.json")
    finished = any((directory / name).is_dir() for name in RESULTS)
    if not finished and not places_of(config, directory).saved_steps():
        raise UserError(f"The run in '{directory}' has neither a result nor a checkpoint yet.")
    # A kernel was forced for the devices that it trained on; its result is read on any.
    return config.having({"model.attention": None})


def load_run(
    directory: str | Path, exact: bool = False, encoder: Encoder | None = None
) -> tuple[Model, dict[str, Any], RunSpec]:
    """Return (model, params, config) of a run: its result, or its newest checkpoint without one.

    exact: in the dtype that the base is stored in, so that no weight is rounded; otherwise in the
    run's compute dtype. encoder: the run's, where it is open already. It is spread over this
    process's devices where one has no room for it, see `mesh_for_reading`.
    """
    directory = Path(directory).expanduser()
    config = _config_of(directory)
    full = directory / "model"
    if exact:
        stored = full if full.is_dir() else resolve(base_name(config), config.model.revision)
        config = config.having({"model.dtype": stored_dtype(stored)})
    mesh = mesh_for_reading(config)
    if full.is_dir():
        model, params = load(str(full), compute_dtype(config), mesh=mesh)
        # The result holds the adapter's settings and tokenizer too.
        return model, params, config.having({"model.adapter": None})
    if (directory / "adapter").is_dir():
        model, params = load_adapted(config, directory / "adapter", mesh)
        return model, params, config
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    model, params, table, _ = build(config, mesh, encoder)
    trainable, frozen = split(params, table)
    options = state_options(config)
    kept, dtype = ("ema", "float32") if options["ema"] else ("trainable", options["param_dtype"])
    same = identity(config, model, table, rows=0)
    same = {name: same[name] for name in ("base", "training table", "lora", "adapter")}
    with Checkpoints(places_of(config, directory).checkpoints, same) as checkpoints:
        like, step = of_dtype(trainable, dtype), checkpoints.steps[-1]
        trained = checkpoints.restore_trainable(like, step, kept)
    return model, join(trained, frozen), config


def load_adapted(config: RunSpec, adapter: Path, mesh: Any = None) -> tuple[Model, dict[str, Any]]:
    """Return the base of a config with the adapter of a directory, PEFT's or a bottleneck's."""
    model, params = load_base(config, mesh)
    model, params = load_either(model, params, adapter)
    return model, params if mesh is None else shard_params(model, params, mesh)


def write_adapter(
    model: Model, params: Mapping[str, Any], directory: Path, encoder: Encoder
) -> None:
    """Write an adapter with its image settings; it appears whole or not at all.

    The tokenizer and chat template of an adapter that was trained further come along. LoRA is in
    PEFT's format, a bottleneck adapter in the `adapters` library's.
    """
    save = save_peft if model.adapter is None else save_adapter
    with whole_directory(directory) as folder:
        save(model, params, folder, compare_base=False)  # see check_kept
        for before in encoder.directories[:-1]:  # the last one is the base
            copy_all(spoken(Path(before)), folder)
        for name, settings in (
            ("preprocessor_config.json", encoder.image_settings()),
            ("video_preprocessor_config.json", encoder.video_settings()),
        ):
            if settings is not None:  # what is served must be cut as what was trained on
                write_json(folder / name, settings)


def write_result(
    model: Model, params: Mapping[str, Any], directory: Path, encoder: Encoder
) -> Path:
    """Write `adapter/`, or `model/` after full training, and return its path.

    It appears whole or not at all. Of several processes, which all call this, the first writes.
    """
    in_full = model.lora is None and model.adapter is None
    path = directory / ("model" if in_full else "adapter")
    if in_full:
        save_pretrained(
            model,
            params,
            path,
            processor=encoder.image_settings(),
            video_processor=encoder.video_settings(),
        )
    else:
        params = _here(model, params)
        if processes.is_primary():
            write_adapter(model, params, path, encoder)
    processes.wait_for_all("the result is written")
    return path


def _here(model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with what its adapter holds gathered from all processes' devices."""
    if processes.count() == 1:
        return dict(params)
    flat = flatten(params)
    added = [path.split("/")[-2] for path in flat if is_added(path)]
    saved = {
        *saved_modules(model, params, (*model.modules_to_save, *added)).leaves,
        *bias_leaves(model, params),
    }
    written = {
        path: leaf
        for path, leaf in flat.items()
        if path in saved or is_lora(path) or is_adapter(path) or is_added(path)
    }
    return unflatten({**flat, **processes.to_host(written, processes.is_primary())})


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
    `vlm_jax.adapters.lora.requantization_error`, where kernels were quantized again.
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
        # An accelerator multiplies float32 in fewer bits by default.
        dtype = self.dtype if jax.default_backend() == "cpu" else "bfloat16"
        return self.lost is not None or self.difference <= EXPLAINED[dtype] * self.deviation

    def __str__(self) -> str:
        rounded = self.into is not None and self.lost is None and self.explained
        cost = (
            f"what rounding to {self.dtype} costs of logits"
            if rounded
            else "the largest logit difference"
        )
        answers = f"same answers on {self.same} of {self.probes} probes; " if self.probes else ""
        judged = f"{self.difference:.2g} is {cost}" if self.difference else "logits are equal"
        changed, forgotten = self.lost or (0.0, 0.0)
        sentences = (
            (
                True,
                f"Wrote '{self.directory}' and read it back: {answers}{judged} (their standard "
                f"deviation is {self.deviation:.2f}).",
            ),
            (self.into is not None, f"LoRA was merged into {self.into}."),
            (
                self.lost is not None,
                f"Quantizing the sums again changed them by {100 * changed:.2f} % of their norm, "
                f"which is {forgotten:.2f} times the norm of what was learned: leave --quantized "
                f"out to keep it.",
            ),
            (
                not self.explained,
                f"Warning: this is more than rounding to {self.dtype} explains, so these files are "
                f"not the run. Use the run's adapter instead, and please report it.",
            ),
            (
                self.explained and self.same < self.probes,
                f"Warning: {self.probes - self.same} answers differ. Before you use these files, "
                f"compare `vlm-jax evaluate` of --model '{self.directory}' with that of the run; "
                f"without --merge nothing is rounded.",
            ),
        )
        return " ".join(sentence for applies, sentence in sentences if applies)


def probe(encoder: Encoder, questions: Sequence[str] = QUESTIONS[:1], turns: int = 1) -> Batch:
    """Return a small batch that runs every part of the model: questions about a drawn image."""
    examples = [_example(encoder, one, turn) for one in questions for turn in range(turns)]
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
    return np.asarray(generate(model, params, probe(encoder, QUESTIONS, TURNS), ANSWER))


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
    config, encoder = open_run(run)  # what is missing is reported before weights are read
    out = Path(Path(run, "merged" if merge else "exported") if out is None else out).expanduser()
    refuse(
        (
            out.exists() and (not out.is_dir() or any(out.iterdir())),
            f"The output directory '{out}' exists and is not empty. Name a new one by --out.",
        ),
        (
            quantized and not merge,
            "--quantized says how a merged checkpoint is stored: add --merge.",
        ),
    )
    model, params, config = load_run(run, exact=True, encoder=encoder)
    batch = probe(encoder)
    into = None
    refuse(
        (
            merge and model.adapter is not None,
            f"The run '{run}' trained bottleneck adapters, which are non-linear and cannot be "
            f"merged. Leave --merge out for the adapter's own files.",
        ),
        (
            not merge and model.lora is None and model.adapter is None,
            f"The run '{run}' trained the language model in full: there is no adapter to export. "
            f"Add --merge for a whole checkpoint.",
        ),
    )
    mesh = mesh_under(params)  # one copy of them may need several devices
    lost = requantization_error(model, params) if quantized else None
    before = _logits(model, params, batch)
    answers = _answers(model, params, encoder) if merge else np.zeros((0, ANSWER))
    if merge:
        if model.lora is not None:
            four = any(is_quantized(leaf) for leaf in flatten(params).values())
            into = "the decoded 4-bit weights that it was trained on" if four else "the base"
        save_pretrained(
            model,
            params,
            out,
            quantized=quantized,
            processor=encoder.image_settings(),
            video_processor=encoder.video_settings(),
        )
        del params  # two models may not have room
        again, read = load(str(out), str(model.dtype), mesh=mesh)
    else:
        write_adapter(model, params, out, encoder)
        del params
        again, read = load_adapted(config, out, mesh)
    difference = np.abs(before - _logits(again, read, batch)).max()
    repeated = _answers(again, read, encoder) if merge else answers
    return Exported(
        directory=str(out),
        into=into,
        difference=float(difference),
        deviation=float(before.std()),
        dtype=str(model.dtype),
        same=int((answers == repeated).all(1).sum()),
        probes=len(answers),
        lost=lost,
    )
