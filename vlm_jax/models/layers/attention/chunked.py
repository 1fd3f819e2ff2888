"""Attention by blocks of queries and keys, https://arxiv.org/abs/2205.14135: in pure JAX, anywhere.

Softmax is summed up while the keys go by, so that scores of one block of queries and one of keys
are all there is at a time, forward and backward; blocks that do not meet are not computed.
Letters: B batch, T query, S key, N heads, K kv heads, G query heads a kv head, H head dim,
C queries and D keys of a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.layers.attention.mask import Form, Mask, blocks_seen, seen
from vlm_jax.models.layers.partition import platform
from vlm_jax.models.layers.remat import ATTENDED

# Queries and keys of a block, and of a row that is one block. CPU: scores stay in a core's cache.
BLOCKS = {"cpu": (128, 256)}
OTHERS = (512, 512)
# Platforms on which all blocks of keys are computed: on a GPU the host would wait for each block to
# learn whether there is another one.
WHOLE = ("gpu",)
UNSEEN = float(jnp.finfo(jnp.float32).min)
F32 = jnp.float32


class Sizes(NamedTuple):
    """Of a block, in queries and keys."""

    queries: int
    keys: int

    @classmethod
    def of(cls, T: int, S: int) -> "Sizes":
        """Return equal blocks that pad a row least."""
        limit, whole = BLOCKS.get(platform(), OTHERS)
        counts = (1 if size <= whole else -(-size // limit) for size in (T, S))
        return cls(*(-(-size // count) for size, count in zip((T, S), counts, strict=True)))


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, form: Form
) -> jax.Array:
    """Return [B, T, N, H]; scores, softmax and sums in float32."""
    sizes = Sizes.of(q_BTNH.shape[1], k_BSKH.shape[1])
    return _attend(q_BTNH, k_BSKH, v_BSKH, mask, form, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BTNH, k_BSKH, v_BSKH, mask, form, sizes):
    return _forward(q_BTNH, k_BSKH, v_BSKH, mask, form, sizes)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, mask, form, sizes):
    """Return what attention gives, and the log-sum-exp of each query's scores [B, K, G, T]."""
    rows = _Blocks(q_BTNH, k_BSKH, v_BSKH, mask, form, sizes)
    shape_BKGC = rows.q.shape[1:5]

    def queries(_, block):
        index, q, low, high = block

        def keys(j, carry):
            top, total, out = carry
            k, v = rows.keys(j)
            scores, _ = rows.scores(index, q, j, k)
            new = jnp.maximum(top, scores.max(-1))
            weights, again = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            added = jnp.einsum(
                "BKGCD,BKDH->BKGCH", weights.astype(v.dtype), v, preferred_element_type=F32
            )
            return new, total * again + weights.sum(-1), out * again[..., None] + added

        start = (
            jnp.full(shape_BKGC, UNSEEN),
            jnp.zeros(shape_BKGC),
            jnp.zeros((*shape_BKGC, q.shape[-1])),
        )
        top, total, out = rows.loop(low, high, keys, start)
        total = jnp.where(total == 0, 1.0, total)  # of a query without keys
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out, sums) = jax.lax.scan(queries, None, (rows.indices, rows.q, *rows.bounds))
    return rows.joined(out), jnp.moveaxis(sums, 0, 3).reshape(*sums.shape[1:4], -1)


def _attend_forward(q_BTNH, k_BSKH, v_BSKH, mask, form, sizes):
    made = _forward(q_BTNH, k_BSKH, v_BSKH, mask, form, sizes)
    # Both, or the backward pass would recompute all of this for the one that is not kept.
    out_BTNH, sums_BKGT = checkpoint_name(made, ATTENDED)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, sums_BKGT)


def _attend_backward(form, sizes, kept, d_out_BTNH):
    """Return the gradients, by recomputed weights (https://arxiv.org/abs/2205.14135, B.2)."""
    q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, sums_BKGT = kept
    rows = _Blocks(q_BTNH, k_BSKH, v_BSKH, mask, form, sizes)
    d_out = rows.split(d_out_BTNH)
    inner = jnp.einsum("...H,...H->...", rows.split(out_BTNH), d_out, preferred_element_type=F32)
    sums = jnp.moveaxis(sums_BKGT.reshape(*sums_BKGT.shape[:3], -1, sizes.queries), 3, 0)

    def queries(carry, block):
        index, q, low, high, d_out, inner, sums = block

        def keys(j, carry):
            dq, dk, dv = carry
            k, v = rows.keys(j)
            scores, slope = rows.scores(index, q, j, k)
            weights = jnp.exp(scores - sums[..., None])
            d_weights = jnp.einsum("BKGCH,BKDH->BKGCD", d_out, v, preferred_element_type=F32)
            d_scores = weights * (d_weights - inner[..., None]) * slope
            weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
            dq += jnp.einsum("BKGCD,BKDH->BKGCH", d_scores, k, preferred_element_type=F32)
            dk = _add(dk, "BKGCD,BKGCH->BKDH", d_scores, q, j)
            dv = _add(dv, "BKGCD,BKGCH->BKDH", weights, d_out, j)
            return dq, dk, dv

        dq, *carry = rows.loop(low, high, keys, (jnp.zeros(q.shape), *carry))
        return tuple(carry), dq.astype(q.dtype)

    zeros = jnp.zeros(rows.k.shape)
    blocks = (rows.indices, rows.q, *rows.bounds, d_out, inner, sums)
    (dk, dv), dq = jax.lax.scan(queries, (zeros, zeros), blocks)
    S = k_BSKH.shape[1]
    dk, dv = (x.swapaxes(1, 2)[:, :S].astype(k_BSKH.dtype) for x in (dk, dv))
    return rows.joined(dq), dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _add(sum_BKSH: jax.Array, product: str, x: jax.Array, y: jax.Array, block: Any) -> jax.Array:
    """Return gradients of keys with the product added to those of a block."""
    added = jnp.einsum(product, x, y, preferred_element_type=F32)
    start, size = block * added.shape[2], added.shape[2]
    old = jax.lax.dynamic_slice_in_dim(sum_BKSH, start, size, 2)
    return jax.lax.dynamic_update_slice_in_dim(sum_BKSH, old + added, start, 2)


