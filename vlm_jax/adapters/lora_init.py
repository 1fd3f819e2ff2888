"""Initialisation of LoRA factors (PEFT's `init_lora_weights`): at random, or from the kernel.

A start at random leaves the model as it is: B is zero, or what A and B give is subtracted. A start
from a kernel W takes a part of it, A0 B0, into the matrices. PEFT then subtracts that part from W;
here W stays as the base's files have it, and `start_A` [in, R] and `start_B` [R, out], float32 and
never trained, are subtracted in the forward pass: W + s (A B - A0 B0). That is the same function
and the same gradients, a base shared with its files, and an adapter for the base as it is: of
twice the rank, [A, A0] [B, -B0]. Only 4-bit kernels are quantized again, of W - s A0 B0, for the
sake of which PiSSA is used on them (QPiSSA: what is left is smaller, and loses less).

PiSSA: https://arxiv.org/abs/2404.02948, equations 2 to 4; OLoRA: https://arxiv.org/abs/2406.01775;
LoftQ: https://arxiv.org/abs/2310.08659, algorithm 1 with one step, which leaves the codes alone.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError

# Those that take a part of the kernel, and those that fill up what 4 bits lost of it.
FROM_KERNEL = ("pissa", "olora")
FROM_LOSS = ("loftq",)
AT_RANDOM = ("true", "gaussian", "orthogonal")
# PEFT's others, and what each would need.
OTHERS = {
    "eva": "activations on data",
    "corda": "activations on data",
    "lora_ga": "gradients on data",
    "mica": "a frozen B",
    "false": "random B, by which the model would start away from the base",
}


def kind_of(init: bool | str) -> tuple[str, int | None]:
    """Return (name, subspace iterations or None) of a value of init_lora_weights.

    Raises `UserError` for an unknown one, and for PEFT's that are not implemented.
    """
    word = str(init).lower()
    found = re.fullmatch(r"pissa_niter_(\d+)", word)
    if found:
        return "pissa", int(found[1])
    if word not in (*AT_RANDOM, *FROM_KERNEL, *FROM_LOSS):
        lacks = f", which is not supported: it needs {OTHERS[word]}" if word in OTHERS else ""
        raise UserError(
            f"init_lora_weights is {init!r}{lacks}; it must be one of true, "
            f"{', '.join(AT_RANDOM[1:])}, pissa, pissa_niter_16 (any number of iterations), "
            f"olora, loftq."
        )
    return word, None


def starts_from_kernel(init: bool | str) -> bool:
    """Return whether matrices start with a part of their kernel, which these are left without."""
    return kind_of(init)[0] in FROM_KERNEL


def random_start(
    name: str, key: jax.Array, inputs: int, rank: int, outputs: int
) -> tuple[jax.Array, jax.Array]:
    """Return (A [in, R], B [R, out]) of "gaussian" or "orthogonal", as PEFT draws them.

    "orthogonal" has A B = 0 without either being zero; its rank must be even, else `UserError`.
    """
    one, two, three = jax.random.split(key, 3)
    if name == "gaussian":
        a = jax.random.normal(one, (inputs, rank), jnp.float32) / rank
        return a, jnp.zeros((rank, outputs), jnp.float32)
    if rank % 2:
        raise UserError(f"init_lora_weights='orthogonal' needs an even rank; it is {rank}.")
    basis = jnp.linalg.qr(jax.random.normal(one, (rank, rank), jnp.float32))[0]
    a = jax.random.normal(two, (inputs, rank // 2), jnp.float32) @ basis[0::2] / 10
    b = basis[1::2].T @ jax.random.normal(three, (rank // 2, outputs), jnp.float32) / 10
    return a, b


def singular_factors(
    matrix: jax.Array, rank: int, iterations: int | None, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (A [in, R], B [R, out]), of equal norms, whose product is the best of that rank.

    matrix: float32 [in, out]. iterations: of a randomized subspace (https://arxiv.org/abs/0909.4061,
    algorithm 4.4), close and far faster; None: exactly. R is `rank`, or the matrix's where less.
    """
    if iterations is None:
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    else:
        highest = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        wide = min(rank, *matrix.shape)
        subspace = jax.random.normal(key, (matrix.shape[1], wide), jnp.float32)
        basis = jnp.linalg.qr(highest(matrix, subspace))[0]
        for _ in range(iterations):
            basis = jnp.linalg.qr(highest(matrix.T, basis))[0]
            basis = jnp.linalg.qr(highest(matrix, basis))[0]
        left, values, right = jnp.linalg.svd(highest(basis.T, matrix), full_matrices=False)
        left = highest(basis, left)
    root = jnp.sqrt(values[:rank])
    return left[:, :rank] * root[None], root[:, None] * right[:rank]


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def factors(
    name: str, matrix: jax.Array, rank: int, scale: float, iterations: int | None, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (A, B) with scale A B the part of a float32 matrix [in, out] that a start takes.

    Their rank is the matrix's where that is less than `rank`.
    """
    if name == "olora":  # PEFT's is of W [out, in] = Q R, and takes scale Q R whole
        q, r = jnp.linalg.qr(matrix.T)
        return r[:rank].T, q[:, :rank].T
    a, b = singular_factors(matrix, rank, iterations, key)
    root = math.sqrt(scale)
    return a / root, b / root
