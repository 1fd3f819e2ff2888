"""Images of 300 sizes, and a conversation with images and videos, against transformers."""

import importlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from checkpoint_files import GEMMA, gemma3_files, qwen2_vl_files, text
from PIL import Image
from references import quiet, spread, tensors
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3Processor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata

import vlm_jax
from vlm_jax.data import Encoder
from vlm_jax.data.media.frame_sampling import Sampling, Video
from vlm_jax.data.media.image_settings import make_processor
from vlm_jax.data.media.images import read_image
from vlm_jax.data.media.processors import look_up
from vlm_jax.data.media.video_processor import fit_together, make_video_processor
from vlm_jax.errors import UserError
from vlm_jax.models import read_family
from vlm_jax.models.qwen3_vl import Qwen3VL

CROPPED = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
PROCESSORS = {
    "qwen2-vl": (
        Qwen2VLImageProcessorPil,
        {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 28 * 28 * 40},
    ),
    "qwen3-vl": (
        Qwen2VLImageProcessorPil,
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 16,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "size": {"shortest_edge": 65536, "longest_edge": 32 * 32 * 90},
        },
    ),
    "gemma3": (
        Gemma3ImageProcessorPil,
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 21, "width": 21},
            "do_pan_and_scan": False,
            "pan_and_scan_min_crop_size": 256,
        },
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
    "make",
    [
        Qwen2VLForConditionalGeneration,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
    ],
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


def test_a_conversation_with_images_between_newlines(tmp_path):
    """Blank lines around an image join those of the text, as in the reference's processor."""
    directory = gemma3_files(tmp_path)
    image_processor = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = Gemma3Processor(image_processor, tokenizer, GEMMA, image_seq_length=4)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((20, 30), (16, 16), (9, 5))]
    picture, asked = {"type": "image"}, {"type": "text", "text": "What\n\n color?"}
    messages = [
        {"role": "user", "content": [picture, asked, picture]},
        text("assistant", "red"),
        {"role": "user", "content": [{"type": "text", "text": "And?\n"}, picture]},
        text("assistant", "blue"),
    ]
    wanted = reference(
        text=reference.apply_chat_template(messages, tokenize=False),
        images=[Image.fromarray(one) for one in images],
        add_special_tokens=False,
        return_tensors="np",
    )
    encoder = Encoder(directory)
    record = {"messages": messages, "images": images}
    arrays = encoder.encode(record)
    np.testing.assert_array_equal(arrays["tokens"], wanted["input_ids"][0])
    np.testing.assert_array_equal(arrays["pixel_values"], wanted["pixel_values"])
    size = encoder.measure(record)
    assert size.tokens == len(arrays["tokens"]) and size.patches == 3 * 16


def test_frames_and_sizes_of_a_bound_on_all_frames_are_the_references():
    # Not by its name in transformers, which wants torchvision for the rest of it.
    qwen3_video = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    rng, taken, refused = np.random.default_rng(3), 0, 0
    for frames, height, width in np.exp(rng.uniform(0.7, 6.5, (300, 3))).astype(int):
        given = (int(frames), int(height), int(width), 2, 32, 131072, 786432)
        try:
            want = qwen3_video.smart_resize(*given)
        except ValueError as error:  # a side 200 times the other, or too few frames
            refused += 1
            with pytest.raises(UserError, match="200 times" if "aspect" in str(error) else "1 "):
                fit_together(*given)
        else:
            assert fit_together(*given) == want
        total, rate, fps = int(frames), float(rng.uniform(5, 60)), float(rng.uniform(0.5, 4))
        if total < 2:
            continue
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        stub = SimpleNamespace(min_frames=4, max_frames=16, fps=2)
        want = qwen3_video.Qwen3VLVideoProcessor.sample_frames(stub, metadata, fps=fps)
        got, sampled = Sampling(fps, 4, 16, whole=False).taken(total, rate)
        np.testing.assert_array_equal(got, want)
        metadata.frames_indices = got
        assert sampled == pytest.approx(metadata.sampled_fps)
        taken += len(got) % 2
    assert 0 < refused < 30
    assert taken > 20  # odd numbers, of which the last frame is repeated


def test_frames_of_a_video_stand_behind_their_times_as_the_references_do():
    family = read_family(Qwen3VL.KNOWN["Qwen/Qwen3-VL-2B-Instruct"])
    stub = SimpleNamespace(
        image_token="<|image_pad|>",
        video_token="V",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
    )
    stub._calculate_timestamps = lambda *args: Qwen3VLProcessor._calculate_timestamps(stub, *args)
    rng = np.random.default_rng(4)
    for _ in range(100):
        numbers = np.sort(rng.integers(0, 900, rng.integers(1, 9)))
        rate, grid = float(rng.uniform(5, 60)), (-(-len(numbers) // 2), 4, 6)
        metadata = VideoMetadata(total_num_frames=900, fps=rate, frames_indices=numbers)
        given = {"video_grid_thw": np.array([grid]), "video_metadata": [metadata]}
        want = Qwen3VLProcessor.replace_video_token(stub, given, 0)
        parts = family.written("video", grid, [n / rate for n in numbers])
        assert "".join("V" * p if isinstance(p, int) else p for p in parts) == want
    assert family.written("image", (1, 4, 6), ()) == [6]


def test_settings_of_a_bound_on_all_frames():
    raw = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2}
    ours = make_video_processor(raw)
    assert ours.patches.raw["patch_size"] == 16 and not ours.sampling.whole
    assert ours.largest == 786432 // 16**2 and ours.max_video_tokens == 768
    assert make_video_processor(ours.settings()).settings() == ours.settings()

    def film(frames=16, **pixels):
        return Video(frames, 480, 640, None, pixels, 2.0, [])

    # Options and a record's keys bound one frame; the record's come first.
    bounded = make_video_processor(raw, max_pixels=65536)
    assert bounded.size(film()) == ours.size(film(max_pixels=65536)) == (192, 256)
    assert bounded.size(film(max_pixels=32768)) == ours.size(film(max_pixels=32768))
    least = make_video_processor(raw, min_pixels=40000)
    assert ours.size(film(4, min_pixels=40000)) == least.size(film(4))
    for wrong, message in (
        (film(max_pixels=100), "one token's 1024 pixels"),
        (film(min_pixels=3000, max_pixels=2000), "3000 to 2000 pixels"),
        (film(min_pixels=10**6), "more than the 786432 that the video settings allow"),
    ):
        with pytest.raises(UserError, match=message):
            ours.size(wrong)
    assert ours.least == 1024 and ours.limited(1024).size(film(512)) == (32, 32)
    assert make_video_processor(raw, max_frames=10**4).largest == 4 * 5000
    image = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16}
    assert make_video_processor(image, default="Qwen3VLVideoProcessor").name == ours.name
    assert make_video_processor(image).name == "Qwen2VLVideoProcessor"
