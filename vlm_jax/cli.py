"""The `vlm-jax` command. JAX is imported only once a command is known, so that --help is quick."""

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_jax.config.options import parser, spelled
from vlm_jax.distributed.interrupts import INTERRUPTED, STOPPED, end_at_once, on_signal
from vlm_jax.errors import UserError, nearest
from vlm_jax.files.output import wrapped, writable, write

if TYPE_CHECKING:
    from vlm_jax.config.specs import RunSpec
    from vlm_jax.data import Encoder
    from vlm_jax.model import Model


def _train(options: argparse.Namespace, config: "RunSpec") -> int:
    from vlm_jax.distributed.failures import together

    resume = "auto" if options.resume == "auto" else options.resume is not None
    with together(lambda error: _report(options, error)):
        from vlm_jax.train.loop import train

        return INTERRUPTED if train(config, resume, verbose=options.verbose)["interrupted"] else 0


def _preview(options: argparse.Namespace, config: "RunSpec") -> int:
    place = options.out or (None if options.text else "preview.html")
    file = writable(place, "--out", b"<title>Preview of ") if place else None
    from vlm_jax.preview import collect, page, terminal

    seen = collect.preview(config, options.examples, options.split)
    if options.text:
        terminal.show(seen)
    if file is not None:
        write(file, page.render(seen), f"{len(seen.examples)} examples")
    return 0


def _plan(options: argparse.Namespace, config: "RunSpec") -> int:
    # Nothing runs here: this machine's own chips are left to whoever uses them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from vlm_jax.hardware import DEVICES, hardware
    from vlm_jax.plan import report, show, topologies

    if DEVICES[hardware(options.topology).device].compiles:
        first = (
            "Compiling; a large model takes some minutes ..."
            if topologies.compilers()
            else f"There is no compiler for it here, so memory is estimated. {topologies.INSTALL}"
        )
        print(wrapped(first, sys.stderr), file=sys.stderr)
    sizes = {"tokens": options.tokens, "patches": options.patches}
    if options.fit:
        return _fit(options, config, sizes)
    found = report.plan_step(
        config, options.topology, rows=options.rows, parameters=options.shardings, **sizes
    )
    if options.json:
        print(json.dumps(found.to_json()))
    else:
        show.show(found)
    return 0 if found.fits else 1


