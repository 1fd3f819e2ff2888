"""Compilation of a run's programs: one a shape, the largest first, so that memory fails early."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from vlm_jax.batch import Batch
from vlm_jax.errors import UserError, first_line
from vlm_jax.files.compiled import AUTO, directory
from vlm_jax.hardware import device_of
from vlm_jax.model import Model
from vlm_jax.models.layers.attention import recorded
from vlm_jax.models.layers.partition import rows_over
from vlm_jax.sharding import batch_shardings, check_lengths
from vlm_jax.train.losses import joined
from vlm_jax.train.step import TrainState

# Options of the compiler, by the kind of a device: larger tiles, which take the compiler up to
# twice as long, and by its own estimate a v5e's step 7 % less and a v5p's 15 % (docs/LOG.md).
LARGE_TILES = {"xla_tpu_scoped_vmem_limit_kib": 65536}
OPTIONS: dict[str, dict[str, Any]] = {"TPU v5 lite": LARGE_TILES, "TPU v5": LARGE_TILES}
GIB = 1 << 30
MOST_KEPT = 4 * GIB  # of compiled programs; those used least recently go first

Shape = tuple[int, int]  # tokens, patches
Tell = Callable[[str], AbstractContextManager[Any]]
LESS_MEMORY = (
    "Lower training.per_device_train_batch_size (and raise gradient_accumulation_steps), "
    "data.max_seq_length, data.max_pixels or data.max_patches, or set training.remat_policy to one "
    "that keeps less for the backward pass: of none, products, gate, residual, qkv, block and "
    "offload each keeps less than the one before it."
)


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Raise `UserError` with what to change where a device's or the host's memory runs out."""
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"This machine ran out of memory ({str(error) or 'MemoryError'}). Lower "
            f"training.dataloader_num_workers or data.max_seq_length, end other programs, or take "
            f"a machine with more; `vlm-jax plan` says what loading takes."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"A device ran out of memory. {LESS_MEMORY} ({first_line(error)})"
        ) from error


def abstract_batch(model: Model, rows: int, shape: Shape, mesh: Any) -> Batch:
    """Return the shapes and shardings of a batch of `rows` rows."""
    check_lengths(mesh, [shape[0]])
    batch = model.collate([[]], *shape)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            (rows, *leaf.shape[1:]), leaf.dtype, sharding=sharding
        ),
        batch,
        batch_shardings(batch, mesh),
    )


def options_for(mesh: Any) -> dict[str, Any]:
    """Return the compiler's options for the devices of a mesh."""
    kind = mesh.devices.flat[0].device_kind
    known = device_of(kind)
    return OPTIONS.get((known and known.kind) or kind, {})


def keep_programs(setting: str | None, platform: str) -> str | None:
    """Keep what is compiled from here on for later runs, and return the line that says where.

    setting: of training.compilation_cache_dir. A directory that JAX was given already stays, but
    where another, or none, is asked for; so does a cache that is switched off in JAX.
    """
    if setting is None:
        jax.config.update("jax_compilation_cache_dir", None)
        reset_cache()
        return None
    given = jax.config.values
    own = given["jax_compilation_cache_dir"] or not given["jax_enable_compilation_cache"]
    if setting == AUTO and own:
        return None
    try:
        place = directory(setting, platform)
    except UserError as error:
        if setting != AUTO:
            raise
        return f"compiled programs: not kept. {error}"
    if place is None:
        return None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", place)
    most = ""
    if "://" not in place:
        jax.config.update("jax_compilation_cache_max_size", MOST_KEPT)
        most = f", {MOST_KEPT // GIB} GiB at most"
    reset_cache()  # JAX asks once, at its first program, whether there is one
    return f"compiled programs: kept in '{place}'{most}"


