"""Decoding of 4-bit codes: one implementation a kind of hardware, by one table.

A tree of selects keeps the vector units of a TPU busy where a look-up stalls them (on a 28-layer
step of 7B parameters 0.92 against 1.10 s by the compiler's cycles); on a GPU the look-up needs
less memory; on a CPU the tree is five times as fast.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def select(codes: jax.Array, values: Sequence[float]) -> jax.Array:
    """Return float32 `values[codes]` by a tree of 15 selects on four shared masks."""
    bits = codes.astype(jnp.int32)
    level = [jnp.float32(value) for value in values]
    for bit in range(4):
        mask = (bits & (1 << bit)) != 0
        level = [
            jnp.where(mask, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def lookup(codes: jax.Array, values: Sequence[float]) -> jax.Array:
    """Return float32 `values[codes]` by indexing a table."""
    table = jnp.asarray(np.asarray(values, np.float32))
    return table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, Sequence[float]], jax.Array]] = {
    "select": select,
    "lookup": lookup,
}
# Platform -> implementation; whatever is not named here takes the default.
PLATFORMS = {"cuda": "lookup", "rocm": "lookup"}
DEFAULT = "select"

_override: list[str] = []


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Decode by this implementation whatever is traced inside, on every platform."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown decode '{name}'; known: {', '.join(IMPLEMENTATIONS)}.")
    _override.append(name)
    try:
        yield
    finally:
        _override.pop()


def decode(codes: jax.Array, values: Sequence[float]) -> jax.Array:
    """Return float32 `values[codes]`, chosen by the platform that the program is compiled for."""
    if _override:
        return IMPLEMENTATIONS[_override[-1]](codes, values)
    branches = {
        platform: lambda codes, name=name: IMPLEMENTATIONS[name](codes, values)
        for platform, name in PLATFORMS.items()
    }
    return jax.lax.platform_dependent(
        codes, default=lambda codes: IMPLEMENTATIONS[DEFAULT](codes, values), **branches
    )
