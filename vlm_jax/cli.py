"""The `vlm-jax` command. JAX is imported only once a command is known, so that --help is quick."""

import argparse
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm-jax", description="Fine-tune vision-language models with JAX.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, **options
        )
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        return command

    train = add(
        "train",
        "Train as a config says.",
        epilog="Any key can be set: --config.training.learning_rate=1e-4. Every key is listed with "
        "its default and meaning in vlm_jax/config.py.",
    )
    train.add_argument("--config", required=True, metavar="FILE", help=".py or .yaml config")
    train.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        choices=("newest", "auto"),
        help="go on from the newest checkpoint; --resume=auto: where there is one, else begin",
    )

    preview = add("preview", "Show what the model sees of a config's data, without its weights.")
    preview.add_argument("--config", required=True, metavar="FILE", help=".py or .yaml config")
    preview.add_argument("--examples", type=_number(int, 1), default=16, metavar="N")
    preview.add_argument("--split", choices=("train", "eval"), default="train")
    preview.add_argument("--out", metavar="FILE", help="the page; default: preview.html")
    preview.add_argument(
        "--text", action="store_true", help="print to the terminal instead; a page only with --out"
    )

    recommend = add("recommend", "Choose a method for your data and hardware, and write a config.")
    recommend.add_argument("--data", required=True, metavar="FILE", help="as data.train_file")
    recommend.add_argument("--model", required=True, metavar="DIR", help="directory or hub id")
    recommend.add_argument("--hardware", metavar="NAME", help="as rtx4090, h100:8, v5e-4")
    recommend.add_argument("--out", metavar="FILE", help="the config to write, .yaml or .py")
    recommend.add_argument("--split", help="of a data set that has several")
    recommend.add_argument("--image-folder", metavar="DIR", help="where relative paths start")
    recommend.add_argument(
        "--allow-absolute-paths", action="store_true", help="read images outside that folder"
    )

    plan = add(
        "plan",
        "Compile a config's training step for hardware you do not have: does it fit, how fast?",
        epilog="Exit codes: 0 it fits, 1 it does not, 2 bad input. Any key of the config can be "
        "set: --config.training.per_device_train_batch_size=2.",
    )
    plan.add_argument("--config", required=True, metavar="FILE", help=".py or .yaml config")
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="as v5e-1, v5p:2x2x1, h100:8, rtx4090"
    )
    plan.add_argument("--rows", type=_number(int, 1), metavar="N", help="of a whole step")
    plan.add_argument("--tokens", type=_number(int, 1), metavar="N", help="of a row")
    plan.add_argument("--patches", type=_number(int, 0), metavar="N", help="of a row's images")
    plan.add_argument("--shardings", action="store_true", help="list every parameter's place")
    plan.add_argument(
        "--fit",
        action="store_true",
        help="find the fastest batch size and remat policy that fit",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")

    export = add(
        "export", "Write a run's adapter or merged checkpoint, and compare it with the run."
    )
    export.add_argument("--run", required=True, metavar="DIR", help="output_dir of a run")
    export.add_argument("--merge", action="store_true", help="a whole checkpoint, LoRA merged in")
    export.add_argument(
        "--quantized", action="store_true", help="with --merge: keep 4-bit kernels in 4 bits"
    )
    export.add_argument("--out", required=True, metavar="DIR")

    evaluate = add("evaluate", "Count exact matches of generated answers.")
    _add_model(evaluate)
    evaluate.add_argument("--data", required=True, metavar="FILE", help="records with answers")
    evaluate.add_argument("--split", help="of a data set that has several")
    evaluate.add_argument("--image-folder", metavar="DIR", help="where relative paths start")
    evaluate.add_argument(
        "--allow-absolute-paths", action="store_true", help="read images outside that folder"
    )
    evaluate.add_argument("--max-new-tokens", type=_number(int, 1), metavar="N")
    evaluate.add_argument("--batch-size", type=_number(int, 1), metavar="N")
    evaluate.add_argument(
        "--max-examples", type=_number(int, 0), default=0, metavar="N", help="0: all"
    )
    evaluate.add_argument("--predictions", metavar="FILE", help="write each answer as JSON lines")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    generate = add("generate", "Answer a question about images.")
    _add_model(generate)
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=_number(int, 1), default=128, metavar="N")
    generate.add_argument(
        "--temperature", type=_number(float, 0), default=0.0, help="0 (default): greedy"
    )
    generate.add_argument("--top-p", type=_number(float, 0, 1), default=1.0)
    generate.add_argument("--top-k", type=_number(int, 0), default=0)
    generate.add_argument("--seed", type=_number(int, 0, 2**31 - 1), default=0)
    return parser


def _number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Return what reads an option that is a number between two bounds."""
    limits = f"of {least} or more" if most == math.inf else f"between {least} and {most}"
    named = {int: "a whole number", float: "a number"}[kind]

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {named} {limits}")
        return value

    return read


def _add_model(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="DIR", help="output_dir of a run")
    which.add_argument("--model", metavar="DIR", help="checkpoint directory or hub id")
    command.add_argument("--adapter", metavar="DIR", help="PEFT adapter for --model")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="of --model")


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (other arguments, the `--config.section.key=value` ones as "section.key=value")."""
    others: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        key = argument.removeprefix("--config.")
        overrides.append(key if "=" in key else f"{key}={next(rest, '')}")
    return others, overrides


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from vlm_jax import config as configs

    config = configs.load(options.config, overrides)  # bad keys are told before JAX is there
    from vlm_jax.together import together

    resume = "auto" if options.resume == "auto" else options.resume is not None
    with together(lambda error: _report(options, error)):
        from vlm_jax.train.loop import train

        return 130 if train(config, resume)["interrupted"] else 0


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
    from vlm_jax.plan.report import plan_step
    from vlm_jax.plan.show import show

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
        from vlm_jax.train.run import load_run

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
    from vlm_jax.data.tokenizer import load_tokenizer

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
    text = load_tokenizer(encoder.directory).decode(new[0], skip_special_tokens=True)
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

    Of `plan`, 1 where the step does not fit.
    """
    # transformers advises to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    given, overrides = _split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    if overrides and options.command not in CONFIGURED:
        parser.error(f"--config.{overrides[0]} belongs to the commands {', '.join(CONFIGURED)}")
    try:
        if options.command in CONFIGURED:
            return CONFIGURED[options.command](options, overrides)
        return COMMANDS[options.command](options)
    except (UserError, KeyboardInterrupt) as error:
        if options.debug:
            raise
        return _report(options, error)


def _report(options: argparse.Namespace, error: BaseException) -> int:
    """Say on stderr why a command ends, and return its exit code."""
    if options.debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print("Stopped; nothing more was saved.", file=sys.stderr)
        return 130
    paragraph = re.sub(r"\s*\n\s*", " ", str(error).strip())  # other libraries' have lines
    print(f"vlm-jax {options.command}: {paragraph}", file=sys.stderr)
    return 2
