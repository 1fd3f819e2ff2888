"""NF4 kernels: quantize, dequantize, conversion to bitsandbytes' arrays."""

from typing import Any

import jax

from vlm_jax.weights import NF4, FourBit, dense
from vlm_jax.weights.bnb import to_bnb
from vlm_jax.weights.packing import restored, storable
from vlm_jax.weights.quantize import quantize as _quantize

__all__ = ["NF4", "dequantize", "quantize", "restored", "storable", "to_bnb"]


def quantize(kernel: Any, block: int = 64, double: bool = True) -> FourBit:
    """Return a kernel [in, out], or a stack [L, in, out], as an `NF4` leaf.

    numpy arrays, and JAX's on the CPU, give bitsandbytes' very bits for the weight [out, in]; under
    `jit` and on accelerators subnormal numbers count as zero. double: store the scales in 8 bits
    too. Raises `UserError` for inf or NaN and for a block size that bitsandbytes does not know.
    """
    return _quantize(NF4, kernel, block, double)


def dequantize(leaf: FourBit, dtype: Any = "float32") -> jax.Array:
    """Return the kernel of a leaf: float32 code times float32 scale, rounded to `dtype`."""
    return dense(leaf, dtype)
