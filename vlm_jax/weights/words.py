"""4-bit kernels as a TPU decodes them: eight codes to a word, nested scales by column.

Nibble 2 g + p of the word in row 8 b + s of a column is the code of that column's row
64 b + 16 g + 2 s + p. Each pair of nibbles (2 g, 2 g + 1) of eight words is then a register of
sixteen bfloat16 rows: its halves hold neighbouring rows, and no value changes its sublane.

  words [in / 8, out], one column:  word 0 holds the rows 0, 1, 16, 17, 32, 33, 48, 49,
                                    word 1 the rows 2, 3, 18, 19, ..., word 8 the rows 64, 65, ...

An 8-bit scale's own scale depends on its place in the flattened weight. A column of few blocks
meets few of them: they lie as float32 [runs, out], so that nothing is gathered. The functions take
arrays of NumPy or JAX.
"""

from typing import Any

import numpy as np

from vlm_jax.weights import dynamic8

BLOCK = 64  # rows whose codes lie in eight words of a column
CODES = 8  # of a word
LANES = 128  # of a register: a column tile's unit


def fits(inputs: int, outputs: int, block: int) -> bool:
    """Return whether a kernel [in, out] in blocks of this size may lie in words."""
    return block == BLOCK and inputs % BLOCK == 0 and outputs % LANES == 0


def to_words(codes: Any) -> Any:
    """Return int32 [..., in / 8, out] of codes [..., in, out] of any integer type."""
    *layers, inputs, outputs = codes.shape
    blocks = codes.reshape(*layers, inputs // BLOCK, BLOCK, outputs)
    words: Any = 0
    for nibble in range(CODES):
        first = 16 * (nibble // 2) + nibble % 2
        codes = blocks[..., first : first + 16 - nibble % 2 : 2, :].astype(np.int32)
        words = words | (codes << (4 * nibble))
    return words.reshape(*layers, inputs // CODES, outputs)


def from_words(words: Any) -> Any:
    """Return int32 codes [..., in, out] of `to_words`' words."""
    *layers, rows, outputs = words.shape
    parts = words.reshape(*layers, rows // 8, 1, 8, 1, outputs)
    nibble = np.arange(CODES, dtype=np.int32).reshape(4, 1, 2, 1)
    shift = 4 * nibble.reshape(*[1] * (len(layers) + 1), *nibble.shape)
    return ((parts >> shift) & 15).reshape(*layers, rows * CODES, outputs)


def runs(blocks: int, columns: int) -> np.ndarray:
    """Return int32 [runs, out]: the nested scales that each column's blocks meet, in order.

    blocks: of a column. Columns that meet fewer name the next, or the last, once more.
    """
    first = np.arange(columns, dtype=np.int32) * blocks // dynamic8.BLOCK
    most = 1 + (blocks + dynamic8.BLOCK - 2) // dynamic8.BLOCK
    last = -(-blocks * columns // dynamic8.BLOCK) - 1
    return np.minimum(first[None, :] + np.arange(most, dtype=np.int32)[:, None], last)


def by_column(nested: Any, blocks: int, columns: int) -> Any:
    """Return float32 [..., runs, out] of nested scales [..., n]."""
    return nested[..., runs(blocks, columns)]


def from_columns(nested: Any, blocks: int) -> Any:
    """Return the nested scales [..., n] of `by_column`."""
    columns = nested.shape[-1]
    index = np.arange(-(-blocks * columns // dynamic8.BLOCK), dtype=np.int32)
    column = index * dynamic8.BLOCK // blocks  # that its first block lies in
    return nested[..., index - column * blocks // dynamic8.BLOCK, column]
