"""What a model family is: the sizes of one model and its family's facts, without JAX.

A family is a frozen dataclass that derives from `Family`, one line in `MODELS`, and a Linen module,
which `MODULE` names. The data side needs the former alone and never imports the latter.
Letters: T tokens, P patches, C values a patch, I images.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np

from vlm_jax.batch import Batch, Example, collate
from vlm_jax.models.decoder_config import DecoderConfig
from vlm_jax.trees import match

Grid = tuple[int, int, int] | None  # frames, height, width in patches; None where all have one size
# The names that a Hugging Face processor gives to the pixels and the grids of a kind of media.
NAMES_OF_MEDIA = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


class Grounding(NamedTuple):
    """How texts name an object and a box, and what a picture's sides count as there.

    side: None: the pixels that the model sees, after resizing. point, between: of a box's corners.
    """

    ref: str
    box: str
    side: int | None
    point: str = "({},{})"
    between: str = ","


@dataclasses.dataclass(frozen=True)
class TowerSizes:
    """What every vision tower has, read for estimates and adapters.

    depth: blocks. patch_shape: channels, frames where a patch has several, height, width. BLOCKS,
    CONVOLUTION: where its stacked blocks and its kernel on patches lie, below the tower's module.
    """

    BLOCKS: ClassVar[str]
    CONVOLUTION: ClassVar[str]

    width: int
    intermediate_size: int
    num_heads: int
    depth: int
    patch_shape: tuple[int, ...]
    activation: str

    @property
    def gated(self) -> bool:
        """Whether its blocks' MLPs have a gate."""
        return False


def components(vision: str, projector: str, text: str = "language_model") -> list[tuple[str, str]]:
    """Return `Family.COMPONENTS` of modules by their paths in `model`."""
    return [
        (f"model/{projector}/.*", "projector"),
        (f"model/{vision}/.*", "vision"),
        (f"model/{text}/embed_tokens/.*", "embeddings"),
        (f"model/{text}/.*", "language_model"),
        ("lm_head/.*", "head"),
    ]


