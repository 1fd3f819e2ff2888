"""Blocks of a quantized array: runs along PyTorch's flattened weight, in our layout.

bitsandbytes cuts a tensor into blocks of equal length along its row-major order. Our matrices are
its transposes ([in, out] against [out, in]) and stacked over layers; most of the time a block is
nevertheless a stretch of one axis, so that nothing has to be transposed or gathered.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.trees import Table, match

# By path: how many trailing axes are one tensor of PyTorch's, and whether it is transposed there.
TENSORS: Table = [
    (r"(.*/)?(kernel|lora_A|lora_B)", (2, True)),
    (r"(.*/)?(embedding|added)", (2, False)),
    (r".*", (1, False)),
]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A view of an array in which each block is a stretch of `axis`.

    shape: of the array, any layer axis in front. size: elements of a block. rank: how many
    trailing axes are one tensor; blocks never reach from one tensor into the next. transposed:
    whether PyTorch holds the last two the other way round.

    Kernel [L, in, out], `size` divides in (a block runs down a column):  [L, in/size, size, out]
    Embedding [V, D], `size` divides D (a block is a part of a row):      [V, D/size, size]
    Any other, flattened as PyTorch does, padded with zeros to n blocks:  [L, n, size]
    """

    shape: tuple[int, ...]
    size: int
    rank: int
    transposed: bool

    @classmethod
    def of(cls, path: str, shape: tuple[int, ...], size: int) -> "Blocks":
        """Return the blocks of the parameter that lies at `path`."""
        rank, transposed = match(TENSORS, [path], "tensor table", unused="allow")[path]
        rank = min(rank, len(shape))
        return cls(tuple(shape), size, rank, transposed and rank == 2)

    @property
    def tensor_size(self) -> int:
        """Elements of one of PyTorch's tensors, of which the array may stack several."""
        return math.prod(self._tensor)

    @property
    def whole(self) -> bool:
        """Whether blocks are stretches of an axis as it lies, without padding."""
        return self._tensor[-2 if self.transposed else -1] % self.size == 0

    @property
    def axis(self) -> int:
        """The view's axis of length `size`, counted from the end."""
        return -2 if self.whole and self.transposed else -1

    @property
    def origin(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the view, the array's axes that it is cut from (of `axis`: none)."""
        axes = [(axis,) for axis in range(len(self.shape))]
        lead = len(self._stack)
        if not self.whole:
            return (*axes[:lead], tuple(range(lead, len(axes))), ())
        return (*axes[:-1], (), axes[-1]) if self.transposed else (*axes, ())

    def view(self, x: Any) -> Any:
        """Return the array, NumPy's or JAX's, as its view."""
        if self.whole:
            at = len(self.shape) - (2 if self.transposed else 1)  # the axis that blocks run along
            before, (length, *after) = self.shape[:at], self.shape[at:]
            return x.reshape(*before, length // self.size, self.size, *after)
        if self.transposed:
            x = x.swapaxes(-2, -1)
        x = x.reshape(*self._stack, self.tensor_size)
        short = -self.tensor_size % self.size
        if short:
            pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
            x = pad(x, [(0, 0)] * len(self._stack) + [(0, short)])
        return x.reshape(*self._stack, -1, self.size)

    def restore(self, view: Any) -> Any:
        """Return the array of a view of it."""
        if self.whole:
            return view.reshape(self.shape)
        flat = view.reshape(*self._stack, -1)[..., : self.tensor_size]
        if not self.transposed:
            return flat.reshape(self.shape)
        rows, columns = self._tensor
        return flat.reshape(*self._stack, columns, rows).swapaxes(-2, -1)

    @property
    def _tensor(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.rank :]

    @property
    def _stack(self) -> tuple[int, ...]:
        return self.shape[: len(self.shape) - self.rank]
