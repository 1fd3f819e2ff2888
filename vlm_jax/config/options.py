"""The command line: commands, their options, and keys of a config."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vlm_jax import __version__

ANY_KEY = (
    "Any key of the config can be set: --config.{section}.{key}, or by its name alone where one "
    "section has it: --{key}. Every key is listed with its default and meaning in "
    "vlm_jax/config/specs.py."
)


class Command(NamedTuple):
    """A command. options: {name: arguments of `add_argument`}; of `either`, one is required."""

    help: str
    options: dict[str, dict[str, Any]]
    either: dict[str, dict[str, Any]] | None = None
    epilog: str | None = None


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


POSITIVE = {"type": _number(int, 1), "metavar": "N"}
CONFIG = {
    "--config": {
        "required": True,
        "metavar": "FILE",
        "help": ".yaml or .py config; a .py file is executed: use YAML for configs of others",
    }
}
RUN = {"metavar": "DIR", "help": "output_dir of a run"}
MODEL = {"metavar": "DIR", "help": "checkpoint directory or hub id"}
MODEL_PARTS: dict[str, dict[str, Any]] = {
    "--adapter": {"metavar": "DIR", "help": "PEFT adapter on --model"},
    "--dtype": {"choices": ("float32", "bfloat16"), "help": "dtype of --model"},
}
DATA_ACCESS = {
    "--split": {"help": "split of a data set with several"},
    "--image-folder": {"metavar": "DIR", "help": "root of relative image paths"},
    "--allow-absolute-paths": {
        "action": "store_true",
        "help": "allow images outside --image-folder",
    },
}
JSON = {"action": "store_true", "help": "print one JSON object"}

COMMANDS = {
    "train": Command(
        "Train a model by a config.",
        {
            **CONFIG,
            "--resume": {
                "nargs": "?",
                "const": "newest",
                "choices": ("newest", "auto"),
                "help": "resume from the newest checkpoint; --resume=auto: if there is one, else "
                "start",
            },
            "--verbose": {
                "action": "store_true",
                "help": "print details of data, mesh and weights",
            },
        },
        epilog=ANY_KEY.format(section="training", key="learning_rate=1e-4"),
    ),
    "preview": Command(
        "Show a config's first training examples as the model receives them; needs no weights.",
        {
            **CONFIG,
            "--examples": {**POSITIVE, "default": 16, "help": "default: 16"},
            "--split": {"choices": ("train", "eval"), "default": "train", "help": "default: train"},
            "--out": {"metavar": "FILE", "help": "HTML page to write; default: preview.html"},
            "--text": {
                "action": "store_true",
                "help": "print to the terminal; an HTML page only with --out",
            },
        },
        epilog=ANY_KEY.format(section="data", key="max_seq_length=1024"),
    ),
    "recommend": Command(
        "Recommend a method for your data and hardware, and write a config.",
        {
            "--data": {
                "required": True,
                "metavar": "FILE",
                "help": "data, in any form of data.train_file",
            },
            "--model": {**MODEL, "required": True},
            "--hardware": {"metavar": "NAME", "help": "for example rtx4090, h100:8, v5e-4"},
            "--out": {"metavar": "FILE", "help": "config to write, .yaml or .py"},
            **DATA_ACCESS,
        },
    ),
    "plan": Command(
        "Compile a config's training step for hardware you do not have: does it fit, how fast?",
        {
            **CONFIG,
            "--topology": {
                "required": True,
                "metavar": "NAME",
                "help": "for example v5e-1, v5p:2x2x1, h100:8, rtx4090",
            },
            "--rows": {**POSITIVE, "help": "rows per step, all devices together"},
            "--tokens": {**POSITIVE, "help": "tokens per row"},
            "--patches": {"type": _number(int, 0), "metavar": "N", "help": "image patches per row"},
            "--shardings": {
                "action": "store_true",
                "help": "list the sharding of every parameter",
            },
            "--fit": {
                "action": "store_true",
                "help": "find the fastest batch size and remat policy that fit",
            },
            "--json": JSON,
        },
        epilog="Exit codes: 0 it fits, 1 it does not, 2 bad input. "
        + ANY_KEY.format(section="training", key="per_device_train_batch_size=2"),
    ),
    "export": Command(
        "Write a run's adapter or merged checkpoint, and compare it with the run.",
        {
            "--run": {**RUN, "required": True},
            "--merge": {
                "action": "store_true",
                "help": "write a checkpoint with LoRA merged into its weights",
            },
            "--quantized": {
                "action": "store_true",
                "help": "with --merge: write 4-bit kernels in 4 bits",
            },
            "--out": {
                "metavar": "DIR",
                "help": "default: RUN/merged with --merge, else RUN/exported",
            },
        },
    ),
    "evaluate": Command(
        "Generate answers and score them.",
        {
            **MODEL_PARTS,
            "--data": {
                "required": True,
                "metavar": "FILE",
                "help": "records with reference answers",
            },
            "--eval": {
                "default": "accuracy",
                "metavar": "NAME",
                "help": "accuracy (default: exact match), anls",
            },
            **DATA_ACCESS,
            "--max-new-tokens": {**POSITIVE, "help": "most tokens of an answer"},
            "--batch-size": {**POSITIVE, "help": "examples per batch"},
            "--max-examples": {
                "type": _number(int, 0),
                "default": 0,
                "metavar": "N",
                "help": "number of records; 0 (default): all",
            },
            "--predictions": {"metavar": "FILE", "help": "JSON Lines file of the answers"},
            "--json": JSON,
        },
        either={"--run": RUN, "--model": MODEL},
    ),
    "generate": Command(
        "Answer a question about images.",
        {
            **MODEL_PARTS,
            "--image": {
                "action": "append",
                "default": [],
                "metavar": "FILE",
                "help": "image file; repeatable",
            },
            "--prompt": {"required": True, "metavar": "TEXT", "help": "question"},
            "--max-new-tokens": {**POSITIVE, "default": 128, "help": "default: 128"},
            "--temperature": {
                "type": _number(float, 0),
                "default": 0.0,
                "metavar": "X",
                "help": "0 (default): greedy",
            },
            "--top-p": {
                "type": _number(float, 0, 1),
                "default": 1.0,
                "metavar": "X",
                "help": "1 (default): all",
            },
            "--top-k": {
                "type": _number(int, 0),
                "default": 0,
                "metavar": "N",
                "help": "0 (default): all",
            },
            "--seed": {
                "type": _number(int, 0, 2**31 - 1),
                "default": 0,
                "metavar": "N",
                "help": "default: 0",
            },
        },
        either={"--run": RUN, "--model": MODEL},
    ),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="vlm-jax", description="Fine-tune vision-language models with JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (text, options, either, epilog) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text, epilog=epilog, allow_abbrev=False
        )
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        if either:
            group = command.add_mutually_exclusive_group(required=True)
            for option, settings in either.items():
                group.add_argument(option, **settings)
        for option, settings in options.items():
            command.add_argument(option, **settings)
    return parser


def spelled(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with hyphens in the names of options, where others write underscores."""
    return [
        "=".join([name.replace("_", "-"), *value]) if argument.startswith("--") else argument
        for argument in arguments
        for name, *value in [argument.split("=", 1)]
    ]
