"""Decoding of 4-bit codes: one implementation a kind of hardware, by one table.

A tree of selects keeps the vector units of a TPU busy where a look-up stalls them (on a 28-layer
step of 7B parameters 0.92 against 1.10 s by the compiler's cycles); on a GPU the look-up needs
less memory; on a CPU the tree is five times as fast. Codes in words have kernels of their own.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.weights import kernels
from vlm_jax.weights.words import BLOCK, from_words


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


def lookup(codes: jax.Array, values: Any) -> jax.Array:
    """Return float32 `values[codes]` by indexing a table. values: numbers, in any array."""
    table = jnp.asarray(values, jnp.float32)
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


# Platform -> kernel for codes in words, and for the 8-bit codes of their scales.
WORDS: dict[str, Callable[..., jax.Array]] = {"tpu": kernels.decode}
SCALES: dict[str, Callable[..., jax.Array]] = {"tpu": kernels.look_up}
# How codes and scales lie on a mesh, as `FourBit.used` has it.
Used = tuple[NamedSharding, NamedSharding] | None


def decode_words(
    words: jax.Array, scales: jax.Array, values: tuple[float, ...], dtype: Any, used: Used
) -> jax.Array:
    """Return the kernel [in, out] of `words` int32 [in / 8, out], scales float32 [in / 64, out]."""
    exact = jnp.dtype(dtype if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32)

    def plain(words: jax.Array, scales: jax.Array) -> jax.Array:
        return (decode(from_words(words), values) * jnp.repeat(scales, BLOCK, 0)).astype(exact)

    branches = {
        platform: functools.partial(kernel, values=values, dtype=exact)
        for platform, kernel in WORDS.items()
    }
    where = used and (used[0].mesh, (used[0].spec, used[1].spec), used[0].spec)
    return _each_shard(plain, branches, where)(words, scales).astype(dtype)


def decode_scales(codes: jax.Array, values: Any, used: Used) -> jax.Array:
    """Return float32 `values[codes]` of 8-bit codes [in / 64, out] of scales."""
    table = jnp.asarray(values, jnp.float32)
    where = used and (used[1].mesh, (used[1].spec, PartitionSpec()), used[1].spec)
    return _each_shard(lookup, SCALES, where)(codes, table)


def _each_shard(
    default: Callable[..., jax.Array], branches: Mapping[str, Any], where: Any
) -> Callable[..., jax.Array]:
    """Return a function by platform, run on each device's shard: the compiler cuts no kernel.

    where: (mesh, how the arguments lie there, how the result does); None: on one device.
    """

    def run(*arrays: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(*arrays, default=default, **branches)

    if where is None:
        return run
    mesh, given, made = where
    return jax.shard_map(run, mesh=mesh, in_specs=given, out_specs=made, check_vma=False)
