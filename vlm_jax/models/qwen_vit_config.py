"""The sizes of the Qwen line's ViT, and patches as its image processors cut them.

`qwen_vit` computes with them.
"""

import dataclasses
import math
from typing import Any

from vlm_jax.errors import UserError, refuse
from vlm_jax.files.limits import number
from vlm_jax.models.family import TowerSizes
from vlm_jax.models.hf_config import Fields


@dataclasses.dataclass(frozen=True)
class Tower(TowerSizes):
    """Sizes of the vision tower; patch_values = channels x frames x size x size.

    norm: "layer" or "rms". mlp: the names of its layers, three for a gated one. patch_bias: whether
    patches are embedded with a bias. window: the side of the windows that blocks attend in, in
    merged patches, 0 for none; full: the blocks that attend to a whole frame all the same. table:
    the side of a learned table of positions, 0 for none. added: the blocks whose outputs are merged
    too, and added in the decoder's first layers.
    """

    BLOCKS = "blocks"
    CONVOLUTION = "patch_embed/proj"

    theta: float
    merge: int
    patch_values: int
    norm: str = "layer"
    mlp: tuple[str, ...] = ("fc1", "fc2")
    patch_bias: bool = False
    window: int = 0
    full: tuple[int, ...] = ()
    table: int = 0
    added: tuple[int, ...] = ()

    @property
    def gated(self) -> bool:
        return len(self.mlp) == 3

    @property
    def full_blocks(self) -> list[bool]:
        """Whether each block attends to whole frames."""
        return [n in self.full for n in range(self.depth)]


def vision_fields(top: Fields) -> Fields:
    """Return the fields of a vision_config. A tower has no head to tie, whatever a default says."""
    given = top.take("vision_config", kind=dict)
    return Fields(given, "config.json, vision_config", "spatial_patch_size tie_word_embeddings")


def common_sizes(
    vision: Fields, width: int, heads: int, names: str, depth: int = 32, patch: int = 14
) -> dict[str, Any]:
    """Return the sizes that every `Tower` of the line has, by name, beside its MLP's.

    names: what of the vision_config a head's width is, for errors. depth, patch: the blocks, and a
    patch's side in pixels, where the config leaves them out. Raises `UserError` where
    2-D rotary positions do not fit.
    """
    refuse(
        (
            width % heads,
            f"The vision_config has {heads} heads for a width of {width}: they must divide it.",
        ),
        (
            width // heads % 4,
            f"The vision_config has heads of {width // heads} numbers ({names}); they are turned "
            f"in pairs by two positions, so it must be a multiple of 4.",
        ),
    )
    side, frames = vision.size("patch_size", patch), vision.size("temporal_patch_size", 2)
    channels = vision.size("in_channels", vision.size("in_chans", 3))
    shape = (channels, frames, side, side)
    number("patch_values", math.prod(shape), f"{vision.where} (channels x frames x size^2)")
    rope = Fields(vision.take("rope_parameters", None, dict) or {}, vision.where)
    rope.require("rope_type", ("axial", "default"), "axial")
    return {
        "num_heads": heads,
        "depth": vision.size("depth", depth),
        "merge": vision.size("spatial_merge_size", 2),
        "theta": float(rope.positive("rope_theta", 10000.0)),
        "patch_shape": shape,
        "patch_values": math.prod(shape),
    }


def check_output(name: str, given: int, width: int) -> None:
    """Raise `UserError` where what a tower's projector gives is not as wide as the decoder."""
    if given != width:
        raise UserError(
            f"The vision_config's {name} must equal the decoder's hidden_size, {width}: the "
            f"merger's output replaces token embeddings."
        )
