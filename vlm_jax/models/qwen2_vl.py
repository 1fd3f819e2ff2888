"""Qwen2-VL (https://arxiv.org/abs/2409.12191): the tower of qwen2_vit.py, and M-RoPE.

Letters: B rows, T tokens, P patches, C values a patch, D model, E tower width, F merged features.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.files.limits import number
from vlm_jax.models.decoder import AXES as DECODER_AXES
from vlm_jax.models.decoder import Decoder, DecoderConfig, decoder_from_hf
from vlm_jax.models.hf_config import Fields
from vlm_jax.models.layers.activations import ACTIVATIONS
from vlm_jax.models.layers.bottleneck import Bottleneck
from vlm_jax.models.layers.linear import LoRAScale
from vlm_jax.models.qwen2_vit import Tower, Visual
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.positions import mrope, vision_positions, vision_segments


@dataclasses.dataclass(frozen=True)
class Config:
    """What the computation depends on; `from_hf` reads a config.json, flat (4.x) or nested."""

    text: DecoderConfig
    vision: Tower
    image_token_id: int
    video_token_id: int

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "Config":
        top = Fields(raw, "config.json", "vision_token_id spatial_merge_size")
        vision = Fields(top.take("vision_config", kind=dict), "config.json, vision_config")
        tied = top.take("tie_word_embeddings", False)
        text = top.take("text_config", None, dict)
        image, video = top.size("image_token_id", 151655), top.size("video_token_id", 151656)
        top.take("vision_start_token_id", 151652), top.take("vision_end_token_id", 151653)
        tokens = "image_token_id video_token_id vision_start_token_id vision_end_token_id"
        where, copies = "config.json, text_config", {}
        if text is None:  # the flat shape: whatever is left at the top belongs to the decoder
            text, where = top.fields, "config.json"
        else:
            copies = top.drop_copies(text)  # 4.52 and later wrote the decoder's fields twice
            top.finish()

        def read(fields: dict[str, Any]) -> DecoderConfig:
            irrelevant = f"{tokens} vision_token_id spatial_merge_size"
            return decoder_from_hf(dict(fields), "qwen2_vl_text", tied, where, irrelevant)

        decoder = read(text)
        if copies:
            _check_copies(decoder, read, text, copies)
        width = vision.size("embed_dim", 1280)
        heads = vision.size("num_heads", 16)
        patch, frames = vision.size("patch_size", 14), vision.size("temporal_patch_size", 2)
        channels = vision.size("in_channels", vision.size("in_chans", 3))
        rope = vision.take("rope_parameters", None, dict) or {}
        if vision.take("hidden_size", 3584) != decoder.hidden_size:
            raise UserError(
                "The vision_config's hidden_size must equal the decoder's hidden_size, "
                f"{decoder.hidden_size}: the merger's output replaces token embeddings."
            )
        if width % heads:
            raise UserError(
                f"The vision_config has {heads} heads for a width of {width}: they must divide it."
            )
        if width // heads % 4:
            raise UserError(
                f"The vision_config has heads of {width // heads} numbers (embed_dim / num_heads); "
                f"they are turned in pairs by two positions, so it must be a multiple of 4."
            )
        vision.known.add("spatial_patch_size")
        shape = (channels, frames, patch, patch)
        number("patch_values", math.prod(shape), f"{vision.where} (channels x frames x size^2)")
        tower = Tower(
            depth=vision.size("depth", 32),
            width=width,
            num_heads=heads,
            intermediate_size=int(width * vision.positive("mlp_ratio", 4.0)),
            activation=vision.require("hidden_act", tuple(ACTIVATIONS), "quick_gelu"),
            theta=float(Fields(rope, vision.where).positive("rope_theta", 10000.0)),
            merge=vision.size("spatial_merge_size", 2),
            patch_values=math.prod(shape),
            patch_shape=shape,
        )
        vision.finish()
        return cls(decoder, tower, image, video)


def _check_copies(
    decoder: DecoderConfig,
    read: Callable[[dict[str, Any]], DecoderConfig],
    text: dict[str, Any],
    copies: dict[str, Any],
) -> None:
    """Raise where the top level's copies of nested fields would make another decoder.

    transformers reads the nested ones since 4.52 and the top level before. Where both describe
    one decoder, as a sliding window does that nothing uses, there is nothing to choose.
    """
    try:
        same = read({**text, **copies}) == decoder
    except UserError:
        same = False
    if not same:
        differ = ", ".join(
            f"'{name}' (as {value!r} and nested as {text[name]!r})"
            for name, value in copies.items()
        )
        raise UserError(
            f"The config.json gives {differ} twice, at the top and in text_config, and the two "
            f"describe different decoders. transformers reads text_config since 4.52 and the top "
            f"level before: delete the wrong ones."
        )


class Body(nn.Module):
    """`model` in the checkpoint: the tower and the decoder, named as there.

    features: a `Batch` of patches [B, P, C] to [B, P / merge^2, D].
    """

    cfg: Config
    dtype: Any
    lora: LoRAScale | None
    remat: str
    adapter: Bottleneck | None

    def setup(self) -> None:
        how = (self.dtype, self.lora, self.remat, self.adapter)
        self.visual = Visual(self.cfg.vision, self.cfg.text.hidden_size, *how)
        self.language_model = Decoder(self.cfg.text, *how)

    def features(self, batch) -> jax.Array:
        return self.visual(batch)


class Module(VisionLanguageModel):
    """Qwen2-VL, https://arxiv.org/abs/2409.12191: a `Batch` to float32 logits [B, T, V]."""

    def make_body(self) -> nn.Module:
        return Body(self.cfg, self.dtype, self.lora, self.remat, self.adapter)


