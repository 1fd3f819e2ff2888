"""Tiny random reference models of transformers, written to disk, and inputs for them.

Weights are scaled up so that logits have a standard deviation near 1: at the default
initialisation a wrong layer changes logits by less than a tolerance.
"""

import contextlib
import logging
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE, VIDEO, START, END = 190, 191, 192, 193
LLAVA_IMAGE = 100
logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()


def spread(model: torch.nn.Module, seed: int, factor: float = 6.0) -> torch.nn.Module:
    """Scale matrices up and shake vectors, so that every tensor matters for the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.02 * factor, generator=generator)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


QWEN_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
QWEN_TEXT = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=200,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
)


def qwen2_vl(directory: Path, seed: int = 0, *, factor: float = 6.0, text=None, vision=None, **top):
    """Return a tiny Qwen2-VL (6 query heads on 2 kv heads) saved to `directory`."""
    config = Qwen2VLConfig(
        vision_config=dict(
            depth=2, embed_dim=32, num_heads=2, hidden_size=48, patch_size=4, mlp_ratio=2
        )
        | (vision or {}),
        text_config=QWEN_TEXT | (text or {}),
        **QWEN_IDS,
        **top,
    )
    model = spread(Qwen2VLForConditionalGeneration(config), seed, factor)
    model.save_pretrained(directory)
    return model


def qwen2_5_vl(
    directory: Path, seed: int = 0, *, factor: float = 6.0, text=None, vision=None, **top
):
    """Return a tiny Qwen2.5-VL saved to `directory`: windows of 2 x 2 merged patches, 3 blocks."""
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            depth=3,
            hidden_size=32,
            num_heads=2,
            intermediate_size=24,
            out_hidden_size=48,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=[1],
            tokens_per_second=2,
        )
        | (vision or {}),
        text_config=QWEN_TEXT | (text or {}),
        **QWEN_IDS,
        **top,
    )
    model = spread(Qwen2_5_VLForConditionalGeneration(config), seed, factor)
    model.save_pretrained(directory)
    return model


def qwen3_vl(directory: Path, seed: int = 0, *, factor: float = 6.0, text=None, vision=None, **top):
    """Return a tiny Qwen3-VL saved to `directory`: a table of 5 x 5, features added twice."""
    config = Qwen3VLConfig(
        vision_config=dict(
            depth=3,
            hidden_size=32,
            num_heads=2,
            intermediate_size=24,
            out_hidden_size=48,
            patch_size=4,
            num_position_embeddings=25,
            deepstack_visual_indexes=[0, 2],
        )
        | (vision or {}),
        text_config=QWEN_TEXT
        | dict(
            num_hidden_layers=4,
            num_attention_heads=4,
            head_dim=24,
            rope_parameters=dict(
                rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4], mrope_interleaved=True
            ),
        )
        | (text or {}),
        **QWEN_IDS,
        **top,
    )
    model = spread(Qwen3VLForConditionalGeneration(config), seed, factor)
    model.save_pretrained(directory)
    return model


# Decoders whose rows are whole blocks of 64: bitsandbytes on the CPU decodes no others right.
WIDE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)


def wide(family: str, directory: Path, factor: float = 6.0):
    """Return a tiny model of a family with a decoder of `WIDE`, saved to `directory`."""
    if family == "gemma3":
        return gemma3(directory, factor=factor, text=WIDE | dict(head_dim=16))
    if family == "llava":
        return llava(directory, "clip", "llama", factor=factor, extra=WIDE)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    text = WIDE | dict(rope_parameters=rope)
    if family != "qwen2_vl":
        make = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}[family]
        rope["mrope_interleaved"] = family == "qwen3_vl"
        return make(
            directory, factor=factor, text=text | dict(head_dim=16), vision=dict(out_hidden_size=64)
        )
    return qwen2_vl(directory, factor=factor, text=text, vision=dict(hidden_size=64))


TEXTS = {
    "llama": dict(
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=1,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=1e4,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "mistral": dict(sliding_window=7, head_dim=16, num_key_value_heads=2),
    "qwen2": dict(
        sliding_window=5,
        use_sliding_window=True,
        max_window_layers=1,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen3": dict(
        attention_bias=True,
        head_dim=14,
        sliding_window=5,
        use_sliding_window=True,
        max_window_layers=1,
        num_key_value_heads=3,
    ),
}


def llava(
    directory: Path, tower: str, text: str, seed: int = 0, factor: float = 6.0, extra=None, **top
):
    """Return a tiny LLaVA saved to `directory`; 30 pixels leave a remainder of the patch size."""
    config = LlavaConfig(
        vision_config=dict(
            model_type=f"{tower}_vision_model",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=30,
            patch_size=14,
        ),
        text_config=dict(
            model_type=text,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            vocab_size=120,
            bos_token_id=1,
            eos_token_id=2,
        )
        | TEXTS[text]
        | (extra or {}),
        image_token_index=LLAVA_IMAGE,
        **top,
    )
    model = spread(LlavaForConditionalGeneration(config), seed, factor)
    model.save_pretrained(directory)
    return model


def pad(rows: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (input_ids, attention_mask) [B, T] of rows padded on one side."""
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        here = slice(length - len(tokens), length) if left else slice(0, len(tokens))
        ids[row, here] = tokens
        mask[row, here] = 1
    return ids, mask


GEMMA_IMAGE = 195


