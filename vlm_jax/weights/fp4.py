"""FP4: a sign, two bits of exponent, one of fraction, as bitsandbytes defines it."""

from vlm_jax.weights.fourbit import FourBit, register


@register
class FP4(FourBit):
    NAME = "fp4"
    PADDING = 0
    VALUES = tuple(
        v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
    )