def image_tokens(cfg: Config, grid_thw: tuple[int, int, int] | None) -> int:
    """Return how many placeholders an image or video of this grid (in patches) stands for."""
    assert grid_thw is not None
    t, h, w = (int(n) for n in grid_thw)
    return t * h * w // cfg.vision.merge**2


def _media(cfg: Config, tokens, kind: str, values, grids, token_id: int):
    """Return (patches [P, C], grids [I, 3], token slots) of one kind; raise where they disagree."""
    grids = np.zeros((0, 3), np.int64) if grids is None else np.asarray(grids, np.int64)
    grids = grids.reshape(-1, 3)
    values = np.zeros((0, cfg.vision.patch_values), np.float32) if values is None else values
    values, whole = np.asarray(values), cfg.vision.patch_values
    one_frame = values.dtype == np.uint8 and (whole // cfg.vision.patch_shape[1],)
    if values.shape[1:] not in ((whole,), one_frame):
        raise UserError(
            f"The pixel values of {kind}s must be [patches, {whole}]; they are "
            f"{list(values.shape)}. Take them from the checkpoint's own processor."
        )
    slots = np.flatnonzero(tokens == token_id)
    wanted = sum(image_tokens(cfg, tuple(grid)) for grid in grids)
    if len(slots) != wanted or len(values) != int(grids.prod(axis=1).sum()):
        raise UserError(
            f"An example holds {len(slots)} {kind} tokens and {len(values)} patches, but its "
            f"{len(grids)} {kind} grids {grids.tolist()} stand for {wanted} tokens and "
            f"{int(grids.prod(axis=1).sum())} patches. Tokens and images must agree exactly: check "
            f"that nothing was truncated and that pixel settings are the same on both sides."
        )
    return values, grids, slots


def layout(
    cfg: Config,
    tokens: np.ndarray,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    pixel_values_videos: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return one example's arrays of `Batch` beside its tokens; images first, then videos.

    tokens int [T] without padding; pixel_values [P, C] and grids [I, 3] as the reference's
    processor gives them, or bytes, of which one frame may stand for all. Raises `UserError` where
    placeholders and patches disagree.
    """
    images, image_grids, image_slots = _media(
        cfg, tokens, "image", pixel_values, image_grid_thw, cfg.image_token_id
    )
    videos, video_grids, video_slots = _media(
        cfg, tokens, "video", pixel_values_videos, video_grid_thw, cfg.video_token_id
    )
    image_index = np.full(len(tokens), -1, np.int32)
    image_index[image_slots] = np.arange(len(image_slots))
    image_index[video_slots] = len(image_slots) + np.arange(len(video_slots))
    grids = np.concatenate([image_grids, video_grids])
    merge = cfg.vision.merge
    return {
        "positions": mrope(
            tokens, image_grids, video_grids, merge, cfg.image_token_id, cfg.video_token_id
        ),
        "image_index": image_index,
        # Tens of megabytes: copied only where there are both.
        "patches": np.concatenate([images, videos])
        if len(images) and len(videos)
        else (videos if len(videos) else images),
        "patch_segments": vision_segments(grids),
        "patch_positions": vision_positions(grids, merge),
    }


def pixels(cfg: Config, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return [frames, height, width, channels] of one segment's patches [P, C], `layout`'s inverse.

    positions int [P, 2]: `patch_positions`. A still image fills all frames with the same pixels.
    """
    channels, frames, size, _ = cfg.vision.patch_shape
    height, width = (int(n) + 1 for n in positions.max(0))
    grid = np.zeros((height, width, channels, frames, size, size), patches.dtype)
    grid[positions[:, 0], positions[:, 1]] = patches.reshape(-1, channels, frames, size, size)
    return grid.transpose(3, 0, 4, 1, 5, 2).reshape(frames, height * size, width * size, channels)


def cell(cfg: Config) -> int:
    """Return the side in pixels of what one image feature sees."""
    return cfg.vision.patch_shape[-1] * cfg.vision.merge


def values_per_image(cfg: Config, grid_thw: tuple[int, int, int] | None) -> int:
    """Return how many rows of the processor's pixel_values one image or video takes."""
    assert grid_thw is not None
    return int(np.prod(grid_thw))


def merged_patches(cfg: Config) -> int:
    """Return how many patches of a row make one image feature."""
    return cfg.vision.merge**2


def patch_unit(cfg: Config) -> int:
    """Return what the number of patches of a row must be a multiple of."""
    return cfg.vision.merge**2


def patch_axes(cfg: Config) -> tuple[int, int, int]:
    """Return what the values of a patch are, outermost first: channels, frames, pixels of one."""
    channels, frames, height, width = cfg.vision.patch_shape
    return channels, frames, height * width


def holds_pixels(cfg: Config, positions: Any) -> Any:
    """Return which patch slots of an image hold pixels, by their `patch_positions` [..., 2]."""
    return positions[..., 0] >= 0


def stacks(cfg: Config) -> dict[str, int]:
    """Return the layers that are stacked in the tree: {prefix: number of layers}."""
    return {
        "model/visual/blocks": cfg.vision.depth,
        "model/language_model/layers": cfg.text.num_layers,
    }


def disk_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Return the convolutions: {path of the kernel: its shape on disk, outputs first}."""
    return {"model/visual/patch_embed/proj/kernel": (cfg.vision.width, *cfg.vision.patch_shape)}


def unused_parameters(cfg: Config) -> int:
    """Return how many parameters the reference has in the tensors of `UNUSED`: buffers are none."""
    return 0


# How a reference and a box are written, and what a picture's sides count as.
GROUNDING = (
    "<|object_ref_start|>{}<|object_ref_end|>",
    "<|box_start|>{}<|box_end|>",
    1000,
)
HAS_GRIDS = True  # each image has its own size
IMAGE_PROCESSOR = "Qwen2VLImageProcessor"  # what cuts it, in the reference
ARCHITECTURE = "Qwen2VLForConditionalGeneration"
# Parameter path -> component; first match wins.
COMPONENTS = [
    (r"model/visual/merger/.*", "projector"),
    (r"model/visual/.*", "vision"),
    (r"model/language_model/embed_tokens/.*", "embeddings"),
    (r"model/language_model/.*", "language_model"),
    (r"lm_head/.*", "head"),
]
# Logical axes of the parameters; first match wins.
AXES = [
    (r"model/visual/.*/(qkv|fc1|0)/kernel", ("embed", "wide")),
    (r"model/visual/.*/(proj|fc2|2)/kernel", ("wide", "embed")),
    (r"model/visual/.*(scale|bias)", (None,)),
    *DECODER_AXES,
]
# Any layout of tensor names in use -> the current one; every row is applied, in order.
RENAMES = [
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
]
# Tensors that the computation never reads; kept on export.
UNUSED = [r".*rotary_emb\.inv_freq", r".*rotary_pos_emb\.inv_freq"]
# The modules of the projector and of the vision side, by the names PEFT uses.
PROJECTOR = "merger"
VISION = "visual"
