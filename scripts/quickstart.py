"""The quickstart: a tiny VLM before and after LoRA on easy-VQA, judged on all test questions.

Run it by `bash scripts/quickstart.sh [--method qlora]`. It leaves in outputs/quickstart: adapter/,
merged/ (a checkpoint for transformers), results.json, loss.png, predictions.html.
"""

import argparse
import base64
import html
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs is installed

import easy_vqa
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from vlm_jax import config as configs
from vlm_jax.data import Encoder, read_records
from vlm_jax.errors import UserError
from vlm_jax.evals.accuracy import accuracy
from vlm_jax.evals.answers import Prediction, Scores
from vlm_jax.files.atomic import write_json
from vlm_jax.train.loop import train
from vlm_jax.train.results import export, load_run
from vlm_jax.train.setup import load_base, make_encoder

ROOT = Path(__file__).resolve().parents[1]
CONSOLE = Console()
# A row holds up to four questions of one image, which is then seen once for them all.
GROUP = 4
CLOSED = ("yes", "no")
# What --method adds to configs/quickstart.py, and what its rows are called.
METHODS = {
    "lora": ("LoRA", []),
    "qlora": ("QLoRA", ["model.quantize=nf4-dq"]),
}
# On the official test questions: https://github.com/vzhou842/easy-VQA for the last one.
REFERENCES = [
    ("the most frequent answer", 37.3),
    ("the question alone, best possible", 67.0),
    ("CNN + LSTM, published", 87.6),
]