def compile_step(
    run: Callable,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    options: dict[str, Any] | None = None,
) -> tuple[jax.stages.Compiled, Callable]:
    """Return the compiled `run(state, frozen, batch)`, and a function that runs it.

    All three may be shapes with shardings. The state is donated and comes back where it lay.
    options: the compiler's own, besides those of the devices. The function is `jit`'s, which finds
    what was compiled: called directly, a compiled program refuses 4-bit arguments on the CPU, whose
    layout JAX reports differently before and after compilation.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    own = options_for(batch.tokens.sharding.mesh)
    jitted = jax.jit(run, donate_argnums=0, out_shardings=(placed, None), compiler_options=own)
    with rows_over(batch.tokens.sharding, state.trainable, frozen):
        return jitted.lower(state, frozen, batch).compile(options), jitted


class Shapes(NamedTuple):
    """Shapes of batches of `rows` rows on a mesh: those foreseen, the largest last.

    wider: others that may come unforeseen.
    """

    rows: int
    mesh: Any
    foreseen: Sequence[Shape]
    wider: Sequence[Shape] = ()

    def largest(self, model: Model) -> Batch:
        """Return the shapes and shardings of the largest batch foreseen."""
        check_lengths(self.mesh, (tokens for tokens, _ in self.foreseen))
        return abstract_batch(model, self.rows, self.foreseen[-1], self.mesh)


class OnceAShape:
    """A function of (state or trainable, frozen, batch), compiled for each batch of a new shape.

    compiling: seconds that the last call spent on it. tell: shows words while a block lasts. why:
    what stands in them behind the shape. attention: what computes it in the largest shape.
    """

    def __init__(self, jitted: Callable, shapes: Shapes, tell: Tell, why: str = ""):
        self.jitted, self.shapes, self.tell, self.why = jitted, shapes, tell, why
        self.known = {(shapes.rows, *shape) for shape in (*shapes.foreseen, *shapes.wider)}
        self.compiled: set[Shape] = set()
        self.compiling = 0.0
        self.attention: list[str] = []

    def __call__(self, state: Any, frozen: Any, batch: Batch) -> Any:
        assert batch.shape in self.known, f"{batch.shape} is not one of {sorted(self.known)}"
        start, shape = time.perf_counter(), batch.shape[1:]
        new = shape not in self.compiled
        trainable = state.trainable if isinstance(state, TrainState) else state
        over = rows_over(batch.tokens.sharding, trainable, frozen)
        with over, self.announced(shape) if new else nullcontext():
            result = self.jitted(state, frozen, batch)
        # A program that is there is dispatched and runs on behind the call.
        self.compiling = time.perf_counter() - start if new else 0.0
        return result

    def announced(self, shape: Shape) -> AbstractContextManager[Any]:
        """Show that a shape is compiled while a block lasts, and count it as compiled."""
        self.compiled.add(shape)
        number, count = len(self.compiled), len(self.shapes.foreseen)
        of = f", {number} of {count} shapes" if 1 < count >= number else ""
        return self.tell(f"compiling {shape[0]} x {shape[1]}{self.why}{of}")


def compile_largest_step(
    run: Callable,
    model: Model,
    state: TrainState,
    frozen: Any,
    shapes: Shapes,
    tell: Tell,
) -> OnceAShape:
    """Return the step for all shapes, compiled for the largest one foreseen.

    Raises `UserError` where that does not fit into memory; then none of the others fails so.
    """
    batch, steps = shapes.largest(model), OnceAShape(run, shapes, tell)
    with steps.announced(shapes.foreseen[-1]), recorded() as chosen:
        program, steps.jitted = compile_step(run, state, frozen, batch)
    steps.attention = list(chosen)
    _check_memory(program, batch.shape)
    return steps


def compile_largest_loss(
    objective: Callable,
    model: Model,
    state: TrainState,
    frozen: Any,
    shapes: Shapes,
    tell: Tell,
) -> OnceAShape:
    """Return (trainable, frozen, batch) -> the objective's sums, compiled as the step is.

    objective: of train.losses.OBJECTIVES, with its options.
    """
    jitted = jax.jit(
        lambda trainable, frozen, batch: objective(model, joined(model, trainable, frozen), batch)
    )
    batch, losses = shapes.largest(model), OnceAShape(jitted, shapes, tell, " to evaluate")
    over = rows_over(batch.tokens.sharding, state.result, frozen)
    with over, losses.announced(shapes.foreseen[-1]):
        jitted.lower(state.result, frozen, batch).compile()
    return losses


def _check_memory(program: Any, shape: tuple[int, int, int]) -> None:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    usage = program.memory_analysis()
    if limit is None or usage is None:
        return
    taken = usage.argument_size_in_bytes + usage.temp_size_in_bytes + usage.output_size_in_bytes
    need = taken - usage.alias_size_in_bytes
    if need > limit:
        raise UserError(
            f"A step of {shape[0]} rows of {shape[1]} tokens and {shape[2]} patches needs "
            f"{need / 2**30:.1f} GiB a device, which has {limit / 2**30:.1f} GiB. "
            f"{LESS_MEMORY}"
        )
