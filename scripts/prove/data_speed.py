"""Measures how fast batches are made, against the Hugging Face processor, and what packing gives.

    python scripts/prove/data_speed.py [--records 400]

Three figures, each a ratio within one run:
- one worker process against a worker of PyTorch's loader with `transformers`' processor, on the
  same conversations and images, with the same pixels out;
- two worker processes against one;
- packed rows: fill, and useful tokens a second of a small model's training step against rows of one
  example, padded to the longest of their batch as most trainers do, and by our ladder of shapes.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import data_files
import numpy as np

ROWS = 4  # of the batches that workers make
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


class Reference:
    """What trainers on PyTorch do in a worker: a batch by the Hugging Face processor's parts.

    A map-style data set of batches for `torch.utils.data.DataLoader`: token ids padded to the
    longest, labels on the assistant's turns, pixel values one after another. Positions, which
    those trainers compute on the device, are left out.
    """

    def __init__(self, base: Path, records: list[dict[str, Any]]):
        self.base, self.records = base, records

    def __len__(self) -> int:
        return len(self.records) // ROWS

    def __getitem__(self, number: int) -> dict[str, Any]:
        import torch
        from PIL import Image

        if not hasattr(self, "images"):
            self._open()
        texts, opened = [], []
        for record in self.records[ROWS * number : ROWS * (number + 1)]:
            texts.append(self.tokenizer.apply_chat_template(record["messages"], tokenize=False))
            opened += [
                Image.open(Path(record["folder"], name)).convert("RGB") for name in record["images"]
            ]
        made = self.images(opened, return_tensors="pt") if opened else {}
        grids = iter(made.get("image_grid_thw", ()))
        for row, text in enumerate(texts):
            while "<|image_pad|>" in text:
                count = int(next(grids).prod()) // 4
                text = text.replace("<|image_pad|>", "<|slot|>" * count, 1)
            texts[row] = text.replace("<|slot|>", "<|image_pad|>")
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        labels = torch.full_like(ids, -100)
        for row, text_ids in enumerate(ids.tolist()):
            answers = False
            for place, token in enumerate(text_ids):
                if token == self.start:
                    answers = text_ids[place + 1 : place + 2] == self.assistant
                elif answers:
                    labels[row, place] = token
                    answers = token != self.end
        return {**batch, "labels": labels, **made}

    def _open(self) -> None:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        self.images = Qwen2VLImageProcessorPil.from_pretrained(self.base)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.start, self.end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self.assistant = self.tokenizer("assistant", add_special_tokens=False)["input_ids"][:1]


def reference_rate(base: Path, data: Path, count: int) -> float:
    """Return examples a second of one worker process of PyTorch's loader, once it has started."""
    from torch.utils.data import DataLoader

    from vlm_jax.data import read_records

    records = read_records(data)
    source: Any = Reference(base, [records[i] for i in range(count + 4 * ROWS)])
    loader = iter(
        DataLoader(
            source,
            batch_size=None,
            num_workers=1,
            prefetch_factor=2,
            multiprocessing_context="spawn",
        )
    )
    for _ in range(4):
        next(loader)
    start = time.perf_counter()
    done = sum(len(batch["input_ids"]) for batch in loader)
    return done / (time.perf_counter() - start)


def pipeline_rate(base: Path, data: Path, workers: int, count: int) -> float:
    """Return examples a second of worker processes, once they have started."""
    from vlm_jax.data import Pipeline

    pipeline = Pipeline(
        base, data, rows=ROWS, max_length=4096, overlong="drop", workers=workers, prefetch=2
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
    small = {**encoder.hf_config, **SMALL}
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
    with tempfile.TemporaryDirectory(prefix="data_speed.") as name:
        base = data_files.write_checkpoint(Path(name, "base"))
        data = data_files.write_records(Path(name, "data"), 4 * count)
        useful_rates(base, data)
        reference = reference_rate(base, data, count)
        one, two = (pipeline_rate(base, data, workers, count) for workers in (1, 2))
        print(f"Hugging Face's, one worker      {reference:8.1f} examples/s")
        print(f"one worker process              {one:8.1f} examples/s   {one / reference:.2f} x")
        print(f"two worker processes            {two:8.1f} examples/s   {two / one:.2f} x one")


if __name__ == "__main__":
    main()
