"""Splash attention, JAX's Pallas kernel for TPUs, over packed rows.

jax.experimental.pallas.ops.tpu.splash_attention keeps scores in the chip's own memory; it has
K/V heads that serve several query heads, and skips blocks by tables (`MaskInfo`). Those tables are
made here of each row's segments, as traced arrays, so that a row costs the sum of the squares of
its segments. Letters: B batch, T query, S key, N heads, K kv heads, H head dim.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos

from vlm_jax.models.layers.attention.mask import Form, Mask, blocks_seen
from vlm_jax.models.layers.remat import ATTENDED

LANES = 128  # of a register: what widths and lengths are padded to
QUERIES, KEYS = 512, 1024  # of a block; the fastest on v5e, by the bundles of its program
AT_ONCE = 640  # keys of a block whose scores are computed at once, at most
# Blocks of keys for which one kernel makes all gradients. It writes a part of dq for each, which
# with more would be the largest array of the step; then dq has a kernel of its own.
FUSED = 4
UNROLLED = 8  # rows, of which a loop would copy each one's arrays out and back
FIELD = 16  # bits of a slot where two lie in one word
LONGEST = 1 << FIELD  # keys of a row with a window


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths of a row padded to whole blocks, and of a block. at_once: keys of one product."""

    T: int
    S: int
    queries: int
    keys: int
    at_once: int

    @classmethod
    def of(cls, T: int, S: int) -> "Sizes":
        queries, keys = _block(T, QUERIES), _block(S, KEYS)
        return cls(_up(T, queries), _up(S, keys), queries, keys, _at_once(keys))

    @property
    def fused(self) -> bool:
        return self.S // self.keys <= FUSED

    def for_kernel(self) -> kernel.BlockSizes:
        """Return them by the kernel's names."""
        return kernel.BlockSizes(
            block_q=self.queries,
            block_kv=self.keys,
            block_kv_compute=self.at_once,
            block_q_dkv=self.queries,
            block_kv_dkv=self.keys,
            block_kv_dkv_compute=self.at_once,
            block_q_dq=None if self.fused else self.queries,
            block_kv_dq=None if self.fused else self.keys,
            use_fused_bwd_kernel=self.fused,
        )


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    form: Form,
    interpret: bool = False,
) -> jax.Array:
    """Return [B, T, N, H]; scores, softmax and sums in float32.

    interpret: run the kernel in JAX instead, where there is no TPU.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    sizes = Sizes.of(T, k_BSKH.shape[1])
    # Before it is rounded: the kernel does not scale.
    q_BTNH = (q_BTNH.astype(jnp.float32) * form.scale).astype(q_BTNH.dtype)
    q_BNTH, k_BKSH, v_BKSH = (
        _padded(x, size).swapaxes(1, 2)
        for x, size in ((q_BTNH, sizes.T), (k_BSKH, sizes.S), (v_BSKH, sizes.S))
    )
    mask = mask.padded(sizes.T, sizes.S)
    row = functools.partial(_row, form=form, sizes=sizes, interpret=interpret)
    out_BNTH = _over_rows(row, (q_BNTH, k_BKSH, v_BKSH), mask)
    return out_BNTH.swapaxes(1, 2)[:, :T, :, :H]


def _over_rows(row: Any, arrays: Any, mask: Mask) -> jax.Array:
    """Return [B, N, T, H], row by row: tables that differ between rows cannot be batched."""
    segments = mask.q.segments_BT
    if segments is None or segments.shape[0] == 1:
        one = functools.partial(row, mask=mask)
        return one(*(x[0] for x in arrays))[None] if len(arrays[0]) == 1 else jax.vmap(one)(*arrays)
    pair = (mask.q.segments_BT, mask.k.segments_BT)

    def with_own(_: None, given: Any) -> tuple[None, jax.Array]:
        *own, (q_segments_T, k_segments_S) = given
        q = mask.q._replace(segments_BT=q_segments_T[None])
        k = mask.k._replace(segments_BT=k_segments_S[None])
        return None, row(*own, mask=Mask(q, k, mask.window))

    unroll = min(len(segments), UNROLLED)
    return jax.lax.scan(with_own, None, (*arrays, pair), unroll=unroll)[1]


def _row(
    q_NTH: jax.Array,
    k_KSH: jax.Array,
    v_KSH: jax.Array,
    mask: Mask,
    form: Form,
    sizes: Sizes,
    interpret: bool,
) -> jax.Array:
    """Return [N, T, H] of one row. mask: of rows [1, T] and [1, S], padded to whole blocks."""
    forward, dq, dkv = _tables(mask, form, sizes)
    run: Any = kernel.SplashAttentionKernel(
        forward,
        dq,
        dkv,
        block_sizes=sizes.for_kernel(),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=form.soft_cap,
        residual_checkpoint_name=ATTENDED,  # what it gives and its log-sum-exp
        mask_function=_mask_function(mask, form),
        interpret=interpret,
    )
    segments = None
    if mask.q.segments_BT is not None and mask.k.segments_BT is not None:
        segments = kernel.SegmentIds(mask.q.segments_BT[0], mask.k.segments_BT[0])
    return run(q_NTH, k_KSH, v_KSH, segment_ids=segments)


def _tables(mask: Mask, form: Form, sizes: Sizes) -> tuple[Any, Any, Any]:
    """Return the `MaskInfo` of the forward kernel, of dq's (None: no kernel), of dk's and dv's."""
    met = blocks_seen(mask, form, sizes.queries, sizes.keys)
    slots_T: Any = _slots(mask) if form.causal else None
    if met is None:
        all_of_it = infos.MaskInfo(None, None, None, None, None)
        return all_of_it, None if sizes.fused else all_of_it, all_of_it
    by_query = infos.MaskInfo(_next(met[0])[None], None, met.astype(jnp.int32), None, slots_T)
    by_key = by_query._replace(data_next=_next(met[0].T).T[None])
    return by_query, None if sizes.fused else by_query, by_key


