"""The `vlm-jax` command. JAX is imported only once a command is known, so that --help is quick."""

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax.cli_options import parser, split_overrides
from vlm_jax.errors import UserError
from vlm_jax.interrupts import INTERRUPTED, STOPPED, end_at_once, on_signal


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from vlm_jax import config as configs

    config = configs.load(options.config, overrides)  # bad keys are told before JAX is there
    from vlm_jax.together import together

    resume = "auto" if options.resume == "auto" else options.resume is not None
    with together(lambda error: _report(options, error)):
        from vlm_jax.train.loop import train

        return INTERRUPTED if train(config, resume)["interrupted"] else 0


def _preview(options: argparse.Namespace, overrides: list[str]) -> int:
    from vlm_jax import config as configs

    config = configs.load(options.config, overrides)
    page = options.out or (None if options.text else "preview.html")
    file = _writable(page, "--out") if page else None
    from vlm_jax.preview.collect import preview

    seen = preview(config, options.examples, options.split)
    if options.text:
        from vlm_jax.preview.terminal import show

        show(seen)
    if file is not None:
        from vlm_jax.preview.page import render

        file.write_text(render(seen), encoding="utf-8")
        print(f"Wrote {len(seen.examples)} examples to '{file}'.", file=sys.stderr)
    return 0


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    from vlm_jax import config as configs

    config = configs.load(options.config, overrides)
    # Nothing runs here: this machine's own chips are left to whoever uses them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from vlm_jax.hardware import DEVICES, hardware
    from vlm_jax.plan.report import plan_step
    from vlm_jax.plan.show import show

    if DEVICES[hardware(options.topology).device].compiles:
        print("Compiling takes up to some minutes for a large model ...", file=sys.stderr)
    sizes: dict[str, Any] = {"tokens": options.tokens, "patches": options.patches}
    if options.fit:
        return _fit(options, config, sizes)
    found = plan_step(
        config, options.topology, rows=options.rows, parameters=options.shardings, **sizes
    )
    if options.json:
        print(json.dumps(found.to_json()))
    else:
        show(found)
    return 0 if found.fits else 1


def _fit(options: argparse.Namespace, config: Any, sizes: dict[str, Any]) -> int:
    from vlm_jax.plan.fit import fit
    from vlm_jax.plan.show import show, trial_line

    if options.rows is not None or options.shardings:
        raise UserError("--fit chooses the rows itself, and lists no shardings: leave both out.")
    best, tried = fit(
        config,
        options.topology,
        **sizes,
        on_trial=lambda trial: print(trial_line(trial), file=sys.stderr),
    )
    if options.json:
        found = {
            "overrides": best and best.overrides,
            "best": best and best.report.to_json(),
            "trials": [trial.to_json() for trial in tried],
        }
        print(json.dumps(found))
    elif best is None:
        print("No setting fits: take more or larger devices, or shorter rows.")
    else:
        show(best.report)
        print(f"The fastest of {len(tried)} settings:\n{best.flags}")
    return 0 if best is not None else 1


def _recommend(options: argparse.Namespace) -> int:
    file = None if options.out is None else _writable(options.out, "--out")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlm_jax.recommend import check_out, recommend, write

    if file is not None:
        check_out(file)
    found = recommend(
        options.data,
        options.model,
        options.hardware,
        image_folder=options.image_folder,
        split=options.split,
        allow_absolute_paths=options.allow_absolute_paths,
        output_dir=f"outputs/{'recommended' if file is None else file.stem}",
    )
    console = Console(highlight=False)
    table = Table("", "recommended", "why", title=f"{options.model} on {options.data}")
    for row in found.reasons:
        table.add_row(*map(Text, row))
    console.print(table)
    if file is None:
        console.print("Nothing was written; --out FILE writes a config that vlm-jax train takes.")
        return 0
    write(found, file)
    console.print(f"Wrote '{file}'. Next, look at what the model will see, then train:")
    console.print(f"  vlm-jax preview --config {file}\n  vlm-jax train --config {file}")
    topology = options.hardware or "v5e-1"
    console.print(
        f"Memory is estimated. Where there is a compiler, it can be asked:\n"
        f"  vlm-jax plan --config {file} --topology {topology}"
    )
    return 0


def _writable(name: str, option: str) -> Path:
    """Return the path of a file to write, or raise before any work where it cannot be."""
    file = Path(name).expanduser()
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(
            f"{option} '{file}' cannot be written: it must name a file in a directory that is "
            f"there and can be written. Make '{file.parent}', or take another path."
        )
    return file


def _export(options: argparse.Namespace) -> int:
    from vlm_jax.train.export import export

    print(export(options.run, options.out, options.merge, options.quantized))
    return 0


