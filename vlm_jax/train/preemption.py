"""Preemption: on Ctrl-C or SIGTERM all processes of a run stop at one step."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.distributed import processes
from vlm_jax.distributed.interrupts import on_signal

GRACE = 3.0  # seconds after a signal in which another one means the same


class Stopped(Exception):
    """What was being done is given up, since the run stops."""


class Stop:
    """Whether the run is to stop, the same in every process at the same step.

    A process alone stops where it was asked. Several decide together: each step, and each batch of
    an evaluation, carries every process's wish over all devices in a program of its own, whose
    answer is read at the next one, when it has long been there. So no clock and no message decides,
    and none waits for one that has stopped already.
    """

    def __init__(self, mesh: Mesh):
        self.asked = threading.Event()
        self._agreed = False
        self._several = processes.count() > 1
        if self._several:
            self._count = len(mesh.local_devices)
            self._wishes = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._together = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
            self._carry()  # compiled before the first step

    def now(self) -> bool:
        """Return whether the run stops after the last step that `step_done` was given."""
        return self._agreed if self._several else self.asked.is_set()

    def step_done(self) -> None:
        """Take note that a step, or a batch to evaluate, was dispatched; every process calls it."""
        if self._several:
            before = self._answer
            self._carry()
            self._agreed = bool(jax.device_get(before))

    def check(self) -> None:
        """Raise `Stopped` if the run stops; every process calls it, behind each evaluated batch."""
        self.step_done()
        if self.now():
            raise Stopped

    def _carry(self) -> None:
        wish = np.full(self._count, int(self.asked.is_set()), np.int32)
        self._answer = self._together(jax.make_array_from_process_local_data(self._wishes, wish))


@contextlib.contextmanager
def interruptible(mesh: Mesh) -> Iterator[Stop]:
    """Yield a `Stop` that Ctrl-C or SIGTERM asks, as often as they come.

    Schedulers signal a process and its group, and again. Only a Ctrl-C that comes `GRACE` seconds
    after the first signal or later is a person who will not wait: it ends the program at once.
    """
    stop = Stop(mesh)
    # Both Python's handler and the thread of `interrupts` report a signal, the former when what the
    # main thread does in C is over: each counts from the first one that it reported.
    first: dict[int, float] = {}

    def ask(number: int) -> None:
        stop.asked.set()
        now, thread = time.monotonic(), threading.get_ident()
        if thread not in first:
            first[thread] = now
        elif number == signal.SIGINT and now - first[thread] > GRACE:
            around(number)

    with on_signal(ask) as around:
        yield stop
