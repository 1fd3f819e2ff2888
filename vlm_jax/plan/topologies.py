"""Topologies for ahead-of-time compilation: TPU slices and NVIDIA GPUs by name."""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from vlm_jax.errors import UserError, explained, nearest
from vlm_jax.hardware import DEVICES, hardware

# The package of each platform's compiler, and its name in messages.
COMPILERS = {"tpu": ("libtpu", "libtpu"), "cuda": ("jax_cuda13_plugin", "the CUDA plug-in of JAX")}
INSTALL = 'Install the compilers for hardware that is not here: pip install "vlm_jax[plan]".'
EXAMPLES = ("v5e:2x2", "v5e:4x4", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1", "h100:8")
TPUS = {name: device for name, device in DEVICES.items() if device.is_tpu and device.compiles}
GPUS = {name: device for name, device in DEVICES.items() if device.target is not None}
# The compiler's options where devices are not here, besides those of `train.compile.OPTIONS`:
# autotuning would time kernels on a GPU.
ABSENT: dict[str, dict[str, Any]] = {"tpu": {}, "gpu": {"xla_gpu_autotune_level": 0}}


def compilers() -> bool:
    """Return whether any compiler for hardware that is not here is installed."""
    return any(find_spec(name) is not None for name, _ in COMPILERS.values())


def devices(topology: str) -> list[Any]:
    """Return the devices of a topology, to make a mesh of; nothing can run on them.

    topology: a TPU slice as "v5e:2x2" or by its cloud name, "v5e-4", or NVIDIA GPUs as "h100" or
    "h100:8". Raises `UserError` for one that is not known and where the compiler for it is not
    installed.
    """
    if not isinstance(topology, str):
        raise UserError(f"topology is {topology!r}; expected a name such as 'v5e:2x2'.")
    if re.fullmatch(rf"({'|'.join(TPUS)})-\d+", topology):
        topology = hardware(topology).topology
    chip, _, shape = topology.partition(":")
    if chip in TPUS:
        return _tpu(topology, chip, shape)
    if chip in GPUS:
        return _gpu(topology, chip, shape)
    raise UserError(
        f"There is no topology '{topology}'{nearest(chip, [*TPUS, *GPUS])}. Known are TPU slices "
        f"of {', '.join(TPUS)} and GPUs of {', '.join(GPUS)}, for instance {', '.join(EXAMPLES)}."
    )


def _tpu(topology: str, chip: str, shape: str) -> list[Any]:
    dimensions = TPUS[chip].dimensions
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{dimensions - 1}}}", shape):
        raise UserError(
            f"The topology '{topology}' has no shape that a slice of {chip} can have; write it as "
            f"'{chip}:{'x'.join(['2'] * dimensions)}'."
        )
    # Without it libtpu asks a cloud machine's metadata server, and waits where there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Several processes may compile at a time, and beside one that trains: none takes the chips.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A host has 2 x 2 chips, but for a single one.
    single = {"chips_per_host_bounds": (1, 1, 1)} if set(shape) <= set("1x") else {}
    return _describe(topology, "tpu", topology, **single)


def _gpu(topology: str, gpu: str, shape: str) -> list[Any]:
    file, per_host = GPUS[gpu].target, GPUS[gpu].per_host
    assert file is not None
    count = int(shape or "1") if re.fullmatch(r"([1-9]\d*)?", shape) else 0
    if count == 0 or (count > per_host and count % per_host):
        raise UserError(
            f"The topology '{topology}' does not say how many GPUs there are; write '{gpu}:1' to "
            f"'{gpu}:{per_host}', or a multiple of {per_host} for several hosts."
        )
    hosts, each = (1, count) if count <= per_host else (count // per_host, per_host)
    target = (Path(__file__).parent / "targets" / file).read_text(encoding="utf-8")
    return _describe(topology, "cuda", "", topology=f"1x{hosts}x{each}", target_config=target)


def _describe(asked: str, platform: str, name: str, **options: Any) -> list[Any]:
    package, compiler = COMPILERS[platform]
    if find_spec(package) is None:
        raise UserError(f"Compiling for '{asked}' needs {compiler}. {INSTALL}")
    with explained(
        (jax.errors.JaxRuntimeError, RuntimeError, ValueError),
        lambda error: (
            f"The topology '{asked}' could not be described: {str(error).splitlines()[0]} Known to "
            f"work are {', '.join(EXAMPLES)}."
        ),
    ):
        return list(topologies.get_topology_desc(name, platform, **options).devices)