def _open(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return (model, params, config of the run or None)."""
    import vlm_jax

    if options.run is not None:
        if options.adapter or options.dtype:
            raise UserError("--adapter and --dtype belong to --model; a run has its own.")
        from vlm_jax.train.reading import load_run

        return load_run(options.run)
    model, params = vlm_jax.load(options.model, options.dtype or "float32")
    if options.adapter:
        model, params = vlm_jax.load_peft(model, params, options.adapter)
    return model, params, None


def _encoder(model: Any, config: Any, **changes: Any) -> Any:
    from vlm_jax.data import Encoder
    from vlm_jax.train.run import make_encoder

    if config is None:
        return Encoder(model.source.directory, **changes)
    with config.unlocked():
        config.data.update(changes)
    return make_encoder(config, model)


def _evaluate(options: argparse.Namespace) -> int:
    import dataclasses
    import time

    from vlm_jax.config import get_config
    from vlm_jax.data import read_records
    from vlm_jax.evals.accuracy import accuracy

    predictions = _writable(options.predictions, "--predictions") if options.predictions else None
    records = read_records(options.data, options.image_folder, options.split)
    if not options.json:
        print("Reading the model ...", file=sys.stderr)
    model, params, config = _open(options)
    defaults = (config or get_config()).evaluation
    changes = {"allow_absolute_paths": True} if options.allow_absolute_paths else {}
    encoder = _encoder(model, config, image_folder=options.image_folder, **changes)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="" if done < total else "\n", file=sys.stderr)

    start = time.perf_counter()
    found = accuracy(
        model,
        params,
        encoder,
        records,
        max_new_tokens=options.max_new_tokens or defaults.max_new_tokens,
        batch_size=options.batch_size or defaults.batch_size,
        max_examples=options.max_examples,
        on_batch=progress,
    )
    result = {
        "accuracy": found.accuracy,
        "correct": sum(p.correct for p in found.predictions),
        "examples": len(found.predictions),
        "skipped": found.skipped,
        "seconds": time.perf_counter() - start,
        "model": options.run or options.model,
        "adapter": options.adapter,
        "data": options.data,
    }
    if predictions is not None:
        lines = [json.dumps(dataclasses.asdict(p), ensure_ascii=False) for p in found.predictions]
        predictions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['correct']} of {result['examples']} answers match exactly: "
            f"{100 * found.accuracy:.2f} % ({result['skipped']} records skipped, "
            f"{result['seconds']:.0f} s)"
        )
    return 0


def _generate(options: argparse.Namespace) -> int:
    import vlm_jax

    model, params, config = _open(options)
    encoder = _encoder(model, config)
    content: list[dict[str, str]] = [{"type": "image"} for _ in options.image]
    content.append({"type": "text", "text": options.prompt})
    record = {"messages": [{"role": "user", "content": content}], "images": options.image}
    example = encoder.prompt(record)
    batch = encoder.collate([[example]], len(example["tokens"]), len(example["patches"]))
    new = vlm_jax.generate(
        model,
        params,
        batch,
        options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    text = encoder.tokenizer.decode(new[0], skip_special_tokens=True)
    print(text.strip())
    return 0


CONFIGURED = {
    "train": _train,
    "preview": _preview,
    "plan": _plan,
}  # they take --config.section.key=value
COMMANDS = {
    "recommend": _recommend,
    "export": _export,
    "evaluate": _evaluate,
    "generate": _generate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 130 after Ctrl-C.

    Of `plan`, 1 where the step does not fit. Ctrl-C and SIGTERM end the process at once, with 130,
    but for `train`, which saves first.
    """
    with on_signal(end_at_once):  # before anything that takes time, such as importing JAX
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    from vlm_jax.hardware import USABLE

    # transformers advises to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # JAX takes three quarters of a GPU unless it is told; `plan` counts on this much.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(USABLE))
    given, overrides = split_overrides(arguments)
    known = parser()
    options = known.parse_args(given)
    if overrides and options.command not in CONFIGURED:
        known.error(f"--config.{overrides[0]} belongs to the commands {', '.join(CONFIGURED)}")
    try:
        if options.command in CONFIGURED:
            return CONFIGURED[options.command](options, overrides)
        return COMMANDS[options.command](options)
    except (UserError, MemoryError, KeyboardInterrupt) as error:
        if options.debug:
            raise
        return _report(options, error)


def _report(options: argparse.Namespace, error: BaseException) -> int:
    """Say on stderr why a command ends, and return its exit code."""
    if options.debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print(STOPPED, file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, MemoryError):  # of a library in C++ it says std::bad_alloc
        error = UserError(f"This machine ran out of memory ({error}). Take one with more.")
    paragraph = re.sub(r"\s*\n\s*", " ", str(error).strip())  # other libraries' have lines
    print(f"vlm-jax {options.command}: {paragraph}", file=sys.stderr)
    return 2
