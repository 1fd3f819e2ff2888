"""Block-wise 4-bit weights: layout in memory, construction, decoding.

QLoRA, https://arxiv.org/abs/2305.14314, section 3, in bitsandbytes' format, bit for bit. A kernel
[in, out] is bitsandbytes' weight [out, in]; runs of `block` values along that weight, flattened by
rows, share one scale, the largest magnitude among them. Double quantization stores the scales less
their mean as 8-bit dynamic codes, of which 256 share a scale in turn.

In memory codes are uint4 [in, out], which needs no unpacking. Where `block` divides `in`, a block
lies along one column and scales are [in / block, out]; otherwise blocks run over the ends of
columns and scales are flat. Stacked layers lead with the layer axis in every array. On a TPU codes
lie in words instead where they can: see `words`.
"""

import dataclasses
import math
import operator
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from vlm_jax.weights import dynamic8, words
from vlm_jax.weights.decode import decode, decode_scales, decode_words, lookup

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes knows

Format = TypeVar("Format", bound="type[FourBit]")


@dataclasses.dataclass(frozen=True)
class FourBit:
    """A kernel [in, out] in 4-bit codes, or one a layer [L, in, out]; a pytree.

    codes: uint4 [in, out]. absmax: float32, or uint8 where doubly quantized: [in / block, out],
    or [ceil(in * out / block)] where block does not divide `in`. nested: float32
    [ceil(blocks / 256)] and offset: float32 [] of double quantization, else None.
    dtype: what was quantized, and what bitsandbytes decodes to. used: how codes and scales lie on
    a mesh while the kernel is decoded (gathered from the devices that share one copy), or None.
    in_words: whether codes are int32 [in / 8, out] of eight each and nested is by column,
    [runs, out], as `words` has them. Shape and values are those of the leaf in the other layout.
    """

    VALUES: ClassVar[tuple[float, ...]]  # of the 16 codes
    NAME: ClassVar[str]  # bitsandbytes' quant_type
    PADDING: ClassVar[int]  # the code that fills the last byte

    codes: Any
    absmax: Any
    nested: Any = None
    offset: Any = None
    block: int = 64
    dtype: str = "float32"
    used: tuple[NamedSharding, NamedSharding] | None = None
    in_words: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        *layers, rows, outputs = self.codes.shape
        return (*layers, rows * words.CODES if self.in_words else rows, outputs)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def double(self) -> bool:
        return self.nested is not None

    @property
    def aligned(self) -> bool:
        """Whether no block runs over the end of a column."""
        return self.shape[-2] % self.block == 0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, two codes to a byte."""
        rest = jax.tree.leaves((self.absmax, self.nested, self.offset))
        sizes = (math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in rest)
        return (math.prod(self.shape) + 1) // 2 + sum(sizes)

    def layer(self, index: int | None) -> "FourBit":
        """Return one layer of a stack; of a leaf that is not a stack (None), itself."""
        return self if index is None else jax.tree.map(lambda array: array[index], self)

    def to_words(self) -> "FourBit":
        """Return the leaf with its codes in words; its `shape` must allow it."""
        if self.in_words:
            return self
        codes, nested = words.to_words(self.codes), self.nested
        if self.double:
            nested = words.by_column(nested, *self.absmax.shape[-2:])
        return dataclasses.replace(self, codes=codes, nested=nested, in_words=True)

    def from_words(self) -> "FourBit":
        """Return the leaf with a uint4 code an element."""
        if not self.in_words:
            return self
        codes, nested = words.from_words(self.codes).astype(jnp.uint4), self.nested
        if self.double:
            nested = words.from_columns(nested, self.absmax.shape[-2])
        return dataclasses.replace(self, codes=codes, nested=nested, in_words=False)

    def scales(self) -> jax.Array:
        """Return the float32 scales of one layer, in the shape of `absmax`."""
        if not self.double:
            return self.absmax
        values = dynamic8.dynamic_map(signed=True)
        code = (
            decode_scales(self.absmax, values, self.used)
            if self.in_words
            else lookup(self.absmax, values)
        )
        product = code * self._nested_scales()
        # Compilers would join the product and the sum into one operation with one rounding, which
        # is not what bitsandbytes gives. A select between the two keeps them apart.
        product = jnp.where(jnp.isnan(product), jnp.float32(jnp.nan), product)
        return product + self.offset

    def _nested_scales(self) -> jax.Array:
        """Return the scale of each 8-bit code, in a shape that meets `absmax`."""
        if not self.aligned:
            blocks = math.prod(self.absmax.shape)
            return jnp.repeat(self.nested, dynamic8.BLOCK, total_repeat_length=blocks)
        # Column o holds the flat blocks [o * rows, (o + 1) * rows): the runs of 256 that it meets
        # are few, so a row of `out` values for each of them, and a select, do without a gather
        # of every scale.
        rows, columns = self.absmax.shape
        nested = self.nested if self.in_words else words.by_column(self.nested, rows, columns)
        first = np.arange(columns, dtype=np.int32) * rows % dynamic8.BLOCK
        place = jnp.arange(rows, dtype=jnp.int32)[:, None]
        scales = jnp.broadcast_to(nested[:1], (rows, columns))
        for i in range(1, nested.shape[0]):  # the column's later runs begin at these of its rows
            begin = i * dynamic8.BLOCK - first
            scales = jnp.where(place >= begin[None, :], nested[i : i + 1], scales)
        return scales

    def dense(self, dtype: Any) -> jax.Array:
        """Return the kernel: float32 code times float32 scale, rounded to `dtype`."""
        if self.ndim > 2:
            if self.in_words:  # a layer at a time: kernels take no stacks
                return jax.lax.map(lambda layer: layer.dense(dtype), self)
            return jax.vmap(lambda layer: layer.dense(dtype))(self)
        leaf = self if self.used is None else self._gathered(self.used)
        scales = leaf.scales()
        if leaf.in_words:
            return decode_words(leaf.codes, scales, leaf.VALUES, dtype, self.used)
        inputs, outputs = leaf.shape
        if leaf.aligned:
            shape = (inputs // leaf.block, leaf.block, outputs)
            scales = jnp.broadcast_to(scales[:, None, :], shape).reshape(inputs, outputs)
        else:
            first = jnp.arange(outputs, dtype=jnp.int32) * inputs
            place = first[None, :] + jnp.arange(inputs, dtype=jnp.int32)[:, None]
            scales = scales.at[place // leaf.block].get(mode="promise_in_bounds")
        kernel = (decode(leaf.codes, leaf.VALUES) * scales).astype(dtype)
        if self.used is not None:
            kernel = jax.lax.with_sharding_constraint(kernel, self.used[0])
        return kernel

    def _gathered(self, used: tuple[NamedSharding, NamedSharding]) -> "FourBit":
        # The barrier keeps the compiler from decoding first and moving 16-bit weights.
        constrain = jax.lax.with_sharding_constraint
        codes, absmax = jax.lax.optimization_barrier(
            (constrain(self.codes, used[0]), constrain(self.absmax, used[1]))
        )
        return dataclasses.replace(self, codes=codes, absmax=absmax)


@jax.jit
def _to_words(leaf: FourBit) -> FourBit:
    # A layer at a time: codes are unpacked in between.
    return jax.lax.map(FourBit.to_words, leaf) if leaf.ndim > 2 else leaf.to_words()


def in_words(leaf: FourBit) -> FourBit:
    """Return a leaf, of arrays or of shapes, with its codes in words."""
    if isinstance(leaf.codes, jax.ShapeDtypeStruct):
        return jax.eval_shape(_to_words, leaf)
    return _to_words(leaf)


def register(format: Format) -> Format:
    """Make a format a pytree; used as a decorator.

    Not with `register_dataclass`: JAX takes two classes of it with equal fields for one structure,
    so that a program compiled for one format may be run for the other.
    """
    data, meta = ("codes", "absmax", "nested", "offset"), ("block", "dtype", "used", "in_words")
    keys = [jax.tree_util.GetAttrKey(name) for name in data]
    arrays, settings = operator.attrgetter(*data), operator.attrgetter(*meta)
    jax.tree_util.register_pytree_with_keys(
        format,
        lambda leaf: (zip(keys, arrays(leaf), strict=True), settings(leaf)),
        lambda settings, arrays: format(*(*arrays, *settings)),
        lambda leaf: (arrays(leaf), settings(leaf)),
    )
    return format
