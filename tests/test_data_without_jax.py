"""What a loader's worker does needs no JAX: records to batches where it cannot be imported."""

import subprocess
import sys

from checkpoint_files import llava_files, qwen2_vl_files
from test_look_up import make_rows

EPOCH = """
import sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax"):
    sys.modules[name] = None  # an import of it raises

import vlm_jax.data.statistics
from vlm_jax import Batch, config
from vlm_jax.data import Encoder, Pipeline

*bases, data = sys.argv[1:]
for base in bases:
    encoder = Encoder(base, max_seq_length=256)
    assert encoder.encode({"messages": [{"role": "user", "content": "box?"},
                                        {"role": "assistant", "content": "red"}]})
    seen, state = [], None
    pipeline = Pipeline(encoder, data, rows=2, packing=True)
    for batch, ids, state in pipeline.batches(bytes_only=True):
        assert isinstance(batch, Batch) and batch.patches.dtype == "uint8"
        seen += ids
        if state["epoch"]:
            break
    images = sum((batch.image_index >= 0).any() for batch, _ in pipeline.eval_batches())
    print(encoder.hf_config["model_type"], len(seen), sorted({*seen}), int(images))
"""


def test_an_epoch_where_jax_is_not(tmp_path):
    bases = [make(tmp_path / make.__name__) for make in (qwen2_vl_files, llava_files)]
    command = [sys.executable, "-c", EPOCH, *map(str, bases), str(make_rows(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = [f"r{i}" for i in range(6)]
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["qwen2_vl", "llava"]
    for _, count, rest in lines:
        assert count == "6" and rest.startswith(str(records)) and rest[-1] != "0"
