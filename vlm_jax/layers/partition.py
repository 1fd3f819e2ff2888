"""The one seam for sharding in model code: activations stay with the rows they belong to.

Without it the compiler may follow a kernel's shards instead, and move activations layer by layer
where it should move weights.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

_rows: ContextVar[NamedSharding | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def rows_over(sharding: NamedSharding) -> Iterator[None]:
    """Keep activations of whatever is traced inside on the devices of their rows.

    sharding: of a batch, its first axis over mesh axes.
    """
    token = _rows.set(sharding)
    try:
        yield
    finally:
        _rows.reset(token)


def constrain_rows(x: Any) -> Any:
    """Return x [rows, ...] sharded by its rows alone; as it is where no `rows_over` is around."""
    sharding = _rows.get()
    if sharding is None:
        return x
    spec = PartitionSpec(sharding.spec[0], *[None] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))