class _Blocks:
    """The arrays of an attention, padded to whole blocks and cut into them.

    q: [blocks, B, K, G, C, H]. k, v: [B, K, S, H]. bounds: for each block of queries, the first
    block of keys that any row's queries see, and the one behind the last.
    """

    def __init__(self, q_BTNH, k_BSKH, v_BSKH, mask: Mask, form: Form, sizes: Sizes):
        self.form, self.sizes = form, sizes
        self.queries, self.kv_heads = q_BTNH.shape[1], k_BSKH.shape[2]
        self.q = self.split(q_BTNH)
        count, keys = self.q.shape[0], -(-k_BSKH.shape[1] // sizes.keys)
        extra = keys * sizes.keys - k_BSKH.shape[1]
        self.k, self.v = (
            jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))).swapaxes(1, 2)
            for x in (k_BSKH, v_BSKH)
        )
        self.mask = mask.padded(count * sizes.queries, keys * sizes.keys)
        self.indices = jnp.arange(count)
        self.bounds = self._bounds(count, keys)

    def split(self, x_BTNH: jax.Array) -> jax.Array:
        """Return [blocks, B, K, G, C, H]."""
        B, T, N, H = x_BTNH.shape
        C, K = self.sizes.queries, self.kv_heads
        x = jnp.pad(x_BTNH, ((0, 0), (0, -T % C), (0, 0), (0, 0)))
        return x.reshape(B, -1, C, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)

    def joined(self, x: jax.Array) -> jax.Array:
        """Return [B, T, N, H] of [blocks, B, K, G, C, H]."""
        count, B, K, G, C, H = x.shape
        x_BTNH = x.transpose(1, 0, 4, 2, 3, 5).reshape(B, count * C, K * G, H)
        return x_BTNH[:, : self.queries]

    def keys(self, block: Any) -> tuple[jax.Array, jax.Array]:
        """Return k and v of a block [B, K, D, H]."""
        size = self.sizes.keys
        k, v = (jax.lax.dynamic_slice_in_dim(x, block * size, size, 2) for x in (self.k, self.v))
        return k, v

    def scores(self, index: Any, q: jax.Array, block: Any, k: jax.Array) -> tuple[Any, Any]:
        """Return masked scores [B, K, G, C, D] in float32, and their slope in the product q k."""
        form, mask = self.form, self.mask
        scores = jnp.einsum("BKGCH,BKDH->BKGCD", q, k, preferred_element_type=F32) * form.scale
        slope: Any = form.scale
        if form.soft_cap is not None:
            bent = jnp.tanh(scores / form.soft_cap)
            scores, slope = form.soft_cap * bent, form.scale * (1 - bent * bent)
        queries, keys = self.sizes
        part = Mask(
            mask.q.part(index * queries, queries), mask.k.part(block * keys, keys), mask.window
        )
        seen_BTS = seen(part, form)
        if seen_BTS is not None:
            scores = jnp.where(seen_BTS[:, None, None], scores, UNSEEN)
        return scores, slope

    def loop(self, low: Any, high: Any, body: Any, carry: Any) -> Any:
        """Return the carry after body(block, carry) of the blocks of keys from low up to high."""
        count = self.k.shape[2] // self.sizes.keys
        if platform() in WHOLE:
            return jax.lax.fori_loop(0, count, body, carry)
        # The constant says how often at most, for whoever reads the program.
        _, carry = jax.lax.while_loop(
            lambda state: (state[0] < count) & (state[0] < high),
            lambda state: (state[0] + 1, body(*state)),
            (low, carry),
        )
        return carry

    def _bounds(self, count: int, keys: int) -> tuple[jax.Array, jax.Array]:
        met = blocks_seen(self.mask, self.form, *self.sizes)
        if met is None:
            return jnp.zeros(count, jnp.int32), jnp.full(count, keys, jnp.int32)
        any_row = met.any(0)
        low = jnp.where(any_row.any(1), jnp.argmax(any_row, 1), keys)
        return low, keys - jnp.argmax(any_row[:, ::-1], 1)
