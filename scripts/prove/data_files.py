"""Conversations with images of many sizes, and a checkpoint's files without weights, for proofs.

Text lengths are log-normal, 60 to 2,000 tokens; a conversation has 0 to 4 images of 100 to 1,000
pixels a side. The tokenizer is the tiny base's, all else is Qwen2-VL-2B's own.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_jax.models.reference_configs import KNOWN

TINY = Path(__file__).resolve().parents[2] / "assets" / "qwen2_vl_tiny_scenes"
MAX_PIXELS = 512 * 28 * 28
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "min_pixels": 4 * 28 * 28,
    "max_pixels": MAX_PIXELS,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
WORDS = "what color is the small ball near a big box and how many are red blue green yellow".split()


def write_checkpoint(directory: Path) -> Path:
    """Write config.json, tokenizer, template and image settings; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    own = json.loads((TINY / "config.json").read_text())
    ids = {name: own[name] for name in own if name.endswith("token_id")}
    config = {**KNOWN["Qwen/Qwen2-VL-2B-Instruct"], **ids}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    for path in (*TINY.glob("token*.json"), TINY / "chat_template.jinja"):
        shutil.copy(path, directory)
    return directory


def write_records(directory: Path, count: int, pictures: int = 64, seed: int = 0) -> Path:
    """Write data.jsonl of `count` conversations over `pictures` JPEG files; return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = []
    for number in range(pictures):
        height, width = (int(n) for n in rng.integers(100, 1000, 2))
        coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        names.append(f"{number}.jpg")
        image.save(directory / names[-1], quality=90)
    path = directory / "data.jsonl"
    with path.open("w") as file:
        for number in range(count):
            length = int(np.clip(np.exp(rng.normal(np.log(300), 0.9)), 60, 2000))
            images = [names[i] for i in rng.integers(0, pictures, rng.integers(0, 5))]
            words = iter(rng.choice(WORDS, length))
            talk = [("human", "<image>\n" * len(images)), ("gpt", ""), ("human", ""), ("gpt", "")]
            turns = [
                {"from": role, "value": start + " ".join(next(words) for _ in range(length // 4))}
                for role, start in talk
            ]
            row = {"id": f"c{number}", "image": images, "conversations": turns}
            file.write(json.dumps(row) + "\n")
    return path
