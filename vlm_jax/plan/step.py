"""A config's training step, compiled ahead of time without allocating the model."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax.batch import Batch
from vlm_jax.config.specs import RunSpec
from vlm_jax.errors import UserError, refuse
from vlm_jax.hardware import Hardware
from vlm_jax.model import Model
from vlm_jax.plan.topologies import ABSENT, devices
from vlm_jax.train.compile import abstract_batch, out_of_memory_explained
from vlm_jax.train.compile import compile_step as compile_run
from vlm_jax.train.estimate import image_patches
from vlm_jax.train.mesh import mesh_of, rows_of, sizes_of, with_policy
from vlm_jax.train.setup import abstract_base, abstract_run, step_options
from vlm_jax.train.step import TrainState, make_step


@dataclasses.dataclass(frozen=True)
class Step:
    """A config's step before it is compiled; its arrays are shapes with shardings on `mesh`.

    run: `run(state, frozen, batch)`. shape: tokens and patches of a row. rows: of the whole step,
    of all its micro_batches and devices.
    """

    config: RunSpec
    model: Model
    mesh: Mesh | AbstractMesh
    run: Callable
    state: TrainState
    frozen: Any
    batch: Batch
    rows: int
    shape: tuple[int, int]
    micro_batches: int

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh: {"data": 1, "fsdp": 4, "tensor": 1}."""
        return dict(self.mesh.shape)

    @property
    def rows_at_once(self) -> int:
        """Rows that one device computes with at a time."""
        return self.rows // (self.sizes["data"] * self.sizes["fsdp"] * self.micro_batches)

    def compile(self) -> jax.stages.Compiled:
        """Return the step, compiled; a compiler's error is passed on as it is."""
        assert isinstance(self.mesh, Mesh)
        platform = self.mesh.devices.flat[0].platform
        with tempfile.TemporaryDirectory(prefix="vlm_jax.plan.") as dump:
            options = {**ABSENT[platform], "xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            compiled, _ = compile_run(self.run, self.state, self.frozen, self.batch, options)
            return readable(compiled, Path(dump))


def readable(compiled: jax.stages.Compiled, dump: Path) -> jax.stages.Compiled:
    """Return a program whose `as_text` works; dump: where its compiler wrote files.

    A libtpu may be newer than the jaxlib that reads its programs, which then fails on what it does
    not know, such as the collectives that SparseCores of v5p and v6e carry.
    """
    try:
        compiled.as_text()
    except jax.errors.JaxRuntimeError:
        files = list(dump.glob("*.after_codegen.txt"))
        if len(files) != 1:
            raise
        text = files[0].read_text(encoding="utf-8")
        compiled.as_text = lambda: text  # type: ignore[method-assign]
    return compiled


def compile_step(
    config: str | Path | RunSpec | ConfigDict,
    topology: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    patches: int | None = None,
) -> jax.stages.Compiled:
    """Return the training step of a config, compiled for a topology that need not be here.

    It is the very program that `vlm-jax train` runs on such devices, for one shape of batch:
    `.memory_analysis()`, `.cost_analysis()` and `.as_text()` tell of it, and `vlm_jax.plan` reads
    them. config: a file, as for `vlm_jax.config.load`, or a config. topology: see
    `vlm_jax.plan.devices`. overrides: {"lora.r": 64}. mesh: its sizes, as {"fsdp": 4}.
    rows: of the whole step; default: the config's batch size x micro-batches x shards.
    tokens, patches: of a row; default: data.max_seq_length, and one image of the largest size that
    so many tokens stand for.
    Neither data, tokenizer nor weights are read. Raises `UserError` for what the config lacks, for
    an unknown topology, and where a program does not fit its memory.
    """
    sizes = {"mesh.auto": False, **{f"mesh.{name}": n for name, n in mesh.items()}} if mesh else {}
    step = prepare(
        load(config, {**(overrides or {}), **sizes}),
        devices(topology),
        rows=rows,
        tokens=tokens,
        patches=patches,
    )
    with out_of_memory_explained():
        return step.compile()


def load(config: str | Path | RunSpec | ConfigDict, changes: Mapping[str, Any]) -> RunSpec:
    """Return a config, given as one or as a file, with {"section.key": value} changed."""
    return (
        configs.load(config, changes)
        if isinstance(config, str | Path)
        else configs.load(None, {**RunSpec.of(config).flat(), **changes})
    )


def prepare(
    config: RunSpec,
    found: Sequence[Any] | Hardware,
    *,
    rows: int | None = None,
    tokens: int | None = None,
    patches: int | None = None,
) -> Step:
    """Return a config's step over devices, or over hardware that cannot be compiled for.

    See `compile_step` for sizes and errors.
    """
    over: Any = (
        abstract_mesh(config, found) if isinstance(found, Hardware) else mesh_of(config, found)
    )
    model = abstract_base(config)[0]
    tokens = _multiple("tokens", tokens, config.data.max_seq_length)
    largest = image_patches(config, model, tokens)
    patches = _multiple("patches", patches, largest, model.config.patch_unit, least=0)
    described = found if isinstance(found, Hardware) else None
    config, _ = with_policy(config, over, described, (tokens, patches))
    model, tx, state, frozen = abstract_run(config, over)
    parts = config.training.gradient_accumulation_steps
    shards = over.shape["data"] * over.shape["fsdp"]
    rows = _multiple("rows", rows, rows_of(config, over), shards * parts)
    return Step(
        config=config,
        model=model,
        mesh=over,
        run=make_step(model, tx, parts, **step_options(config)),
        state=state,
        frozen=frozen,
        batch=abstract_batch(model, rows, (tokens, patches), over),
        rows=rows,
        shape=(tokens, patches),
        micro_batches=parts,
    )


def abstract_mesh(config: RunSpec, machine: Hardware) -> AbstractMesh:
    """Return the mesh of a config's `mesh` section over devices that are only described."""
    m, count = config.mesh, machine.count
    refuse(
        (m.devices > count, f"mesh.devices is {m.devices}, but there are {count} devices."),
        (
            m.context != 1,
            f"mesh.context is {m.context}, of which an estimate from shapes knows nothing: plan "
            f"for hardware that can be compiled for, as v5e-16 or h100:8.",
        ),
    )
    sizes = sizes_of(config, m.devices or count, machine.usable)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def _multiple(name: str, given: int | None, default: int, unit: int = 1, least: int = 1) -> int:
    """Return a size, or raise `UserError` where no batch has it."""
    size = default if given is None else given
    if size < least or size % unit:
        raise UserError(
            f"{name} is {size}; expected a multiple of {unit} from {max(least, unit * least)} on "
            f"(rows divide among micro-batches and the devices of mesh.data x mesh.fsdp)."
        )
    return size
