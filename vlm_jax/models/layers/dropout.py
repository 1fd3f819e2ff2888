"""Dropout: masks from a counter's hash, which the backward pass recomputes, or from JAX's threefry.

The hash takes a TPU as long as no dropout at all (bits of [2048, 18944]: 0.71 M cycles by its
compiler, 0.70 without, threefry 1.27), and nothing of it is stored. It depends on a place's number
in the whole array, so that no mask depends on how arrays are spread over devices.
"""

import hashlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

STREAM = "dropout"  # the rng's name
GOLDEN = 0x9E3779B1  # odd, near 2^32 / golden ratio: neighbouring columns differ in all bits


def mixed(h: jax.Array) -> jax.Array:
    """Return uint32 of the same shape: MurmurHash3's finaliser, in which each bit of h flips each
    bit of the result in half of all cases (https://github.com/aappleby/smhasher, MurmurHash3.cpp).
    """
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def hashed_keep(seed: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Return bool `shape`, True with probability 1 - rate: the same for the same seed, uint32 [2].

    Each row, of all axes but the last, has a hash of its own, and each place the hash of that and
    its column. rate: in [0, 1), exact to 2^-32.
    """
    *lead, width = shape
    rows = (*lead, 1)
    row = jnp.full(rows, seed[0])
    for axis in range(len(lead)):
        row = mixed(row ^ jax.lax.broadcasted_iota(jnp.uint32, rows, axis))
    columns = (1,) * len(lead) + (width,)
    column = jax.lax.broadcasted_iota(jnp.uint32, columns, len(lead)) * jnp.uint32(GOLDEN)
    return mixed(row ^ (column + seed[1])) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def seed_of(module: nn.Module) -> jax.Array:
    """Return uint32 [2] of a module's dropout rng: another one for each module, call and key.

    As `make_rng`, but that the module's path is hashed into the key's words by `mixed`, and not by
    threefry: in a stack of layers nothing of threefry stands inside the blocks.
    """
    scope = module.scope
    assert scope is not None
    scope.rng_counters[STREAM] += 1
    rng = scope.rngs[STREAM]
    path = "/".join(map(str, (*rng.suffix, scope.rng_counters[STREAM])))
    digest = hashlib.sha256(path.encode()).digest()
    seeds = jnp.asarray([int.from_bytes(digest[at : at + 4]) for at in (0, 4)], jnp.uint32)
    for word in jax.random.key_data(rng.rng).reshape(-1):
        seeds = mixed(seeds ^ word)
    return seeds


def _hashed(module: nn.Module, shape: tuple[int, ...], rate: float) -> jax.Array:
    return hashed_keep(seed_of(module), shape, rate)


def _threefry(module: nn.Module, shape: tuple[int, ...], rate: float) -> jax.Array:
    return jax.random.bernoulli(module.make_rng(STREAM), 1.0 - rate, shape)


# training.dropout_rng -> what makes a mask: bool `shape` of (module, shape, rate), True is kept.
KEEP: dict[str, Callable[[nn.Module, tuple[int, ...], float], jax.Array]] = {
    "hashed": _hashed,
    "threefry": _threefry,
}


def dropped(module: nn.Module, x: jax.Array, rate: float, rng: str) -> jax.Array:
    """Return x with dropout where the module has an rng for it. rng: a key of `KEEP`."""
    if rate == 0 or not module.has_rng(STREAM):
        return x
    return jnp.where(KEEP[rng](module, x.shape, rate), x / (1.0 - rate), 0).astype(x.dtype)
