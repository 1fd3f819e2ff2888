"""Every shape of a run compiled ahead of its first step, so that what cannot run fails early."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.errors import UserError
from vlm_jax.layers.partition import rows_over
from vlm_jax.model import Model
from vlm_jax.sharding import BATCH
from vlm_jax.train.losses import loss
from vlm_jax.train.step import TrainState

Shape = tuple[int, int]  # tokens, patches
LESS_MEMORY = (
    "Lower training.per_device_train_batch_size (and raise gradient_accumulation_steps), "
    "data.max_seq_length or data.max_pixels, or set training.gradient_checkpointing=true."
)


@contextlib.contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Raise `UserError` with what to change where a device's memory runs out inside."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0][:300]
        raise UserError(f"A device ran out of memory. {LESS_MEMORY} ({first})") from error


def abstract_batch(model: Model, rows: int, shape: Shape, mesh: Any) -> Batch:
    """Return the shapes and shardings of a batch of `rows` rows."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype, sharding=sharding),
        model.collate([[]], *shape),
    )


def compile_step(
    run: Callable,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    options: dict[str, Any] | None = None,
) -> tuple[jax.stages.Compiled, Callable]:
    """Return the compiled `run(state, frozen, batch)`, and a function that runs it.

    All three may be shapes with shardings. The state is donated and comes back where it lay.
    options: the compiler's own. The function is `jit`'s, which finds what was compiled: called
    directly, a compiled program refuses 4-bit arguments on the CPU, whose layout JAX reports
    differently before and after compilation.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(run, donate_argnums=0, out_shardings=(placed, None))
    with rows_over(batch.tokens.sharding):
        lowered = jitted.lower(state, frozen, batch)
    return lowered.compile(options), jitted


def compile_steps(
    run: Callable,
    model: Model,
    state: TrainState,
    frozen: Any,
    shapes: Sequence[Shape],
    rows: int,
    mesh: Any,
) -> dict[tuple[int, int, int], Callable]:
    """Return {(rows, T, P): the compiled step}: one compilation a shape, all of them now.

    Raises `UserError` where one does not fit into memory.
    """
    steps: dict[tuple[int, int, int], Callable] = {}
    for shape in sorted(shapes, reverse=True):  # the largest first
        batch = abstract_batch(model, rows, shape, mesh)
        compiled, steps[rows, shape[0], shape[1]] = compile_step(run, state, frozen, batch)
        _check_memory(compiled, shape, rows)
    assert len(steps) == len(shapes)
    return steps


def compile_losses(
    model: Model, state: TrainState, frozen: Any, shapes: Sequence[Shape], rows: int, mesh: Any
) -> dict[tuple[int, int, int], Callable]:
    """Return {(rows, T, P): compiled (trainable, frozen, batch) -> (loss_sum, tokens)}."""
    jitted = jax.jit(lambda trainable, frozen, batch: loss(model, trainable, frozen, batch))
    for shape in shapes:
        batch = abstract_batch(model, rows, shape, mesh)
        with rows_over(batch.tokens.sharding):
            jitted.lower(state.trainable, frozen, batch).compile()
    return {(rows, shape[0], shape[1]): jitted for shape in shapes}


def _check_memory(compiled: Any, shape: Shape, rows: int) -> None:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    usage = compiled.memory_analysis()
    if limit is None or usage is None:
        return
    sizes = usage.argument_size_in_bytes + usage.temp_size_in_bytes + usage.output_size_in_bytes
    need = sizes - usage.alias_size_in_bytes
    if need > limit:
        raise UserError(
            f"A step of {rows} rows of {shape[0]} tokens and {shape[1]} patches needs "
            f"{need / 2**30:.1f} GiB a device, which has {limit / 2**30:.1f} GiB. "
            f"{LESS_MEMORY}"
        )
