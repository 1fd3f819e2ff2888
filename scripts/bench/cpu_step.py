"""A LoRA step on the CPU against PyTorch, transformers and PEFT, of one checkpoint, in turn.

    python scripts/bench/cpu_step.py [--pairs 5] [--quantize nf4] [--json] [--profile]

Needs the test extra. A Qwen2-VL of 119 M random parameters (its whole vocabulary of 151,936, tied;
width 512, 12 layers, a tower of 4 blocks) trains in float32 on 2 rows of 512 tokens with an image
of 256 patches each, a quarter of them supervised: LoRA of rank 16 on seven projections, AdamW.
Each side is a process of its own on the same two processors with two threads. They take turns, so
that each pair runs under the same load: the ratios count, of which the medians are printed, not the
seconds. The first pair is left out. --profile prints where our step's time goes instead.
"""

import argparse
import collections
import dataclasses
import glob
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2
ROWS, TOKENS, SIDE, SUPERVISED = 2, 512, 16, 128  # an image of SIDE x SIDE patches
IMAGE, START, END = 151655, 151652, 151653
RANK, ALPHA, RATE = 16, 32, 1e-4
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What an operation's name says of the part of the step that it belongs to, the first that does.
PARTS = (
    ("tower", r"/visual/"),
    ("head and loss", r"logits|embed_tokens|losses_of|logsumexp|/scan|argsort"),
    ("attention", r"self_attn/(?!\w_proj)"),
    ("products", r"dot_general"),
    ("decoder: rest", r"layers|while"),
    ("", ""),
)


def make_base(directory: Path) -> None:
    """Write the checkpoint, random, as transformers does."""
    import transformers

    config = transformers.Qwen2VLConfig(
        text_config={
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [8, 12, 12],
            },
        },
        vision_config={"depth": 4, "embed_dim": 256, "num_heads": 4, "hidden_size": 512},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
    )
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(directory)


def arrays() -> dict[str, np.ndarray]:
    """Return what a processor would give for a batch, and its labels."""
    rng = np.random.default_rng(0)
    ids = rng.integers(100, 150000, (ROWS, TOKENS))
    slots = SIDE * SIDE // 4
    ids[:, 4], ids[:, 5 : 5 + slots], ids[:, 5 + slots] = START, IMAGE, END
    labels = np.where(np.arange(TOKENS) >= TOKENS - SUPERVISED, ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": rng.normal(size=(ROWS * SIDE * SIDE, 1176)).astype(np.float32),
        "image_grid_thw": np.array([(1, SIDE, SIDE)] * ROWS),
        "mm_token_type_ids": (ids == IMAGE).astype(np.int64),
        "labels": labels,
    }


def ours(base: Path, quantize: str | None) -> Callable[[], float]:
    """Return a function that trains one step and returns its loss."""
    return compiled(base, quantize)[0]


def compiled(base: Path, quantize: str | None) -> tuple[Callable[[], float], str]:
    """Return such a function, and the text of its program."""
    import jax

    import vlm_jax

    model, params = vlm_jax.load(base, quantize=quantize)
    lora = vlm_jax.LoRA(rank=RANK, alpha=ALPHA, targets=tuple(MODULES))
    model, params = vlm_jax.add_lora(model, params, lora, jax.random.key(0))
    model = dataclasses.replace(model, remat="products")  # what remat_policy=auto chooses here
    table = [(r".*lora_[AB]", "lora"), (".*", "frozen")]
    trainable, frozen = vlm_jax.split(params, table)
    tx = vlm_jax.optimizer(trainable, table, {"learning_rate": RATE})
    state, batch = vlm_jax.init_state(trainable, tx), model.batch(**arrays())
    step = jax.jit(vlm_jax.make_step(model, tx), donate_argnums=0)
    text = step.lower(state, frozen, batch).compile().as_text()

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return run, text


