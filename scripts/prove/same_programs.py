"""Compare the compiled CPU steps of models that were there before with those of an older commit.

    python scripts/prove/same_programs.py --write DIR [--code CHECKOUT]
    python scripts/prove/same_programs.py --against DIR [--code CHECKOUT]

--write keeps the programs' texts in DIR; --against compares with them, and exits with 1 where one
differs. --code: another checkout, whose vlm_jax is compiled; default: this one. Texts are compared
without metadata, the numbers in names, and the tables of files and lines. Weights are shapes alone.
"""

import argparse
import os
import re
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
MODELS = {"qwen2_vl": "Qwen/Qwen2-VL-2B-Instruct", "llava": "llava-hf/llava-1.5-7b-hf"}
METHODS = {
    "full": {"lora.enabled": False},
    "lora": {"lora.dropout": 0.05},
    "dora": {"lora.use_dora": True},
    "qlora": {"model.quantize": "nf4-dq"},
    "pfeiffer": {"method": "pfeiffer"},
}
# Beside instructions: lines of tables of source files, which only describe the code.
TABLES = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames|\d+ )")


def bare(text: str) -> str:
    """Return a program's text without what does not change what it computes."""
    lines = [line for line in text.splitlines() if line and not TABLES.match(line)]
    text = re.sub(r", (metadata|origin)=\{[^{}]*\}", "", "\n".join(lines))
    return re.sub(r"(?<=[\w\-])\.\d+(?:\.\d+)*(?![\d.e])", "", text) + "\n"


def program(name: str, method: str) -> str:
    import jax

    from vlm_jax import config
    from vlm_jax.plan.step import prepare
    from vlm_jax.train.compile import compile_step

    changes = {"model.name_or_path": MODELS[name], **METHODS[method]}
    patches = {"qwen2_vl": 256, "llava": 577}[name]
    given = config.load(None, changes)
    step = prepare(given, jax.devices(), rows=2, tokens=640, patches=patches)
    return bare(compile_step(step.run, step.state, step.frozen, step.batch)[0].as_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--write", type=Path, metavar="DIR")
    where.add_argument("--against", type=Path, metavar="DIR")
    parser.add_argument("--code", type=Path, default=Path(__file__).resolve().parents[2])
    options = parser.parse_args()
    sys.path.insert(0, str(options.code))
    differ = []
    for name in MODELS:
        for method in METHODS:
            text, file = program(name, method), f"{name}_{method}.txt"
            if options.write:
                options.write.mkdir(parents=True, exist_ok=True)
                (options.write / file).write_text(text)
                said = f"{len(text.splitlines()):,} lines written"
            else:
                same = (options.against / file).read_text() == text
                differ += [] if same else [file]
                said = "equal" if same else "DIFFERS"
            print(f"{name:10}{method:10}{said}", flush=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
