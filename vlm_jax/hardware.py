"""The table of devices: names in use, and their makers' published numbers."""

import dataclasses
import math
import re

from vlm_jax.errors import UserError, nearest

GB, GIB = 10**9, 2**30
# What of a device's memory a program gets where no compiler says it: runtimes, kernels and
# fragments take the rest. The command line gives JAX as much of a GPU.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX sees it: a TPU chip (of tpu7x one of its two halves) or a GPU.

    memory: bytes. flops: dense bfloat16 FLOP/s, summed in float32. bandwidth: B/s of its memory.
    link: B/s to other devices in one direction, all links together. What no page of the maker
    states is None, and nothing is derived from it.
    limit: bytes that the TPU compiler lets a program have, as it says where it refuses one.
    dimensions: of the topologies of a TPU slice, such as 2 for "2x2"; 0: no TPU.
    clock: cycles a second of a TPU's matrix unit. kind: JAX's device_kind. halves: devices a chip.
    target: XLA's description of a GPU that can be compiled for. per_host: GPUs of a host.
    at_once: tokens of a micro-batch from which on more at a time are slower; None: not known.
    """

    memory: int
    flops: float | None
    bandwidth: float | None
    link: float | None
    limit: int | None = None
    dimensions: int = 0
    clock: float | None = None
    kind: str = ""
    halves: int = 1
    target: str | None = None
    per_host: int = 8
    at_once: int | None = None

    @property
    def is_tpu(self) -> bool:
        return self.dimensions > 0

    @property
    def compiles(self) -> bool:
        """Whether a compiler for it can be installed on a machine that has none."""
        return self.limit is not None or self.target is not None

    @property
    def usable(self) -> int:
        """Bytes that a program may have."""
        return int(self.memory * USABLE) if self.limit is None else self.limit


# TPUs: https://docs.cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, .../tpu7x, .../v4 (a chip;
# links in both directions, halved here). v4's links: https://arxiv.org/abs/2304.01433, table 4.
# Clocks: peak FLOP/s over the matrix units' operations a cycle (v5e: 197e12 / (4 units x 128 x 128
# x 2)). Of v6e and tpu7x what is published does not give one: programs have cycles, no seconds.
# limit: libtpu 0.0.52's "available HBM". It describes a v4 chip as two devices, of which JAX makes
# no mesh: v4 cannot be compiled for.
# GPUs: NVIDIA's data sheets (https://www.nvidia.com/en-us/data-center/h100, /h200, /a100, /l40s,
# /l4, /products/a10-gpu, /a40) and the white papers of GeForce RTX 50, Ada and GA102 ("BF16 tensor
# TFLOPS with FP32 accumulate", without sparsity; links halved). a10g: AWS states its memory alone.
# at_once: what of [tokens, width of the MLP] in bfloat16 stays in a TPU's vector memory between
# programs. By the compiler's cycles of Qwen2-VL-7B 8,192 tokens in four times take a v5e 0.70 of
# one time; a v5p, with links and memory three times as fast, has no use for less than 8,192. v6e's
# is a guess by its memory's speed, between them.
DEVICES: dict[str, Device] = {
    "v4": Device(32 * GIB, 275e12, 1200e9, 300e9, None, 3, 1.05e9, "TPU v4"),
    "v5e": Device(
        16 * GB, 197e12, 819e9, 200e9, int(15.75 * GIB), 2, 1.5e9, "TPU v5 lite", at_once=2048
    ),
    "v5p": Device(
        95 * GIB, 459e12, 2765e9, 600e9, int(95.73 * GIB), 3, 1.75e9, "TPU v5", at_once=8192
    ),
    "v6e": Device(
        32 * GB, 918e12, 1638e9, 400e9, int(31.24 * GIB), 2, None, "TPU v6 lite", at_once=4096
    ),
    "tpu7x": Device(
        96 * GIB, 1153.5e12, 3690e9, None, int(94.74 * GIB), 3, None, "TPU7x", halves=2
    ),
    "h200": Device(141 * GB, 989e12, 4800e9, 450e9),
    "h100": Device(80 * GB, 989e12, 3350e9, 450e9, target="h100.txtpb"),
    "a100": Device(80 * GB, 312e12, 2039e9, 300e9),
    "a100-40gb": Device(40 * GB, 312e12, 1555e9, 300e9),
    "l40s": Device(48 * GB, 362e12, 864e9, 32e9),
    "a6000": Device(48 * GB, 154.8e12, 768e9, None),
    "a40": Device(48 * GB, 149.7e12, 696e9, None),
    "rtx5090": Device(32 * GB, 209.5e12, 1792e9, None),
    "rtx4090": Device(24 * GB, 165.2e12, 1008e9, None),
    "rtx3090": Device(24 * GB, 71e12, 936e9, None),
    "a10g": Device(24 * GB, None, None, None),
    "a10": Device(24 * GB, 125e12, 600e9, None),
    "l4": Device(24 * GB, 121e12, 300e9, None),
    "rtx4080": Device(16 * GB, 97.5e12, 717e9, None),
}
OTHER_NAMES = {"a100-80": "a100", "a100-80gb": "a100", "a100-40": "a100-40gb", "v5litepod": "v5e"}
# Cloud names of slices count TensorCores here, of which a chip has two: v4-8 is four chips.
BY_CORES = ("v4", "v5p", "tpu7x")


def device_of(kind: str) -> Device | None:
    """Return the device of JAX's device_kind, or None where none is known by it."""
    words = re.findall(r"(?:rtx )?\w+", kind.lower())  # "rtx 4090" is one
    said = {word.replace(" ", "") for word in words} | {*kind.lower().split()}
    for name, known in sorted(DEVICES.items(), key=lambda item: -len(item[0])):
        named = not known.kind and said.issuperset(name.split("-"))
        if kind in (known.kind, f"TPU {name}") or named:  # JAX knows TPUs by two names
            return known
    return None


