"""Time limits on computations in any thread."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

TICK = 0.25  # seconds
AGAIN = 4  # ticks until an exception is sent again: a callback of the interpreter may swallow one
_jobs: dict[int, list[int]] = {}  # id of a job -> [its thread, the ticks that are left]
_lock = threading.Lock()  # held where an exception is sent, and where a job ends
_watch: threading.Thread | None = None
_send = ctypes.pythonapi.PyThreadState_SetAsyncExc


class _Overtime(BaseException):
    """Thrown into a thread; no `except Exception` on its way holds it up."""


def within(seconds: float, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(*args, **kwargs)`; raise `TimeoutError` after so many seconds of it.

    It ends between two steps of the interpreter: what is one long step to it (a power, a product
    of strings) must be bounded by itself. Signals do as much in the main thread alone. The seconds
    are those that a watching thread was awake, so a machine that sleeps uses up none.
    """
    _start()
    job = [threading.get_ident(), round(seconds / TICK)]
    _jobs[id(job)] = job
    try:
        try:
            return function(*args, **kwargs)
        finally:
            try:
                _end(job)
            except _Overtime:  # it came just now, and the next comes a second later
                _end(job)
    except _Overtime:
        raise TimeoutError(f"takes more than {seconds:g} seconds") from None


def _end(job: list[int]) -> None:
    """Take a job out, and let what is on its way to it arrive here: nothing may arrive behind.

    Not by sending None in its place: Python 3.11 then looks for an exception at every step until
    the next one comes, and never goes on where a tracer is set (a debugger, coverage).
    """
    with _lock:
        _jobs.pop(id(job), None)
    if job[1] < 0:
        for _ in range(2):  # the interpreter looks for it where a loop jumps back
            pass


def _start() -> None:
    global _watch
    with _lock:
        if _watch is None or not _watch.is_alive():
            _watch = threading.Thread(target=_tick, name="watchdog", daemon=True)
            _watch.start()


def _tick() -> None:
    while True:
        time.sleep(TICK)
        with _lock:
            for job in list(_jobs.values()):
                job[1] -= 1
                if job[1] < 0 and job[1] % AGAIN == 0:
                    _send(ctypes.c_ulong(job[0]), ctypes.py_object(_Overtime))


def _forget() -> None:
    global _watch, _lock
    _watch, _lock = None, threading.Lock()
    _jobs.clear()


os.register_at_fork(after_in_child=_forget)  # a fork has none of the threads