def gemma3(directory: Path, seed: int = 0, *, factor: float = 6.0, text=None, **top):
    """Write a tiny Gemma 3 whose blocks of 16 features are longer than its windows."""
    config = Gemma3Config(
        vision_config=dict(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            image_size=58, patch_size=7, vision_use_head=False,
        ),
        text_config=dict(
            hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, head_dim=10, vocab_size=200, query_pre_attn_scalar=24,
            sliding_window=5, sliding_window_pattern=3, max_position_embeddings=64,
            rope_scaling=dict(rope_type="linear", factor=8.0), bos_token_id=1, eos_token_id=2,
        ) | (text or {}),
        image_token_index=GEMMA_IMAGE, boi_token_index=193, eoi_token_index=194,
        mm_tokens_per_image=16,
        **top,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = spread(Gemma3ForConditionalGeneration(config), seed, factor)
    model.save_pretrained(directory)
    return model


def gemma3_inputs(
    layout: str = "mixed", left: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return rows with images in a row, an image at the start, and long text; or "text" alone."""
    rng = np.random.default_rng(seed)
    image = [GEMMA_IMAGE] * 16

    def text(count: int) -> list[int]:
        return rng.integers(3, 190, count).tolist()

    rows = [
        text(3) + image + text(1) + image + image + text(4),  # of which two are one block
        image + text(9),
        text(17),
    ]
    if layout == "text":
        rows = rows[-1:]
    ids, mask = pad(rows, left)
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs["token_type_ids"] = (ids == GEMMA_IMAGE).astype(np.int64)
    if layout != "text":
        inputs["pixel_values"] = rng.normal(size=(4, 3, 58, 58)).astype(np.float32)
    return inputs


def media(kind: int, t: int, h: int, w: int) -> list[int]:
    """Return the tokens of one image or video of a Qwen2-VL grid."""
    return [START] + [kind] * (t * h * w // 4) + [END]


def qwen2_vl_inputs(
    layout: str, left: bool = False, seed: int = 0, apart: bool = False
) -> dict[str, np.ndarray]:
    """Return what a processor returns for a layout: a row is text, "i" image, "v" video grids.

    apart: a video's frames stand apart, each behind two tokens of text.
    """
    rng = np.random.default_rng(seed)
    rows: list[list[int]] = []
    grids: dict[str, list[tuple[int, int, int]]] = {"i": [], "v": []}
    for row in LAYOUTS[layout]:
        tokens: list[int] = []
        for part in row:
            if isinstance(part, int):
                tokens += rng.integers(3, 180, part).tolist()
            else:
                kind, *grid = part
                grids[kind].append(tuple(grid))
                frames = grid[0] if apart else 1
                for _ in range(frames):
                    tokens += [7, 8] * (apart and kind == "v")
                    tokens += media(IMAGE if kind == "i" else VIDEO, grid[0] // frames, *grid[1:])
        rows.append(tokens)
    ids, mask = pad(rows, left)
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs["mm_token_type_ids"] = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    names = {
        "i": ("pixel_values", "image_grid_thw"),
        "v": ("pixel_values_videos", "video_grid_thw"),
    }
    for kind, (values, grid) in names.items():
        if grids[kind]:
            patches = sum(t * h * w for t, h, w in grids[kind])
            inputs[values] = rng.normal(size=(patches, 3 * 2 * 4 * 4)).astype(np.float32)
            inputs[grid] = np.array(grids[kind])
    return inputs


def qwen3_vl_inputs(layout: str, left: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the same with the frames of each video apart, behind text that stands for times."""
    return qwen2_vl_inputs(layout, left, seed, apart=True)


def qwen2_5_vl_inputs(layout: str, left: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the same with 0.7 seconds from frame to frame, which positions round down."""
    inputs = qwen2_vl_inputs(layout, left, seed)
    if "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = np.float32([0.7] * len(inputs["video_grid_thw"]))
    return inputs


LAYOUTS = {
    "one image": [[3, ("i", 1, 4, 6), 5]],
    "images of different sizes": [[2, ("i", 1, 4, 6), 4, ("i", 1, 2, 2), ("i", 1, 6, 4), 3]],
    "large images": [[2, ("i", 1, 12, 20), 1, ("i", 1, 8, 8), 3]],
    "video": [[4, ("v", 3, 4, 2), 3]],
    "text": [[9]],
    "mixed": [
        [3, ("i", 1, 4, 6), 5, ("i", 1, 2, 4), 2],
        [7],
        [1, ("v", 2, 2, 4), 2, ("i", 1, 6, 2), 4],
        [2, ("i", 1, 2, 2), 1],
    ],
}


def llava_inputs(per_image: int, left: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Return rows with two images, one, and none."""
    rng = np.random.default_rng(seed)
    image = [LLAVA_IMAGE] * per_image

    def text(count: int) -> list[int]:
        return rng.integers(3, 99, count).tolist()

    rows = [text(3) + image + text(2) + image + text(4), text(1) + image + text(3), text(6)]
    ids, mask = pad(rows, left)
    pixels = rng.normal(size=(3, 3, 30, 30)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def assert_loads_in_transformers(directory: Path) -> None:
    """Every key of a checkpoint must have its place in transformers' model, and every place one."""
    with quiet():
        _, found = transformers.AutoModelForImageTextToText.from_pretrained(
            directory, output_loading_info=True
        )
    assert not found["missing_keys"] and not found["unexpected_keys"]


def tensors(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}


def our_logits(model, params, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return our logits of a processor's arrays, compiled: op by op it takes seconds."""
    apply = jax.jit(lambda params, batch: model.apply({"params": params}, batch))
    return np.asarray(apply(params, model.batch(**inputs)))


@contextlib.contextmanager
def quiet():
    """Silence the references' own warnings; ours stay errors."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
