"""The code of docs/FUNCTIONAL.md and docs/ANY_FLAX_MODEL.md runs as it stands there."""

import json
import re
from pathlib import Path

import jax
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_documented_loop(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "FUNCTIONAL.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    assert len(code.splitlines()) <= 40
    rng = np.random.default_rng(0)
    lines = []
    for number in range(8):
        file = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(file)
        turns = [("user", "<image>what is it?"), ("assistant", ["one", "two"][number % 2])]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"image": file.name, "messages": messages}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/FUNCTIONAL.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and np.mean(losses[-4:]) < 0.5 * losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_documented_foreign_module(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "ANY_FLAX_MODEL.md").read_text()
    code, bottlenecks, *_ = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    held: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # which optax.adam needs
        exec(compile(code, "docs/ANY_FLAX_MODEL.md", "exec"), held)
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]
    names = {layer.name for layer in held["adapted"].layers}
    assert names == {"fc", *(f"attention.{part}" for part in ("query", "key", "value", "out"))}
    exec(compile(bottlenecks, "docs/ANY_FLAX_MODEL.md", "exec"), held)
    assert [site.name for site in held["adapted"].sites] == ["attention", "fc"]
    assert jax.tree.map(np.shape, held["variables"]["adapter"]) == jax.tree.map(
        np.shape, held["gradient"]
    )
