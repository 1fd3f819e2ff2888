"""Devices by the names people use, with the memory that their makers state."""

import dataclasses
import math
import re

from vlm_jax.errors import UserError, nearest

GB = 10**9
# What of a device's memory a program gets: runtimes, kernels and fragments take the rest.
USABLE = 0.92

# GB of one device. TPU: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm (a chip);
# NVIDIA: the data sheets.
MEMORY: dict[str, int] = {
    "v4": 32,
    "v5e": 16,
    "v5p": 95,
    "v6e": 32,
    "h200": 141,
    "h100": 80,
    "a100": 80,
    "a100-40gb": 40,
    "l40s": 48,
    "a6000": 48,
    "a40": 48,
    "rtx5090": 32,
    "rtx4090": 24,
    "rtx3090": 24,
    "a10g": 24,
    "a10": 24,
    "l4": 24,
    "rtx4080": 16,
}
# Cloud names of slices count TensorCores here, of which a chip has two: v4-8 is four chips.
BY_CORES = ("v4", "v5p")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """So many equal devices; memory: bytes of one."""

    name: str
    device: str
    count: int
    memory: int

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE)


def hardware(name: str) -> Hardware:
    """Return the devices that a name means: "h100", "h100:8", "8xh100", "v5e-4", "v5e:2x2".

    Raises `UserError` with the known ones for another name.
    """
    text = re.sub(r"[\s_]", "", name.lower()).removeprefix("nvidia").removeprefix("tpu")
    text = text.removeprefix("-")
    count: int | None = None
    if many := re.fullmatch(r"(\d+)x(.+)", text):
        count, text = int(many[1]), many[2]
    device, _, shape = text.partition(":")
    if device not in MEMORY:
        tail = re.fullmatch(r"(.+)-(\d+)", device)
        if tail and tail[1] in MEMORY:
            device, shape = tail[1], shape or tail[2]
            if device in BY_CORES and ":" not in text:
                shape = str(max(1, int(shape) // 2))
    if device not in MEMORY or not re.fullmatch(r"(\d+(x\d+)*)?", shape) or (count and shape):
        raise UserError(
            f"The hardware '{name}' is not known{nearest(device, MEMORY)}. Known are "
            f"{', '.join(MEMORY)}, one of them or several: 'h100:8', 'v5e-4', 'v5e:2x2'."
        )
    count = count or math.prod(int(n) for n in shape.split("x") if n) or 0
    if count < 1:
        raise UserError(f"The hardware '{name}' has no device; write for instance '{device}:1'.")
    return Hardware(name, device, count, MEMORY[device] * GB)