@dataclasses.dataclass(frozen=True)
class Hardware:
    """So many equal devices. memory: bytes of one. shape: of a TPU slice in chips, as "2x2"."""

    name: str
    device: str
    count: int
    memory: int
    shape: str = ""

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE)

    @property
    def topology(self) -> str:
        """The name that `vlm_jax.plan.devices` takes: "v5e:2x2", "h100:8"."""
        return f"{self.device}:{self.shape or self.count}"


def hardware(name: str) -> Hardware:
    """Return the devices that a name means: "h100", "h100:8", "8xh100", "v5e-4", "v5e:2x2".

    Raises `UserError` with the known ones for another name.
    """
    text = re.sub(r"[\s_]", "", name.lower())
    [(many, text)] = re.findall(r"^(?:nvidia)?(?:tpu(?!7x))?-?(?:(\d+)x)?(.*)$", text)
    count = int(many or 0)
    device, _, shape = text.partition(":")
    device = OTHER_NAMES.get(device, device)
    asked = device.split("-")[0]  # without a count, for the nearest of the known
    tail = re.fullmatch(r"(.+)-(\d+)", device)
    before = OTHER_NAMES.get(tail[1], tail[1]) if tail else ""
    if tail and device not in DEVICES and before in DEVICES:
        device, shape = before, shape or tail[2]
        if device in BY_CORES and ":" not in text:
            shape = str(max(1, int(shape) // 2))
    if device not in DEVICES or not re.fullmatch(r"(\d+(x\d+)*)?", shape) or (count and shape):
        raise UserError(
            f"The hardware '{name}' is not known{nearest(asked, DEVICES)}. Known are "
            f"{', '.join(DEVICES)}, one of them or several: 'h100:8', 'v5e-4', 'v5e:2x2'."
        )
    known = DEVICES[device]
    count = count or math.prod(int(n) for n in shape.split("x") if n) or 0
    if count < 1:
        raise UserError(f"The hardware '{name}' has no device; write for instance '{device}:1'.")
    if not known.is_tpu:
        return Hardware(name, device, count, known.memory)
    shape = shape if "x" in shape else slice_shape(count, known.dimensions)
    return Hardware(name, device, count * known.halves, known.memory, shape)


def slice_shape(chips: int, dimensions: int) -> str:
    """Return the shape of a slice of so many chips, as near to a square or cube as Cloud TPU's.

    2 dimensions: 1x1, 2x2, 2x4, 4x4, 4x8, ...; 3: 1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, ... A number
    that is not a power of two gives one row, which no slice has: the compiler says so.
    """
    doublings = chips.bit_length() - 1
    if chips != 2**doublings:
        return "x".join(["1"] * (dimensions - 1) + [str(chips)])
    sizes = [2 ** ((doublings + i) // dimensions) for i in range(dimensions)]  # ascending
    return "x".join(map(str, reversed(sizes) if sizes[0] == 1 else sizes))
