"""Every shape of a run compiled ahead of its first step, so that what cannot run fails early."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.errors import UserError
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
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.collate([[]] * rows, *shape),
    )


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

    The state is donated and comes back where it lay. A compiled step refuses any other shape, so
    nothing is ever compiled again. Raises `UserError` where one does not fit into memory.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(run, donate_argnums=0, out_shardings=(placed, None))
    steps: dict[tuple[int, int, int], Callable] = {}
    for shape in sorted(shapes, reverse=True):  # the largest first
        batch = abstract_batch(model, rows, shape, mesh)
        compiled = jitted.lower(state, frozen, batch).compile()
        _check_memory(compiled, shape, rows)
        steps[rows, shape[0], shape[1]] = compiled
    assert len(steps) == len(shapes)
    return steps


def compile_losses(
    model: Model, state: TrainState, frozen: Any, shapes: Sequence[Shape], rows: int, mesh: Any
) -> dict[tuple[int, int, int], Callable]:
    """Return {(rows, T, P): compiled (trainable, frozen, batch) -> (loss_sum, tokens)}."""
    jitted = jax.jit(lambda trainable, frozen, batch: loss(model, trainable, frozen, batch))
    return {
        (rows, shape[0], shape[1]): jitted.lower(
            state.trainable, frozen, abstract_batch(model, rows, shape, mesh)
        ).compile()
        for shape in shapes
    }


def _check_memory(compiled: Any, shape: Shape, rows: int) -> None:
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
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


def on_mesh(state: TrainState, mesh: Any) -> TrainState:
    """Return the state with each leaf on the mesh: scalars and keys on all of its devices.

    What lies in host memory, a paged optimizer's moments, stays there.
    """

    def place(leaf: jax.Array) -> jax.Array:
        on_mesh = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        kind = leaf.sharding.memory_kind
        target = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        return leaf if on_mesh else jax.device_put(leaf, target)

    return jax.tree.map(place, state)