def _next(met: jax.Array) -> jax.Array:
    """Return int32 [rows, columns]: the column of the next block that is met, in reading order.

    Itself where it is met; behind the last one the first. The kernel loads by it, ahead of time.
    """
    rows, columns = met.shape
    count, flat = rows * columns, met.reshape(-1)
    ahead = jax.lax.cummin(jnp.where(flat, jnp.arange(count), count), reverse=True)
    ahead = jnp.where(ahead == count, jnp.argmax(flat), ahead)
    return (ahead % columns).reshape(rows, columns).astype(jnp.int32)


def _slots(mask: Mask) -> jax.Array:
    """Return int32 [T], what the kernel passes to `_mask_function` of each query."""
    last_T = mask.q.places_T
    if mask.window is None:
        return last_T
    first_T = jnp.maximum(last_T - mask.window + 1, 0)
    return (first_T - LONGEST // 2) << FIELD | last_T


def _mask_function(mask: Mask, form: Form) -> Any:
    if not form.causal:
        return None
    return _before if mask.window is None else _between


# Of queries' slots and keys' in a block, each [C, D]. At the top level: a kernel is traced once for
# one function.
def _before(q: Any, k: Any) -> Any:
    return k <= q


def _between(q: Any, k: Any) -> Any:
    return (k <= (q & (LONGEST - 1))) & (k >= (q >> FIELD) + LONGEST // 2)


def _padded(x: jax.Array, size: int) -> jax.Array:
    """Return [B, size, heads, H padded to whole registers]."""
    extra, wider = size - x.shape[1], -x.shape[3] % LANES
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, wider)))


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _block(size: int, limit: int) -> int:
    """Return the size of equal blocks of at most `limit`, whole registers that pad `size` least."""
    count = 1 if size <= AT_ONCE else -(-size // limit)
    return _up(-(-size // count), LANES)


def _at_once(keys: int) -> int:
    """Return how many keys of a block are computed at once: a divisor of them."""
    fitting = [n for n in range(LANES, min(keys, AT_ONCE) + 1, LANES) if keys % n == 0]
    return fitting[-1] if fitting[-1] * 3 > AT_ONCE or fitting[-1] == keys else keys


def launched(mask: Mask, form: Form, heads: int, rows: int = 1) -> dict[str, tuple[int, int]]:
    """Return {kernel: (steps of its grid, those of them that compute)} of an attention.

    mask: of arrays, not of tracers. rows: where it says nothing of rows. A step that computes
    nothing is launched all the same.
    """
    sizes = Sizes.of(mask.q.size, mask.k.size)
    segments = mask.q.segments_BT
    rows = rows if segments is None else segments.shape[0]
    blocks = rows * (sizes.T // sizes.queries) * (sizes.S // sizes.keys)
    met = blocks_seen(mask.padded(sizes.T, sizes.S), form, sizes.queries, sizes.keys)
    computed = blocks if met is None else int(met.sum()) * (rows // met.shape[0])
    names = ("forward", "dkv") if sizes.fused else ("forward", "dq", "dkv")
    return dict.fromkeys(names, (heads * blocks, heads * computed))
