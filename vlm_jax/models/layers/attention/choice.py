"""Which kernel computes an attention: by platform, shapes and features, from one ordered table.

An attention's shapes are known when a program is traced, so each call chooses then.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.layers import partition
from vlm_jax.models.layers.attention import chunked, splash, xla
from vlm_jax.models.layers.attention.mask import Form
from vlm_jax.models.layers.attention.spread import spread


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention as a program has it. cached: its keys are slots of a cache.

    whole: whether the devices of its arrays are known, or there is one.
    """

    platform: str
    T: int
    S: int
    heads: int
    kv_heads: int
    width: int
    dtype: str
    form: Form
    window: bool
    blocks: bool
    cached: bool
    whole: bool

    def __str__(self) -> str:
        kind = "cached" if self.cached else "causal" if self.form.causal else "bidirectional"
        keys = f" x {self.S:,}" if self.cached else ""
        grouped = f" ({self.kv_heads} KV heads)" if self.kv_heads != self.heads else ""
        return f"{kind} rows of {self.T:,}{keys}, {self.heads} heads{grouped} of width {self.width}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A row of the table.

    attend: (q, k, v, mask, form) to [B, T, N, H]. runs: on which platform; None: any. lacks: what
    of a case it does not compute, in words; None: nothing. slower: whether the table has a faster
    one below.
    """

    attend: Callable[..., jax.Array]
    runs: str | None = None
    lacks: Callable[[Case], str | None] = lambda case: None
    slower: Callable[[Case], bool] = lambda case: False


def _splash_lacks(case: Case) -> str | None:
    rules = (
        (case.cached, "the keys of a cache"),
        (case.blocks, "bidirectional blocks"),
        (case.dtype not in ("bfloat16", "float32"), f"{case.dtype} arrays"),
        (
            case.window and case.S > splash.LONGEST,
            f"a window in rows of more than {splash.LONGEST:,} tokens",
        ),
        (not case.whole, "arrays on several devices outside of a mesh"),
    )
    return next((words for met, words in rules if met), None)


# The longest rows, as the root of queries x keys, whose scores are computed at once. CPU: above it
# chunks are faster, forward and backward (docs/LOG.md). GPU: not measured; a block is
# several launches, and scores of so many tokens fit. TPU: of what splash lacks.
SHORT = {"cpu": 128, "gpu": 1024, "tpu": 512}


def _long(case: Case) -> bool:
    """Return whether a case has long rows; a generation's step, of one query, has not."""
    return case.T > 1 and case.T * case.S > SHORT[case.platform] ** 2


# The first row that runs, lacks nothing and is not slower computes.
KERNELS: dict[str, Kernel] = {
    "splash": Kernel(functools.partial(spread, splash.attend), "tpu", _splash_lacks),
    "xla": Kernel(xla.attend, slower=_long),
    "chunked": Kernel(functools.partial(spread, chunked.attend)),
}

_lines: ContextVar[dict[str, None] | None] = ContextVar("lines", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, None]]:
    """Collect, as the keys of a dict, what is chosen while a block traces programs."""
    lines: dict[str, None] = {}
    token = _lines.set(lines)
    try:
        yield lines
    finally:
        _lines.reset(token)


def case_of(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    form: Form,
    *,
    window: bool,
    blocks: bool,
    cached: bool,
) -> Case:
    """Return the case of an attention that is being traced."""
    _, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    return Case(
        platform=partition.platform(),
        T=T,
        S=S,
        heads=N,
        kv_heads=K,
        width=H,
        dtype=jnp.dtype(q_BTNH.dtype).name,
        form=form,
        window=window,
        blocks=blocks,
        cached=cached or T != S,
        whole=partition.mesh() is not None or jax.device_count() == 1,
    )


def choose(case: Case, forced: str | None = None) -> str:
    """Return the name of the kernel of a case.

    forced: one that has to compute all but what a generation has alone: a cache, and images on
    several devices outside of a mesh. Raises `UserError` where its kernel lacks the platform or
    something of another case.
    """
    if forced is not None and forced not in KERNELS:
        raise UserError(f"Unknown attention '{forced}'; known: {', '.join(KERNELS)}.")
    passed = {
        name: one.lacks(case) for name, one in KERNELS.items() if one.runs in (None, case.platform)
    }
    if forced is not None:
        if forced in passed and passed[forced] is None:
            return _chosen(forced, case, {})
        if not case.cached and (case.whole or forced not in passed):
            raise UserError(_refusal(forced, case, passed))
    able = (name for name, lack in passed.items() if lack is None)
    chosen = next(name for name in able if not KERNELS[name].slower(case))
    return _chosen(chosen, case, passed)


def _chosen(name: str, case: Case, passed: dict[str, str | None]) -> str:
    lines = _lines.get()
    if lines is not None:
        lacks = [f"{other} lacks {words}" for other, words in passed.items() if words]
        why = f" ({'; '.join(lacks)})" if lacks else ""
        lines[f"{name} for {case}{why}"] = None
    return name


def _refusal(forced: str, case: Case, passed: dict[str, str | None]) -> str:
    able = [name for name, lack in passed.items() if lack is None]
    why = (
        f"it lacks {passed[forced]} ({case})"
        if forced in passed
        else f"it runs on a {str(KERNELS[forced].runs).upper()}, and this program is for a "
        f"{case.platform.upper()}"
    )
    return (
        f"model.attention is '{forced}', but {why}. Leave model.attention out, so that each "
        f"attention is computed by the fastest kernel for it, or set it to {' or '.join(able)}."
    )
