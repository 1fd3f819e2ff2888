"""Plans: a config's training step compiled for hardware that is not here."""

from vlm_jax.plan.program import (
    Collective,
    Memory,
    collectives,
    memory,
)
from vlm_jax.plan.report import Report, plan_step
from vlm_jax.plan.schedule import estimated_cycles, estimated_seconds
from vlm_jax.plan.step import compile_step
from vlm_jax.plan.topologies import devices

__all__ = [
    "Collective",
    "Memory",
    "Report",
    "collectives",
    "compile_step",
    "devices",
    "estimated_cycles",
    "estimated_seconds",
    "memory",
    "plan_step",
]
