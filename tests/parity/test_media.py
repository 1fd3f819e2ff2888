"""Images of 300 sizes, and a conversation with images and videos, against transformers."""

import jax
import numpy as np
import pytest
import torch
from checkpoint_files import qwen2_vl_files, text
from PIL import Image
from references import quiet, spread, tensors
from transformers import (
    AutoConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlm_jax
from vlm_jax.data import Encoder
from vlm_jax.data.media.image_settings import make_processor
from vlm_jax.data.media.images import read_image
from vlm_jax.data.media.processors import look_up
from vlm_jax.errors import UserError

CROPPED = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
PROCESSORS = {
    "qwen2-vl": (
        Qwen2VLImageProcessorPil,
        {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 28 * 28 * 40},
    ),
    "clip": (CLIPImageProcessorPil, {"image_processor_type": "CLIPImageProcessor", **CROPPED}),
    "llava, padded": (
        LlavaImageProcessorPil,
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **CROPPED},
    ),
}


def sizes():
    """Return 300 (height, width), from a point to 5,000 long, most of them ordinary."""
    rng = np.random.default_rng(0)
    ends = [(1, 1), (1, 2), (1, 200), (1, 201), (1, 5000), (5000, 1), (3, 599), (1999, 10)]
    return ends + [
        tuple(s) for s in np.exp(rng.uniform(0, 6, (300 - len(ends), 2))).astype(int) + 1
    ]


@pytest.mark.parametrize("name", PROCESSORS)
def test_no_value_differs_in_300_sizes(name):
    make, raw = PROCESSORS[name]
    reference = make(**{k: v for k, v in raw.items() if k != "image_processor_type"})
    ours = make_processor(raw)
    rng, refused = np.random.default_rng(1), 0
    for size in sizes():
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        try:
            want = reference(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
        except ValueError:  # longer than 200 times its width
            refused += 1
            with pytest.raises(UserError, match="200 times"):
                ours.cut(read_image(pixels))
            continue
        got = look_up(ours.table, ours.cut(read_image(pixels))[0])
        differ = (got != want.reshape(got.shape).astype(np.float32)).sum()
        assert differ == 0, (size, int(differ))
    assert refused < 10


@pytest.mark.parametrize(
    "make", [Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration]
)
def test_logits_of_a_conversation_with_images_and_videos(tmp_path, make):
    qwen2_vl_files(tmp_path, family=make.config_class.model_type)
    reference = spread(make(AutoConfig.from_pretrained(tmp_path)), 0, 8.0)
    reference.save_pretrained(tmp_path)
    model, params = vlm_jax.load(tmp_path)
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.integers(0, 256, (*shape, 3)).astype(np.uint8)

    parts = [{"type": kind} for kind in ("video", "image", "video", "image")]
    record = {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "What color?"}]},
            text("assistant", "red and blue"),
        ],
        "images": [noise(30, 20), noise(17, 40)],
        "videos": [
            {"video": list(noise(3, 24, 24)), "fps": 3.0},
            {"video": noise(7, 16, 40), "nframes": 4},
        ],
    }
    encoder = Encoder(tmp_path)
    arrays, example = encoder.encode(record), encoder.example(record)
    ids = arrays["tokens"][None].astype(np.int64)
    config = model.config
    kinds = np.where(ids == config.image_token_id, 1, np.where(ids == config.video_token_id, 2, 0))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mm_token_type_ids": kinds}
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        inputs[key] = arrays[key]
    assert arrays["video_grid_thw"][:, 0].tolist() == [2, 2]
    if "second_per_grid_ts" in config.OF_VIDEOS:  # 4 of 7 frames at 2 a second: 8/7 a second
        inputs["second_per_grid_ts"] = arrays["second_per_grid_ts"]
        np.testing.assert_allclose(arrays["second_per_grid_ts"], [2 / 3, 7 / 4], rtol=1e-6)
    with torch.no_grad(), quiet():
        want = reference(**tensors(inputs)).logits.numpy()
    assert want.std() > 0.5
    # the one row and, packed behind itself, the same again
    length, patches = len(example["tokens"]), len(example["patches"])
    batch = model.collate([[example, example]], 2 * length, 2 * patches)
    logits = jax.jit(lambda p, b: model.apply({"params": p}, b))(params, batch)[0]
    np.testing.assert_allclose(logits[:length], want[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits[length:], want[0], atol=1e-4, rtol=0)
    prompt = model.encode(record["messages"], record["images"], record["videos"])
    assert prompt.patches.shape[1] == patches
