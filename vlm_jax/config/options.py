"""The command line: commands, their options, and keys of a config."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from vlm_jax import __version__

ANY_KEY = (
    "Any key of the config can be set: --config.training.{example}, or by its name alone where one "
    "section has it: --{example}. Every key is listed with its default and meaning in "
    "vlm_jax/config/specs.py."
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = argparse.ArgumentParser(
        prog="vlm-jax", description="Fine-tune vision-language models with JAX.", allow_abbrev=False
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, **options
        )
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        return command

    train = add(
        "train",
        "Train a model by a config.",
        epilog=ANY_KEY.format(example="learning_rate=1e-4"),
    )
    _add_config(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        choices=("newest", "auto"),
        help="resume from the newest checkpoint; --resume=auto: if there is one, else start",
    )
    train.add_argument(
        "--verbose", action="store_true", help="print details of data, mesh and weights"
    )

    preview = add(
        "preview",
        "Show a config's first training examples as the model receives them; needs no weights.",
        epilog=ANY_KEY.format(example="max_seq_length=1024").replace("training.", "data."),
    )
    _add_config(preview)
    preview.add_argument(
        "--examples", type=_number(int, 1), default=16, metavar="N", help="default: 16"
    )
    preview.add_argument(
        "--split", choices=("train", "eval"), default="train", help="default: train"
    )
    preview.add_argument("--out", metavar="FILE", help="HTML page to write; default: preview.html")
    preview.add_argument(
        "--text", action="store_true", help="print to the terminal; an HTML page only with --out"
    )

    recommend = add(
        "recommend", "Recommend a method for your data and hardware, and write a config."
    )
    recommend.add_argument(
        "--data", required=True, metavar="FILE", help="data, in any form of data.train_file"
    )
    recommend.add_argument(
        "--model", required=True, metavar="DIR", help="checkpoint directory or hub id"
    )
    recommend.add_argument("--hardware", metavar="NAME", help="for example rtx4090, h100:8, v5e-4")
    recommend.add_argument("--out", metavar="FILE", help="config to write, .yaml or .py")
    recommend.add_argument("--split", help="split of a data set with several")
    recommend.add_argument("--image-folder", metavar="DIR", help="root of relative image paths")
    recommend.add_argument(
        "--allow-absolute-paths", action="store_true", help="allow images outside --image-folder"
    )

    plan = add(
        "plan",
        "Compile a config's training step for hardware you do not have: does it fit, how fast?",
        epilog="Exit codes: 0 it fits, 1 it does not, 2 bad input. "
        + ANY_KEY.format(example="per_device_train_batch_size=2"),
    )
    _add_config(plan)
    plan.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="for example v5e-1, v5p:2x2x1, h100:8, rtx4090",
    )
    plan.add_argument(
        "--rows", type=_number(int, 1), metavar="N", help="rows per step, all devices together"
    )
    plan.add_argument("--tokens", type=_number(int, 1), metavar="N", help="tokens per row")
    plan.add_argument("--patches", type=_number(int, 0), metavar="N", help="image patches per row")
    plan.add_argument(
        "--shardings", action="store_true", help="list the sharding of every parameter"
    )
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
    export.add_argument(
        "--merge", action="store_true", help="write a checkpoint with LoRA merged into its weights"
    )
    export.add_argument(
        "--quantized", action="store_true", help="with --merge: write 4-bit kernels in 4 bits"
    )
    export.add_argument(
        "--out", metavar="DIR", help="default: RUN/merged with --merge, else RUN/exported"
    )

    evaluate = add("evaluate", "Generate answers and score them.")
    _add_model(evaluate)
    evaluate.add_argument(
        "--data", required=True, metavar="FILE", help="records with reference answers"
    )
    evaluate.add_argument(
        "--eval", default="accuracy", metavar="NAME", help="accuracy (default: exact match), anls"
    )
    evaluate.add_argument("--split", help="split of a data set with several")
    evaluate.add_argument("--image-folder", metavar="DIR", help="root of relative image paths")
    evaluate.add_argument(
        "--allow-absolute-paths", action="store_true", help="allow images outside --image-folder"
    )
    evaluate.add_argument(
        "--max-new-tokens", type=_number(int, 1), metavar="N", help="most tokens of an answer"
    )
    evaluate.add_argument(
        "--batch-size", type=_number(int, 1), metavar="N", help="examples per batch"
    )
    evaluate.add_argument(
        "--max-examples",
        type=_number(int, 0),
        default=0,
        metavar="N",
        help="number of records; 0 (default): all",
    )
    evaluate.add_argument("--predictions", metavar="FILE", help="JSON Lines file of the answers")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    generate = add("generate", "Answer a question about images.")
    _add_model(generate)
    generate.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image file; repeatable"
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="question")
    generate.add_argument(
        "--max-new-tokens", type=_number(int, 1), default=128, metavar="N", help="default: 128"
    )
    generate.add_argument(
        "--temperature",
        type=_number(float, 0),
        default=0.0,
        metavar="X",
        help="0 (default): greedy",
    )
    generate.add_argument(
        "--top-p", type=_number(float, 0, 1), default=1.0, metavar="X", help="1 (default): all"
    )
    generate.add_argument(
        "--top-k", type=_number(int, 0), default=0, metavar="N", help="0 (default): all"
    )
    generate.add_argument(
        "--seed", type=_number(int, 0, 2**31 - 1), default=0, metavar="N", help="default: 0"
    )
    return whole


def _number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Return the parser of an option's number between two bounds."""
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


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help=".yaml or .py config; a .py file is executed: use YAML for configs of others",
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="DIR", help="output_dir of a run")
    which.add_argument("--model", metavar="DIR", help="checkpoint directory or hub id")
    command.add_argument("--adapter", metavar="DIR", help="PEFT adapter on --model")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of --model")


def spelled(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with hyphens in the names of options, where others write underscores."""
    return [
        "=".join([name.replace("_", "-"), *value]) if argument.startswith("--") else argument
        for argument in arguments
        for name, *value in [argument.split("=", 1)]
    ]
