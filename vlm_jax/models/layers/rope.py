"""Rotary position embeddings: frequencies for every scaling in use, and their application.

Letters: B batch, T query, N heads, H head dim, A axes (1, or 3 for M-RoPE: time, height, width).
RoPE: https://arxiv.org/abs/2104.09864; M-RoPE: https://arxiv.org/abs/2409.12191, section 2.1.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.models.rope_config import Rope


def _plain_frequencies(theta: float, turned: int) -> np.ndarray:
    exponent = np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned)
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def _dynamic(rope: Rope, frequencies: np.ndarray, positions: Any) -> Any:
    """A traced value, which depends on the length."""
    length = jnp.maximum(jnp.max(positions) + 1, rope.max_position).astype(jnp.float32)
    stretch = rope.factor * length / rope.max_position - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.turned / (rope.turned - 2))
    exponent = np.arange(0, rope.turned, 2, dtype=np.float32) / np.float32(rope.turned)
    return 1.0 / theta**exponent


def _llama3(rope: Rope, frequencies: np.ndarray, positions: Any) -> np.ndarray:
    wavelength = 2 * math.pi / frequencies
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = np.where(wavelength > low, frequencies / rope.factor, frequencies)
    return np.where((wavelength <= low) & (wavelength >= high), blended, scaled).astype(np.float32)


def _yarn(rope: Rope, frequencies: np.ndarray, positions: Any) -> np.ndarray:
    """https://arxiv.org/abs/2309.00071, section 3.2: interpolate only the slow dimensions."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.turned * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.turned - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(rope.turned // 2, dtype=np.float32) - low) / width, 0, 1)
    return (frequencies / rope.factor * ramp + frequencies * (1 - ramp)).astype(np.float32)


def _proportional(rope: Rope, frequencies: np.ndarray, positions: Any) -> np.ndarray:
    """Of the whole head's frequencies the first turn, as many as the share says; others are 0."""
    turning = int(rope.partial_rotary_factor * rope.head_dim // 2)
    numbers = np.arange(rope.head_dim // 2)
    return np.where(numbers < turning, frequencies, 0).astype(np.float32) / np.float32(rope.factor)


def _attention_factor(rope: Rope) -> float:
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


# `Rope.kind` -> a function of it, the plain frequencies and positions to float32 [H/2].
SCALINGS: dict[str, Callable[[Rope, np.ndarray, Any], Any]] = {
    "default": lambda rope, plain, positions: plain,
    "linear": lambda rope, plain, positions: plain / np.float32(rope.factor),
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
}


def _angles(positions: Any, frequencies: Any) -> jax.Array:
    """Return [..., F] of positions [...] and frequencies [F].

    float32: at position 30,000 a bfloat16 angle is off by whole turns.
    """
    leading = (None,) * positions.ndim
    return positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[leading]


def _axes(rope: Rope) -> np.ndarray:
    """Return which axis, of time, height, width, each frequency turns with."""
    axes = np.arange(len(rope.mrope_section))
    if not rope.mrope_interleaved:
        return np.repeat(axes, rope.mrope_section)
    axis = np.zeros(rope.turned // 2, int)
    for a in axes[1:]:
        axis[a : len(axes) * rope.mrope_section[a] : len(axes)] = a
    return axis


def rope_angles(rope: Rope, positions: Any) -> tuple[Any, Any]:
    """Return `(cos, sin)`, float32 [B, T, H/2], of positions int [B, T] or [B, 3, T].

    H: what turns of a head. With three axes, `mrope_section` says how many frequencies turn with
    time, height, width.
    """
    plain = _plain_frequencies(rope.theta, rope.turned)
    angles = _angles(positions, SCALINGS[rope.kind](rope, plain, positions))
    if positions.ndim == 3:
        axis = _axes(rope)
        angles = jnp.stack([angles[:, a, :, i] for i, a in enumerate(axis)], axis=-1)
    factor = _attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def grid_angles(positions_BP2: Any, head_dim: int, theta: float) -> tuple[Any, Any]:
    """Return `(cos, sin)`, float32 [B, P, H/2], of 2-D patch positions (height, width).

    The first quarter of the head turns with the height, the second with the width.
    """
    angles_BP2F = _angles(positions_BP2, _plain_frequencies(theta, head_dim // 2))
    angles = angles_BP2F.reshape(*positions_BP2.shape[:2], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: Any, cos_BTF: Any, sin_BTF: Any, pairs: bool = False) -> Any:
    """Rotate the first 2 F numbers of each head, computed in float32; others stay as they are.

    pairs: neighbours turn together; else the halves, Hugging Face's convention.
    """
    turned = 2 * cos_BTF.shape[-1]
    x, rest = x_BTNH[..., :turned], x_BTNH[..., turned:]
    x = x.astype(jnp.float32)
    cos, sin = cos_BTF[:, :, None, :], sin_BTF[:, :, None, :]
    first, second = (x[..., ::2], x[..., 1::2]) if pairs else jnp.split(x, 2, axis=-1)
    both = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.stack(both, -1).reshape(x.shape) if pairs else jnp.concatenate(both, axis=-1)
    rotated = rotated.astype(x_BTNH.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