def theirs(base: Path, quantize: str | None) -> Callable[[], float]:
    """Return the same of transformers and PEFT."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    more: dict[str, Any] = {}
    if quantize is not None:
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantize.endswith("dq"),
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["visual", "lm_head"],
        )
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa", **more
    )
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES)
    model = peft.get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    batch = {name: torch.from_numpy(array) for name, array in arrays().items()}

    def run() -> float:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run


SIDES = {"ours": ours, "torch": theirs}


def work(side: str, base: Path, quantize: str | None) -> None:
    """Train one step for each line that comes, and answer with what it took."""
    run = SIDES[side](base, quantize)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        loss = run()
        taken = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**taken, "loss": loss, "peak": peak}), flush=True)


def worker(side: str, base: Path, quantize: str | None) -> subprocess.Popen[str]:
    """Return a process of one side that has loaded its model."""
    command = [sys.executable, __file__, "--side", side, "--base", str(base)]
    command += [] if quantize is None else ["--quantize", quantize]
    own = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **own},
        text=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            sys.exit(f"The process of {side} ended with {process.wait()} before its first step.")
    return process


def turn(process: subprocess.Popen[str]) -> dict[str, float]:
    """Return what one step of a process took."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def compare(base: Path, pairs: int, quantize: str | None) -> dict[str, Any]:
    """Return medians of both sides and of the ratios of pairs, torch's time by ours."""
    processes = {side: worker(side, base, quantize) for side in SIDES}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(pairs + 1):
        for side, process in processes.items():
            found[side].append(turn(process))
    for process in processes.values():
        process.communicate()
    kept = {side: steps[1:] for side, steps in found.items()}
    ratios = {
        name: [b[name] / a[name] for a, b in zip(kept["ours"], kept["torch"], strict=True)]
        for name in ("wall", "processor")
    }
    medians = {
        side: {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        for side, steps in kept.items()
    }
    return {
        "quantize": quantize,
        "pairs": pairs,
        **medians,
        "first losses": {side: steps[0]["loss"] for side, steps in found.items()},
        "ratio": {name: statistics.median(each) for name, each in ratios.items()},
        "ratios": ratios,
    }


def show(found: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    print(f"{'':12}{'wall s':>9}{'processor s':>13}{'peak GB':>9}{'first loss':>12}")
    for side in SIDES:
        one, loss = found[side], found["first losses"][side]
        figures = f"{one['wall']:9.2f}{one['processor']:13.2f}{one['peak'] / 1e9:9.2f}"
        print(f"{side:12}{figures}{loss:12.4f}")
    ratio = found["ratio"]
    print(f"{'torch / ours':12}{ratio['wall']:9.2f}{ratio['processor']:13.2f}")


def profile(base: Path, quantize: str | None) -> None:
    """Print which parts of the step operations of our program belong to, by their time."""
    import jax

    run, text = compiled(base, quantize)
    names = dict(re.findall(r'%([\w.\-]+) = [^\n]*op_name="([^"]*)"', text))
    run()
    total: collections.Counter[str] = collections.Counter()
    single: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        file = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)[0]
        for plane in jax.profiler.ProfileData.from_file(file).planes:
            for event in (event for line in plane.lines for event in line.events):
                name = names.get(event.name)
                if name is None or event.name.startswith(("while", "cond", "call")):
                    continue
                part = next(part for part, pattern in PARTS if re.search(pattern, name))
                total[part or "rest"] += event.duration_ns
                single[f"{part or 'rest':16}{event.name:32} {name[-70:]}"] += event.duration_ns
    whole = sum(total.values())
    for part, nanoseconds in total.most_common():
        print(f"{part:16}{nanoseconds / 1e9:8.2f} s{nanoseconds / whole:8.1%}")
    for name, nanoseconds in single.most_common(60):
        print(f"{nanoseconds / 1e9:8.3f} s  {name}")


@dataclasses.dataclass(frozen=True)
class Options:
    side: str | None
    base: Path | None
    pairs: int
    quantize: str | None
    json: bool
    profile: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="steps of each side that are counted")
    parser.add_argument("--quantize", choices=("nf4", "nf4-dq"), help="4-bit weights on both sides")
    parser.add_argument("--base", type=Path, help="a checkpoint made before, or where to keep it")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--profile", action="store_true", help="profile our step, without torch's")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    asked = Options(**vars(parser.parse_args()))
    if asked.side is not None:
        assert asked.base is not None
        work(asked.side, asked.base, asked.quantize)
        return
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as directory:
        base = asked.base or Path(directory)
        if not (base / "config.json").exists():
            make_base(base)
        if asked.profile:
            profile(base, asked.quantize)
            return
        found = compare(base, asked.pairs, asked.quantize)
    if asked.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
