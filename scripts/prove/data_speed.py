"""Measures how fast batches are made, against the Hugging Face processor, and what packing gives.

    python scripts/prove/data_speed.py [--records 400]

Three figures, each a ratio within one run:
- one worker process against `transformers`' Qwen2VLProcessor on the same conversations and images,
  with the same values out, each on one core;
- two worker processes against one;
- packed rows: fill, and useful tokens a second of a small model's training step against rows of one
  example, padded to the longest of their batch as most trainers do, and by our ladder of shapes.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import data_files
import numpy as np

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vocab_size": 1280,
}
SMALL_TOWER = {"depth": 2, "embed_dim": 128, "num_heads": 4, "hidden_size": 256}


def reference_seconds(base: Path, records, count: int) -> float:
    """Return how long the Hugging Face processor takes for `count` records, one by one."""
    from PIL import Image
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def one(record) -> None:
        opened = [
            Image.open(Path(record["folder"], name)).convert("RGB") for name in record["images"]
        ]
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        if opened:
            made = images(opened, return_tensors="np")
            for grid in made["image_grid_thw"]:
                text = text.replace("<|image_pad|>", "<|slot|>" * int(np.prod(grid) // 4), 1)
            text = text.replace("<|slot|>", "<|image_pad|>")
        tokenizer(text, return_tensors="np")

    one(records[0])
    start = time.perf_counter()
    for index in range(count):
        one(records[index])
    return time.perf_counter() - start


def pipeline_rate(base: Path, data: Path, workers: int, count: int) -> float:
    """Return examples a second of worker processes, once they have started."""
    from vlm_jax.data import Pipeline

    pipeline = Pipeline(
        base, data, rows=4, max_length=4096, overlong="drop", workers=workers, prefetch=2
    )
    batches = pipeline.batches(bytes_only=True)
    for _ in range(4 * max(1, workers)):
        next(batches)
    start, done = time.perf_counter(), 0
    while done < count:
        done += len(next(batches)[1])
    seconds = time.perf_counter() - start
    batches.close()
    return done / seconds


def useful_rates(base: Path, data: Path) -> None:
    """Print fill and useful tokens a second of a small model's steps, of rows made three ways."""
    import jax

    import vlm_jax
    from vlm_jax.data import Encoder, Pipeline
    from vlm_jax.train.step import init_state, make_step

    encoder = Encoder(base, max_seq_length=2048)
    small = {**encoder.model.hf_config, **SMALL}
    small["vision_config"] = {**small["vision_config"], **SMALL_TOWER}
    model = vlm_jax.from_config(small)
    params = model.init(jax.random.key(0))
    table = [(r"model/visual/.*", "frozen"), (r".*", "full")]
    trainable, frozen = vlm_jax.split(params, table)
    tx = vlm_jax.optimizer(trainable, table, {"max_steps": 100})
    step = jax.jit(make_step(model, tx))
    seconds: dict[tuple[int, ...], float] = {}

    def timed(batch) -> float:
        if batch.shape not in seconds:
            state = init_state(trainable, tx)
            jax.block_until_ready(step(state, frozen, batch))
            start = time.perf_counter()
            for _ in range(2):
                jax.block_until_ready(step(state, frozen, batch))
            seconds[batch.shape] = (time.perf_counter() - start) / 2
        return seconds[batch.shape]

    print("rows of 2,048 tokens      filled: tokens  patches  useful tokens/s")
    first = None
    for name, options in (
        ("one, padded to 2,048", {"max_shapes": 1}),
        ("one, 4 shapes", {}),
        ("packed", {"packing": True}),
    ):
        pipeline = Pipeline(encoder, data, rows=2, max_length=2048, **options)
        spent = useful = 0.0
        slots = np.zeros(2)
        used = np.zeros(2)
        for batch, _, after in pipeline.batches():
            spent += timed(batch)
            filled = np.array([(batch.segments > 0).sum(), (batch.patch_segments > 0).sum()])
            used, slots = used + filled, slots + (batch.segments.size, batch.patch_segments.size)
            useful += filled[0]
            if after["epoch"]:
                break
        rate = useful / spent
        first = first or rate
        fill = used / slots
        print(f"{name:24s} {fill[0]:15.1%} {fill[1]:8.1%} {rate:12.0f}   {rate / first:.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=400)
    count = parser.parse_args().records
    from vlm_jax.data import read_records

    with tempfile.TemporaryDirectory(prefix="data_speed.") as name:
        base = data_files.write_checkpoint(Path(name, "base"))
        data = data_files.write_records(Path(name, "data"), 4 * count)
        useful_rates(base, data)
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        reference = count / reference_seconds(base, read_records(data), count)
        os.sched_setaffinity(0, cores)
        one, two = (pipeline_rate(base, data, workers, count) for workers in (1, 2))
        print(f"Hugging Face processor, one core {reference:8.1f} examples/s")
        print(f"one worker process              {one:8.1f} examples/s   {one / reference:.2f} x")
        print(f"two worker processes            {two:8.1f} examples/s   {two / one:.2f} x one")


if __name__ == "__main__":
    main()
