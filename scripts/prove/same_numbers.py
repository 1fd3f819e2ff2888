"""Proves that a change of the code changes no number: for refactorings.

    python scripts/prove/same_numbers.py --record before.json [--keep runs]
    python scripts/prove/same_numbers.py before.json [--resume runs]

Each recipe below trains a tiny random model for 40 steps and is exported, through the command and
nothing below it. Every step's loss and norm of gradients, and the SHA-256 of every result's weights
and config, are written to a file before the change, and compared with it after, to the bit. --keep
leaves the runs in a new directory; --resume takes the LoRA run from there, as if it had been
stopped at step 20 before the change, and goes on. Exit code 1 where anything differs.

Another processor, number of cores or release of a package may give other bits with the same code:
record and compare on one machine, in one environment. A note tells where they are not the same.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS, STOP = 40, 20  # of a run, and where --resume goes on
SHARED = {
    "model.name_or_path": "base",  # paths are relative: a result's bytes may hold them
    "data.train_file": "data/train.jsonl",
    "data.max_shapes": 1,
    "lora.r": 2,
    "training.max_steps": STEPS,
    "training.save_steps": STOP,
    "training.save_total_limit": 0,
    "training.logging_steps": 1,
    "training.per_device_train_batch_size": 2,
    "training.learning_rate": 1e-2,
    "training.bf16": False,
    "training.report_to": "none",
    "training.seed": 7,
    "mesh.devices": 1,
}
QLORA = {"method": "qlora", "training.optim": "paged_adamw_8bit", "training.bf16": True}
FILMS = [{"path": f"data/{name}.jsonl", "weight": 1} for name in ("train", "films")]
PACKED = {"data.train_file": FILMS, "data.packing": True, "data.max_seq_length": 128}
SPREAD = {"mesh.devices": 8, "mesh.fsdp": 4, "mesh.tensor": 2}
ADAPTER, MERGED, CODES = (), ("--merge",), ("--merge", "--quantized")  # options of exports
# What a recipe changes of the shared settings, and its exports.
RECIPES: dict[str, tuple[dict[str, Any], tuple[tuple[str, ...], ...]]] = {
    "lora": ({"data.max_shapes": 2}, (ADAPTER, MERGED)),
    "qlora": (QLORA, (ADAPTER, MERGED, CODES)),
    "dora": ({"method": "dora"}, (ADAPTER, MERGED)),
    "full": ({"method": "full", "training.ema_decay": 0.9}, (MERGED,)),
    "packed": ({**PACKED, **SPREAD}, (ADAPTER, MERGED)),
    "bottleneck": ({"method": "houlsby"}, (ADAPTER,)),
}
ENVIRONMENT = {  # before anything imports jax
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare() -> None:
    """Write the base in base/, and pictures and films with questions about them in data/."""
    import numpy as np
    from PIL import Image
    from runs import make_base, make_data

    make_base(Path("base"), layers=2)
    make_data(Path("data"))
    rows = []
    for number, answer in enumerate(("darker", "brighter") * 3):
        shades = np.linspace(20, 200, 4 + number).astype(np.uint8)[:: 2 * (number % 2) - 1]
        first, *rest = [Image.new("RGB", (32, 24), (int(shade),) * 3) for shade in shades]
        name = f"film{number}.gif"
        first.save(f"data/{name}", save_all=True, append_images=rest, duration=250)
        talk = [("human", "<video>\nHow does it change?"), ("gpt", answer)]
        turns = [{"from": role, "value": text} for role, text in talk]
        rows.append(json.dumps({"id": f"f{number}", "video": name, "conversations": turns}))
    Path("data/films.jsonl").write_text("\n".join(rows) + "\n")


def command(*words: str) -> None:
    """Run one vlm-jax command in this process, silently unless it fails."""
    from vlm_jax.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    if code:
        raise SystemExit(f"vlm-jax {' '.join(words)} ended with {code}:\n{said.getvalue()}")


def trained(name: str, *resume: str) -> dict[str, Any]:
    """Train as a recipe says, in the working directory, export the result, return the figures."""
    changes, exports = RECIPES[name]
    settings = {**SHARED, **changes, "training.output_dir": name}
    Path(f"{name}.json").write_text(json.dumps(settings, indent=2))
    command("train", "--config", f"{name}.json", *resume)
    for number, options in enumerate(exports):
        command("export", "--run", name, *options, "--out", f"{name}/export{number}")
    return figures(Path(name))


def figures(run: Path) -> dict[str, Any]:
    """Return a run's losses and norms, each float in hex, and its results' files with digests."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), run
    digests = {}
    for path in sorted(run.glob("[!c]*/**/*")):  # not of checkpoints/
        if path.suffix == ".safetensors" or path.name in ("adapter_config.json", "config.json"):
            # What an export says of its base is an absolute path.
            content = path.read_bytes().replace(os.fsencode(Path.cwd()), b"")
            digests[str(path.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return {
        "losses": [row["loss"].hex() for row in rows],
        "norms of gradients": [row["grad_norm"].hex() for row in rows],
        "files": digests,
    }


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Return what differs first between figures of two runs, in words; None: nothing."""
    for kind in ("losses", "norms of gradients"):
        for step, (one, other) in enumerate(zip(old[kind], new[kind], strict=True), 1):
            if one != other:
                values = f"{float.fromhex(one)!r} before, {float.fromhex(other)!r} now"
                return f"{kind} differ from step {step} on: {values}"
    for file in sorted(old["files"] | new["files"]):
        if file not in old["files"] or file not in new["files"]:
            return f"{file} is there only {'before' if file in old['files'] else 'now'}"
        if old["files"][file] != new["files"][file]:
            return f"{file} differs"
    return None


def stopped(kept: Path) -> None:
    """Copy a kept LoRA run here as if it had been stopped at step 20."""
    for name in ("base", "data", "lora"):
        shutil.copytree(kept / name, name)
    shutil.rmtree(f"lora/checkpoints/{STEPS}")  # lines of later steps are cut by the run itself
    for result in (path.parent for path in Path("lora").glob("*/*.safetensors")):
        shutil.rmtree(result)


def versions() -> dict[str, Any]:
    """Return what else than the code decides bits."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {**packages, "machine": platform.machine(), "cores": os.cpu_count()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recorded", nargs="?", type=Path, help="compare with this file")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write this file instead")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the runs here")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a kept LoRA run")
    options = parser.parse_args()
    record, recorded, keep, kept = (
        path and path.resolve()
        for path in (options.record, options.recorded, options.keep, options.resume)
    )
    if bool(record) == bool(recorded) or (kept and (record or keep)):
        parser.error("give a recorded file (and --resume), or --record")
    old = json.loads(recorded.read_text()) if recorded else {}
    new: dict[str, Any] = {"made with": versions()}
    if keep:
        keep.mkdir(parents=True)
    os.environ |= ENVIRONMENT
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout's package, not an installed one
    equal = True
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(keep or place):
        stopped(kept) if kept else prepare()
        for name in ["lora"] if kept else RECIPES:
            new[name] = trained(name, *(["--resume"] if kept else []))
            said = first_difference(old[name], new[name]) if old else "recorded"
            equal &= not (old and said)
            steps = STEPS - STOP if kept else STEPS
            files = len(new[name]["files"])
            print(f"{name}: {steps} losses, {files} files: {said or 'equal'}", flush=True)
    if old and old["made with"] != new["made with"]:
        print(f"Recorded with {old['made with']}, compared with {new['made with']}.")
    if record:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(new, indent=1) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
