"""Train the quickstart's model by each method, and write the table of README.md.

    python scripts/method_table.py [--steps 300] [--questions 2000] [--only METHOD ...]

Needs `pip install "vlm_jax[quickstart]"`. Every method has the same rows in the same order, and
the learning rate that is named here; none was tuned further. A run lies in outputs/methods/METHOD;
what is done is not done again. Shares are counted as PEFT counts them. Bytes are those of the
arrays and of the compiled step, whose peak is arguments, results and temporaries together; seconds
are of training alone.
"""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
from quickstart import CONSOLE, ROOT, evaluate, write_data

from vlm_jax import config as configs
from vlm_jax import plan
from vlm_jax.config.choices import METHODS
from vlm_jax.data import read_records
from vlm_jax.plan.leaves import parts
from vlm_jax.plan.step import prepare
from vlm_jax.train.compile import compile_step
from vlm_jax.train.loop import train
from vlm_jax.train.results import load_run
from vlm_jax.train.setup import make_encoder
from vlm_jax.train.trainable import count_parameters
from vlm_jax.trees import flatten

NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA (nf4-dq)",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "loraplus": "LoRA+ (B at 16 x the rate)",
    "pissa": "LoRA, PiSSA start",
    "loftq": "LoftQ (nf4)",
    "houlsby": "Houlsby adapters",
    "pfeiffer": "Pfeiffer adapters",
    "parallel": "parallel adapters",
}
# Full training moves every weight, LoRA+ its B matrices 16 times as far: both take a lower rate.
RATES = {"full": 5e-4, "loraplus": 3e-4}
README = ROOT / "README.md"
START, END = "<!-- made by scripts/method_table.py -->", "<!-- end of it -->"


def measure(method: str, steps: int, questions: int, data: tuple[Path, Path]) -> dict[str, Any]:
    """Train by one method and return a row of the table."""
    out = Path("outputs/methods") / method
    file = out / "row.json"
    asked = {"steps": steps, "questions": questions}
    if file.exists() and (row := json.loads(file.read_text())).items() >= asked.items():
        return row
    overrides = {
        "method": method,
        "data.train_file": str(data[0]),
        "training.output_dir": str(out),
        "training.max_steps": steps,
        "training.report_to": "none",
    }
    if method in RATES:
        overrides["training.learning_rate"] = RATES[method]
    config = configs.load("configs/quickstart.py", overrides)
    step = prepare(config, jax.devices()[:1])
    trained = sum(leaf.size for leaf in flatten(step.state.trainable).values())
    compiled, _ = compile_step(step.run, step.state, step.frozen, step.batch)
    CONSOLE.rule(NAMES[method])
    outcome = train(config, resume="auto", console=CONSOLE)
    model, params, _ = load_run(out)
    records = read_records(str(data[1]))[:questions]
    answered = evaluate(model, params, make_encoder(config, model), records, config.evaluation)
    row = {
        **asked,
        "share": trained / count_parameters(model, params)[1],
        "moments": parts(step).moments,
        "peak": plan.memory(compiled).total,
        "seconds": outcome["seconds"],
        "accuracy": answered.mean,
    }
    file.write_text(json.dumps(row, indent=1) + "\n")
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| method | trained | moments | peak of a step | training | right answers |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        lines.append(
            f"| {NAMES[method]} | {row['share']:.2%} | {row['moments'] / 1e6:.1f} MB | "
            f"{row['peak'] / 1e6:.0f} MB | {row['seconds']:.0f} s | {row['accuracy']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--only", action="append", choices=METHODS, default=[])
    options = parser.parse_args()
    os.chdir(ROOT)
    data = write_data(Path("outputs/methods/data"))
    asked = options.only or list(METHODS)
    rows = {one: measure(one, options.steps, options.questions, data) for one in asked}
    made = table(rows)
    print(made)
    if not options.only:
        text = README.read_text(encoding="utf-8")
        text = re.sub(f"{START}.*?{END}", f"{START}\n{made}\n{END}", text, flags=re.DOTALL)
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
