"""Which keys a query attends to: described once, read element by element or block by block.

Letters: B batch (1: the same for all rows), T query, S key.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LAST = jnp.iinfo(jnp.int32).max


class Side(NamedTuple):
    """The queries or the keys of some rows.

    places_T: int32, each one's slot. segments_BT, blocks_BT: int32 or None. A query attends to the
    keys of its own segment, and of its own block, where that is not 0, to those behind it too.
    """

    places_T: jax.Array
    segments_BT: jax.Array | None = None
    blocks_BT: jax.Array | None = None

    @property
    def size(self) -> int:
        return self.places_T.shape[0]

    def part(self, start: Any, size: int) -> "Side":
        """Return `size` of them from `start` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, -1), self)

    def padded(self, size: int) -> "Side":
        """Return `size` of them; those added are of a segment of their own, -1."""
        extra = size - self.size
        if not extra:
            return self
        segments_BT = jnp.ones((1, self.size), jnp.int32)
        if self.segments_BT is not None:
            segments_BT = self.segments_BT
        return Side(
            jnp.pad(self.places_T, (0, extra), mode="edge"),
            jnp.pad(segments_BT, ((0, 0), (0, extra)), constant_values=-1),
            None if self.blocks_BT is None else jnp.pad(self.blocks_BT, ((0, 0), (0, extra))),
        )


class Mask(NamedTuple):
    """window: of causal attention, int32 or None: only keys less than that many slots before."""

    q: Side
    k: Side
    window: jax.Array | None = None

    def padded(self, queries: int, keys: int) -> "Mask":
        """Return the mask of so many queries and keys; none of the others sees those added."""
        q, k = self.q, self.k
        if keys > k.size and q.segments_BT is None:
            q = q._replace(segments_BT=jnp.ones((1, q.size), jnp.int32))
        if queries > q.size and k.segments_BT is None:
            k = k._replace(segments_BT=jnp.ones((1, k.size), jnp.int32))
        return Mask(q.padded(queries), k.padded(keys), self.window)


@dataclasses.dataclass(frozen=True)
class Form:
    """What a program fixes of an attention.

    scale: of scores. soft_cap: c of c tanh(score / c), before masking. window_bounds_blocks:
    whether the window holds for keys of a query's own block too.
    """

    causal: bool
    scale: float
    soft_cap: float | None = None
    window_bounds_blocks: bool = True


def seen(mask: Mask, form: Form) -> jax.Array | None:
    """Return bool [B, T, S], whether a query attends to a key; None: all do to all.

    s same segment, c causal, w within the window, b same block: s and c and w, or with blocks
    s and w and (c or b), or s and ((c and w) or b) where the window does not bound blocks.
    """
    q, k = mask.q, mask.k
    same = near = before = together = None
    if q.segments_BT is not None and k.segments_BT is not None:
        same = q.segments_BT[:, :, None] == k.segments_BT[:, None, :]
    if form.causal:
        distance = (q.places_T[:, None] - k.places_T[None, :])[None]
        before = distance >= 0
        near = None if mask.window is None else distance < mask.window
        if q.blocks_BT is not None and k.blocks_BT is not None:
            blocks = q.blocks_BT[:, :, None]
            together = (blocks == k.blocks_BT[:, None, :]) & (blocks != 0)
    return _composed(form, same, before, near, together)


def blocks_seen(mask: Mask, form: Form, queries: int, keys: int) -> jax.Array | None:
    """Return bool [B, T / queries, S / keys]: whether any query of a block may see a key of one.

    By the least and the greatest segment and slot of each: exact where segments do not decrease
    along a row but for padding, 0, at its end. None: all do.
    """
    q, k = mask.q, mask.k
    same = near = before = together = None
    if q.segments_BT is not None and k.segments_BT is not None:
        same = _overlap(q.segments_BT, k.segments_BT, queries, keys)
    if form.causal:
        q_low, q_high = _ends(q.places_T[None], q.places_T[None], queries)
        k_low, k_high = _ends(k.places_T[None], k.places_T[None], keys)
        before = q_high[:, :, None] >= k_low[:, None, :]
        if mask.window is not None:
            near = q_low[:, :, None] - k_high[:, None, :] < mask.window
        if q.blocks_BT is not None and k.blocks_BT is not None:
            together = _overlap(q.blocks_BT, k.blocks_BT, queries, keys, none=0)
    return _composed(form, same, before, near, together)


def _composed(form: Form, same: Any, before: Any, near: Any, together: Any) -> Any:
    """Return the conditions together; None stands for one that always holds."""
    if together is None:
        return _all(same, before, near)
    if form.window_bounds_blocks:
        return _all(same, near, before | together)
    return _all(same, _all(before, near) | together)


def _all(*conditions: Any) -> Any:
    given = [one for one in conditions if one is not None]
    return None if not given else given[0] if len(given) == 1 else given[0] & _all(*given[1:])


def _ends(low_BT: jax.Array, high_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Return the least and the greatest [B, T / size] of blocks."""
    split = (low_BT.shape[0], -1, size)
    return low_BT.reshape(split).min(2), high_BT.reshape(split).max(2)


def _overlap(
    q_BT: jax.Array, k_BS: jax.Array, queries: int, keys: int, none: int = LAST
) -> jax.Array:
    """Return bool [B, T / queries, S / keys]: whether two blocks' ranges of numbers meet.

    Numbers below 1 count as above all others. none: what they count as where the greatest is
    sought; 0: they meet none.
    """
    (q_low, q_high), (k_low, k_high) = (
        _ends(jnp.where(x < 1, LAST, x), jnp.where(x < 1, none, x), size)
        for x, size in ((q_BT, queries), (k_BS, keys))
    )
    return (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])