def write_data(folder: Path) -> tuple[Path, Path]:
    """Write easy-VQA's official splits as chat records and return (train file, test file)."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    files = []
    for split, ((questions, answers, images), paths) in splits.items():
        asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, image in zip(questions, answers, images, strict=True):
            asked[image].append((question, answer))
        rng = random.Random(0)
        records = []
        # A test question stands alone: no answer may be read off an earlier turn.
        group = GROUP if split == "train" else 1
        for image, pairs in asked.items():
            rng.shuffle(pairs)
            for first in range(0, len(pairs), group):
                record = {"id": f"{image}-{first}", "image": paths[image]}
                records.append({**record, "messages": conversation(pairs[first : first + group])})
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        files.append(file)
    return files[0], files[1]


def conversation(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for question, answer in pairs:
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return turns


def evaluate(model, params, encoder: Encoder, records, e) -> Scores:
    """Return accuracy by generation on all records, with a line of progress."""
    with CONSOLE.status("Answering the test questions ...") as status:
        return accuracy(
            model,
            params,
            encoder,
            records,
            max_new_tokens=e.max_new_tokens,
            batch_size=e.batch_size,
            on_batch=lambda done, total: status.update(f"Answered {done} of {total} questions"),
        )


def share(predictions: Sequence[Prediction], closed: bool | None = None) -> float:
    """Return the share of right answers; `closed`: only among yes/no questions, or the others."""
    kept = [p for p in predictions if closed is None or (p.answer in CLOSED) == closed]
    return sum(p.correct for p in kept) / len(kept)


def draw_loss(metrics: Path, file: Path, method: str) -> None:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axis.plot([line["step"] for line in lines], [line["loss"] for line in lines], color="#2a6f97")
    axis.set(xlabel="step", ylabel="loss on answer tokens", yscale="log")
    axis.set_title(f"easy-VQA, {method} on a tiny Qwen2-VL")
    axis.grid(alpha=0.25, which="both")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def write_page(file: Path, before: Scores, after: Scores, records, count: int = 48) -> None:
    """Write sample predictions with their images: every mistake first, then a random rest."""
    wrong = [i for i, p in enumerate(after.predictions) if not p.correct]
    order = list(range(len(after.predictions)))
    random.Random(0).shuffle(order)
    right = [i for i in order if after.predictions[i].correct]
    chosen = wrong[: count // 4] + right[: count - len(wrong[: count // 4])]
    cards = []
    for i in chosen:
        old, new = before.predictions[i], after.predictions[i]
        image = Path(records[new.index]["images"][0]).read_bytes()
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        mark = "right" if new.correct else "wrong"
        question, answer, earlier = (
            html.escape(text) for text in (new.question, new.prediction, old.prediction)
        )
        truth = "" if new.correct else f" <i>(expected: {html.escape(new.answer)})</i>"
        cards.append(
            f'<figure class="{mark}"><img src="{source}" alt="a coloured shape"><figcaption>'
            f"<b>{question}</b><span>{answer}{truth}</span><s>{earlier}</s></figcaption></figure>"
        )
    style = (
        "body{padding:0 16px}"
        "body{font:15px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:1100px;color:#222}"
        "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:14px}"
        "figure{display:flex;gap:12px;margin:0;padding:10px;border:1px solid #ddd;"
        "border-left:5px solid #2a9d62;border-radius:6px}figure.wrong{border-left-color:#c8402f}"
        "img{width:84px;height:84px;image-rendering:pixelated;border:1px solid #eee}"
        "figcaption{display:flex;flex-direction:column;gap:3px}figcaption b{font-weight:600}"
        "s{color:#888;text-decoration:none;font-size:13px}s::before{content:'before: '}"
    )
    lead = (
        f"{100 * after.mean:.2f} % of {len(after.predictions)} official test questions right "
        f"after training, {100 * before.mean:.2f} % before. Mistakes come first."
    )
    file.write_text(
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>easy-VQA predictions</title>"
        f"<style>{style}</style><h1>easy-VQA predictions</h1><p>{lead}</p>"
        f"<main>{''.join(cards)}</main></html>\n"
    )


def print_table(before: Scores, after: Scores, method: str) -> None:
    table = Table(title=f"easy-VQA, all {len(after.predictions)} official test questions, %")
    for column in ("", "all", "yes/no", "open answers"):
        table.add_column(column, justify="left" if not column else "right")
    for name, score in REFERENCES:
        table.add_row(name, f"{score:.1f}", "", "")
    for name, result in (("this model before", before), (f"this model after {method}", after)):
        scores = (share(result.predictions, closed) for closed in (None, True, False))
        style = "bold" if result is after else ""
        table.add_row(name, *(f"{100 * score:.2f}" for score in scores), style=style)
    CONSOLE.print(table)


def main(arguments: Sequence[str]) -> None:
    started = int(os.environ.get("QUICKSTART_STARTED", time.time()))
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="lora")
    given, overrides = parser.parse_known_args(arguments)
    unknown = [text for text in overrides if not text.startswith("--config.")]
    if unknown:
        raise UserError(f"Unknown argument {unknown[0]!r}; expected --config.section.key=value.")
    method, settings = METHODS[given.method]
    settings = settings + [text.removeprefix("--config.") for text in overrides]
    config = configs.load("configs/quickstart.py", settings)
    out = Path(config.training.output_dir)
    if (out / "results.json").exists():
        raise UserError(
            f"'{out}' holds a finished quickstart; see {out}/results.json. Delete the folder, or "
            f"pass --config.training.output_dir=DIR, to run it again."
        )
    train_file, test_file = write_data(out / "data")
    config = configs.load("configs/quickstart.py", [f"data.train_file={train_file}", *settings])

    CONSOLE.rule("1  The base model, before training")
    records = read_records(str(test_file))
    base, params = load_base(config)
    encoder = make_encoder(config, base)
    before = evaluate(base, params, encoder, records, config.evaluation)
    CONSOLE.print(f"{100 * before.mean:.2f} % of {len(before.predictions)} test questions")
    del params

    CONSOLE.rule(f"2  {method} in the language model, projector in full, vision tower frozen")
    outcome = train(config, resume=(out / "checkpoints").exists(), console=CONSOLE)
    if outcome["interrupted"]:
        raise KeyboardInterrupt

    CONSOLE.rule("3  The trained model")
    model, params, _ = load_run(out)
    after = evaluate(model, params, encoder, records, config.evaluation)
    CONSOLE.print(str(export(out, out / "merged", merge=True)), highlight=False)
    draw_loss(out / "metrics.jsonl", out / "loss.png", method)
    write_page(out / "predictions.html", before, after, records)
    results = {
        "method": given.method,
        "accuracy_before": before.mean,
        "accuracy_after": after.mean,
        "accuracy_open_after": share(after.predictions, closed=False),
        "accuracy_yes_no_after": share(after.predictions, closed=True),
        "accuracy_open_before": share(before.predictions, closed=False),
        "questions": len(after.predictions),
        "train_seconds": outcome["seconds"],
        "seconds": time.time() - started,
    }
    write_json(out / "results.json", results)
    print_table(before, after, method)
    image = easy_vqa.get_test_image_paths()[0]
    CONSOLE.print(
        f"{results['seconds'] / 60:.1f} minutes in all, installation included. See "
        f"{out}/predictions.html, {out}/loss.png, {out}/results.json.\n\nNext:\n"
        f"  # ask the model about an image\n"
        f"  .venv/bin/vlm-jax generate --run {out} --image {image} \\\n"
        f'      --prompt "what color is the shape?"\n'
        f"  # your own data: a .jsonl of chat messages with images (README, 'Your own data')\n"
        f"  .venv/bin/vlm-jax train --config configs/quickstart.py \\\n"
        f"      --config.data.train_file=my.jsonl --config.training.output_dir=outputs/mine\n"
        f"  # a bigger model, on an accelerator\n"
        f"  .venv/bin/vlm-jax train --config configs/qwen2_vl_2b_lora.py \\\n"
        f"      --config.data.train_file=my.jsonl",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