@dataclasses.dataclass(frozen=True)
class Family(Protocol):
    """One model of a family: its sizes as fields, hashable; what else it must tell as members.

    A name without a value or body is required: mypy refuses a class in `MODELS` that lacks one.
    """

    text: DecoderConfig
    vision: TowerSizes
    image_token_id: int
    video_token_id: int | None  # None: a family without video

    MODULE: ClassVar[str]  # "package.module:Class", a `VisionLanguageModel` made of this config
    TEXT: ClassVar[str] = "language_model"  # the decoder's attribute in `model`
    # The modules of the projector and of the vision side, by the names PEFT uses.
    PROJECTOR: ClassVar[str]
    VISION: ClassVar[str]
    # Parameter path -> vision, projector, embeddings, language_model or head; first match wins.
    COMPONENTS: ClassVar[Sequence[tuple[str, str]]]
    # Parameter path -> logical axes that are sharded (`sharding.py`), the decoder's left out; first
    # match wins.
    AXES: ClassVar[Sequence[tuple[str, tuple[str | None, ...]]]]
    # Any layout of tensor names in use -> the current one; every row is applied, in order.
    RENAMES: ClassVar[Sequence[tuple[str, str]]] = ()
    UNUSED: ClassVar[Sequence[str]] = ()  # tensors that nothing reads; kept on export
    # The last products of blocks, by module: their results are only added.
    LAST: ClassVar[Sequence[str]] = ("down_proj", "fc2")
    BEHIND: ClassVar[str] = r".*/(post_layernorm|norm)/.*"  # of a tower, what follows its blocks
    VIDEO_PROCESSOR: ClassVar[str] = "Qwen2VLVideoProcessor"  # where no file names one
    # What a Hugging Face processor returns of each video beside its pixels and grid.
    OF_VIDEOS: ClassVar[Sequence[str]] = ()
    HAS_GRIDS: ClassVar[bool]  # whether images differ in size, so that each brings a `Grid`
    GROUNDING: ClassVar[Grounding | None] = None  # None: nothing is agreed on
    # What the chat template writes for an image; None: the placeholder itself.
    IMAGE_MARK: ClassVar[str | None] = None
    # Whether tokens of a run of image features attend to all of it.
    FEATURES_SEE_BOTH_WAYS: ClassVar[bool] = False
    # Learned rows that the module puts behind a row's features; `image_index` -2 is the last one.
    LEARNED_FEATURES: ClassVar[int] = 0
    KNOWN: ClassVar[Mapping[str, dict[str, Any]]] = {}  # hub id -> its config.json
    KNOWN_IMAGES: ClassVar[Mapping[str, Any]] = {}  # the limits in their image settings

    @classmethod
    @abstractmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Return the sizes in a config.json. Raises `UserError` for a field it does not know."""

    @property
    @abstractmethod
    def patch_unit(self) -> int:
        """What the number of patches of a row must be a multiple of."""

    @abstractmethod
    def layout(self, tokens: np.ndarray, media: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return one example's arrays of `Batch` beside its tokens, int [T] without padding.

        media: what a Hugging Face processor returns of the example beside its tokens, by its names;
        pixels may be bytes. Returned: positions, image_index, patches, patch_segments,
        patch_positions. Raises `UserError` where placeholders and media disagree.
        """

    @abstractmethod
    def pixels(self, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return [frames, height, width, channels] of one segment's patches [P, C].

        The inverse of `layout`; positions: their `patch_positions`.
        """

    @property
    @abstractmethod
    def cell(self) -> int:
        """The side in pixels of what one image feature sees."""

    # What most families have alike.

    def image_patches(self, grid: Grid = None) -> int:
        """Return how many patch slots of a row an image or video takes."""
        return self.patch_unit if grid is None else math.prod(int(n) for n in grid)

    def image_tokens(self, grid: Grid = None) -> int:
        """Return how many placeholders an image or video stands for."""
        return self.features(self.image_patches(grid))

    def written(self, kind: str, grid: Grid, times: Sequence[float]) -> Sequence[str | int]:
        """Return what stands in a text for a medium: words, and numbers of its placeholders.

        kind: "image" or "video". times: of a video, the seconds at which each frame was taken.
        """
        return [self.image_tokens(grid)]

    def values_per_image(self, grid: Grid = None) -> int:
        """Return how many rows of the processor's pixel_values an image or video takes."""
        return self.image_patches(grid) if self.HAS_GRIDS else 1

    @property
    def added_features(self) -> int:
        """In how many of the decoder's first layers further features are added."""
        return 0

    @property
    def projectors(self) -> tuple[str, ...]:
        """The projector's modules as PEFT is to hold them in full."""
        return (self.PROJECTOR,)

    @property
    def unit_features(self) -> int:
        """How many features the tower makes of `patch_unit` patches."""
        return 1

    @property
    def patch_axes(self) -> tuple[int, int, int]:
        """What the values of a patch are, outermost first: channels, frames, pixels of one."""
        channels, *frames, height, width = self.vision.patch_shape
        return channels, math.prod(frames), height * width

    @property
    def stacks(self) -> dict[str, int]:
        """The layers that are stacked in the tree: {prefix: number of layers}."""
        return {
            f"model/{self.VISION}/{self.vision.BLOCKS}": self.vision.depth,
            f"model/{self.TEXT}/layers": self.text.num_layers,
        }

    @property
    def disk_shapes(self) -> dict[str, tuple[int, ...]]:
        """The convolutions: {path of the kernel: its shape on disk, outputs first}."""
        shape = (self.vision.width, *self.vision.patch_shape)
        return {f"model/{self.VISION}/{self.vision.CONVOLUTION}/kernel": shape}

    def holds_pixels(self, positions: Any) -> Any:
        """Return which patch slots of an image hold pixels, by `patch_positions` of one number."""
        return positions >= 0

    @property
    def image_settings(self) -> dict[str, Any] | None:
        """What image settings must say at least for this model; None where images have one size."""
        return None

    @property
    def unused_parameters(self) -> int:
        """How many parameters the reference has in the tensors of `UNUSED`: buffers are none."""
        return 0

    @property
    def vision_layers(self) -> int:
        """How many blocks of the tower run."""
        return self.vision.depth

    def attended_patches(self, patches: int) -> int:
        """Return how many patches each one is compared with, in a row of so many."""
        return patches

    @property
    def embedding(self) -> str:
        """The path of the token embedding."""
        return f"model/{self.TEXT}/embed_tokens"

    def features(self, patches: int) -> int:
        """Return how many features the tower makes of so many patches of a row."""
        return patches // self.patch_unit * self.unit_features

    def patches_of(self, features: int) -> int:
        """Return how many patches so many features of the tower are made of."""
        return features * self.patch_unit // self.unit_features

    def component(self, path: str) -> str:
        """Return vision, projector, language_model, embeddings or head: what owns a parameter."""
        return match(self.COMPONENTS, [path], "component table", unused="allow")[path]

    @property
    def projector_in_tower(self) -> bool:
        """Whether the projector is a part of the vision module, and is saved with it."""
        inside = f"model/{self.VISION}/"
        return any(n == "projector" and p.startswith(inside) for p, n in self.COMPONENTS)

    @property
    def empty_example(self) -> Example:
        """An example of no tokens: it tells `collate` the shapes of this family."""
        none = np.zeros(0, np.int32)
        return {"tokens": none, "weights": np.zeros(0, np.float32), **self.layout(none, {})}

    def collate(
        self,
        rows: Sequence[Sequence[Example]],
        length: int,
        patches: int,
        pixels: Any = np.float32,
        padded: bool = True,
        still: bool = False,
    ) -> Batch:
        """Return a numpy `Batch`, patches of dtype `pixels`; see `vlm_jax.batch.collate`.

        still: the examples' patches hold one frame, for all that they have.
        """
        like = self.empty_example
        if still:
            channels, _, size = self.patch_axes
            like["patches"] = np.zeros((0, channels * size), pixels)
        return collate(rows, length, patches, like, self.features, pixels, padded)