def _fit(options: argparse.Namespace, config: "RunSpec", sizes: dict[str, Any]) -> int:
    from vlm_jax.plan import fit, show

    if options.rows is not None or options.shardings:
        raise UserError("--fit chooses the rows itself, and lists no shardings: leave both out.")
    best, tried = fit.fit(
        config,
        options.topology,
        **sizes,
        on_trial=lambda trial: print(show.trial_line(trial), file=sys.stderr),
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
        show.show(best.report)
        print(f"The fastest of {len(tried)} settings:\n{best.flags}")
    return 0 if best is not None else 1


def _recommend(options: argparse.Namespace) -> int:
    file = None if options.out is None else writable(options.out, "--out")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlm_jax.plan.recommend import check_out, recommend, write

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
        console.print("Nothing was written; --out FILE writes a config for vlm-jax train.")
        return 0
    write(found, file)
    console.print(
        f"Wrote '{file}'. Next, look at what the model will see, then train:\n"
        f"  vlm-jax preview --config {file}\n  vlm-jax train --config {file}\n"
        f"Memory is estimated. Where there is a compiler, it can be asked:\n"
        f"  vlm-jax plan --config {file} --topology {options.hardware or 'v5e-1'}"
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from vlm_jax.train.results import export

    written = export(options.run, options.out, options.merge, options.quantized)
    print(wrapped(str(written), sys.stdout))
    return 0


def _encoder(options: argparse.Namespace, **changes: Any) -> "tuple[RunSpec | None, Encoder]":
    """Return (config of the run or None, encoder): whatever is missing is reported before weights.

    changes: of the encoder's options.
    """
    if options.run is not None:
        if options.adapter or options.dtype:
            raise UserError("--adapter and --dtype belong to --model; a run has its own.")
        from vlm_jax.train.results import open_run

        config, encoder = open_run(options.run)
        return config, encoder.replace(**changes)
    from vlm_jax.data import Encoder
    from vlm_jax.hub.load import check_headers, resolve

    adapter = Path(options.adapter).expanduser() if options.adapter else None
    if adapter is not None and not adapter.is_dir():
        raise UserError(f"There is no adapter directory '{adapter}'.")
    directory = resolve(options.model, weights=False)
    if Path(options.model).expanduser().is_dir():  # else the weights are still to be fetched
        check_headers(directory)
    return None, Encoder(directory, adapter=adapter, **changes)


def _load(options: argparse.Namespace, encoder: "Encoder") -> "tuple[Model, Any]":
    """Return (model, params) of --run, or of --model with its --adapter."""
    import vlm_jax

    if options.run is not None:
        from vlm_jax.train.results import load_run

        return load_run(options.run, encoder=encoder)[:2]
    model, params = vlm_jax.load(options.model, options.dtype or "float32")
    if options.adapter:
        model, params = vlm_jax.load_peft(model, params, options.adapter)
    return model, params


def _evaluate(options: argparse.Namespace) -> int:
    import time

    from vlm_jax.config.checks import check_choice
    from vlm_jax.config.specs import EvaluationSpec
    from vlm_jax.data import read_records
    from vlm_jax.evals import EVALS

    check_choice("--eval", options.eval, EVALS)
    file = (
        writable(options.predictions, "--predictions", b'", "index": ')
        if options.predictions
        else None
    )
    changes = {"allow_absolute_paths": True} if options.allow_absolute_paths else {}
    config, encoder = _encoder(options, image_folder=options.image_folder, **changes)
    records = read_records(options.data, options.image_folder, options.split)
    defaults = EvaluationSpec() if config is None else config.evaluation
    if not options.json:
        print("Reading the model ...", file=sys.stderr)
    model, params = _load(options, encoder)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="" if done < total else "\n", file=sys.stderr)

    start = time.perf_counter()
    found = EVALS[options.eval](
        model,
        params,
        encoder,
        records,
        max_new_tokens=options.max_new_tokens or defaults.max_new_tokens,
        batch_size=options.batch_size or defaults.batch_size,
        max_examples=options.max_examples,
        on_batch=progress,
    )
    correct = sum(p.correct for p in found.predictions)
    is_accuracy = options.eval == "accuracy"
    result = {
        options.eval: found.mean,
        **({"correct": correct} if is_accuracy else {}),
        "examples": len(found.predictions),
        "skipped": found.skipped,
        "seconds": time.perf_counter() - start,
        "model": options.run or options.model,
        "adapter": options.adapter,
        "data": options.data,
    }
    if file is not None:
        lines = [json.dumps(p.to_json(), ensure_ascii=False) for p in found.predictions]
        write(file, "\n".join(lines) + "\n", f"{len(lines)} predictions")
    if options.json:
        print(json.dumps(result))
    else:
        answers = f"{result['examples']} answers"
        print(
            f"{correct} of {answers} match exactly:"
            if is_accuracy
            else f"{options.eval} of {answers}:",
            f"{100 * found.mean:.2f} % ({result['skipped']} records skipped, "
            f"{result['seconds']:.0f} s)",
        )
    return 0


def _generate(options: argparse.Namespace) -> int:
    import vlm_jax
    from vlm_jax.generation import end_tokens

    _, encoder = _encoder(options)
    content = [{"type": "image"}] * len(options.image) + [{"type": "text", "text": options.prompt}]
    example = encoder.prompt(
        {"messages": [{"role": "user", "content": content}], "images": options.image}
    )
    batch = encoder.collate([[example]], len(example["tokens"]), len(example["patches"]))
    model, params = _load(options, encoder)
    eos, pad = end_tokens(model, encoder.chat.turn_end)
    new = vlm_jax.generate(
        model,
        params,
        batch,
        options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    print(encoder.chat.answer(new[0], eos).strip())
    return 0


# Those of the first table read a config and take --config.section.key=value.
CONFIGURED = {"train": _train, "preview": _preview, "plan": _plan}
COMMANDS = {
    "recommend": _recommend,
    "export": _export,
    "evaluate": _evaluate,
    "generate": _generate,
}


def _unknown_option(options: argparse.Namespace, word: str) -> UserError:
    """Return the error for a word that is no option of a command without a config."""
    word = word.partition("=")[0]
    if word.startswith("--config"):
        return UserError(
            f"'{word}' belongs to the commands {', '.join(CONFIGURED)}, which read a config. "
            f"`vlm-jax {options.command} --help` lists this one's options."
        )
    guess = nearest(word, [f"--{name}" for name in _names(options)])
    return UserError(
        f"'{word}' is not an option of this command{guess}. `vlm-jax {options.command} --help` "
        f"lists its options."
    )


def _names(options: argparse.Namespace) -> list[str]:
    return [name.replace("_", "-") for name in vars(options) if name != "command"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 130 after Ctrl-C.

    Of `plan`, 1 where the step does not fit. Ctrl-C and SIGTERM end the process at once, with 130,
    but for `train`, which saves first.
    """
    with on_signal(end_at_once):  # before anything that takes time, such as importing JAX
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    from vlm_jax.hardware import USABLE

    # JAX takes three quarters of a GPU by default; `plan` counts on this much.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(USABLE))
    known = parser()
    options, others = known.parse_known_args(spelled(arguments))
    if options.command is None:
        if others:
            known.error(f"a command comes first, and no {others[0]}")
        known.print_help(sys.stderr)
        return 2
    try:
        if options.command in CONFIGURED:
            from vlm_jax import config as configs
            from vlm_jax.config.words import overrides

            # Bad keys are reported before JAX loads.
            config = configs.load(options.config, overrides(others, _names(options)))
            return CONFIGURED[options.command](options, config)
        if others:
            raise _unknown_option(options, others[0])
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
    print(wrapped(f"vlm-jax {options.command}: {paragraph}", sys.stderr), file=sys.stderr)
    return 2
