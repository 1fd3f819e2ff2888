"""Failures of several processes: the failure of one ends all, with its message.

A process that waits for another inside a collective cannot be reached from outside, so each has a
thread that looks for a word from the others, and ends its process at once when there is one.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from vlm_jax.distributed import processes
from vlm_jax.distributed.interrupts import INTERRUPTED, clear, ending, on_signal
from vlm_jax.distributed.processes import ProcessSlot
from vlm_jax.errors import UserError, first_line

FAILED = "vlm_jax/failed"  # {"process", "code", "text"} of the first process that failed
LEFT = "vlm_jax/left/"  # a key for each process that is about to end
LOOK = 0.5  # seconds between looks
PATIENCE = 20.0  # seconds that process 0, which holds the message, waits for its readers

# It outlives its parent, and says what the parent said last, unless that was nothing.
LAST_WORDS = "import os, sys; os.write(2, sys.stdin.buffer.read().split(b'\\0')[-1])"


@contextlib.contextmanager
def together(report: Callable[[BaseException], int]) -> Iterator[None]:
    """Start the processes that the environment names, run a block in each, and end all alike.

    report: says an exception on stderr and returns the exit code. Where the block raises in one
    process, that one reports it, the others say so, and all end with its code, within seconds and
    wherever they are, so the exception never leaves this. Ctrl-C or SIGTERM to one ends all, until
    the block says what else they do. With one process the block runs as if this were not here.
    Raises `UserError` for a wrong environment.
    """
    here = processes.process_slot()
    if here is None:
        yield
        return
    joined, done = threading.Event(), threading.Event()
    with (
        _last_message(here) as set_message,
        on_signal(lambda number: _stopped(here, report, set_message, joined.is_set())),
    ):
        try:
            processes.start(here)
            joined.set()
            watcher = threading.Thread(target=_watch, args=(here, done, set_message), daemon=True)
            watcher.start()
            yield
            processes.wait_for_all("the end")
        except BaseException as error:
            _fail(here, error, report, set_message, joined.is_set())
        done.set()
        watcher.join()


@contextlib.contextmanager
def _last_message(here: ProcessSlot) -> Iterator[Callable[[str], None]]:
    """Yield a setter of the message that stands on stderr if this process ends without its own.

    JAX aborts a process where it finds another one dead, and an operating system that is out of
    memory kills one: nothing in the process can speak then, so a small child does.
    """
    child = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", LAST_WORDS],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not meant for it
    )
    pipe = child.stdin
    assert pipe is not None

    def set_message(message: str) -> None:
        pipe.write(b"\0" + message.encode())

    set_message(
        f"vlm-jax train: {here} ended without a word of its own: it was killed, or JAX ended it "
        f"because another process died or was killed (lines above this one say so, and the "
        f"output of the others may say why). What was saved is whole: start all processes again, "
        f"with --resume if there is a checkpoint.\n"
    )
    with child:
        try:
            yield set_message
        finally:
            with contextlib.suppress(OSError):  # it may have been killed
                set_message("")


def _watch(here: ProcessSlot, done: threading.Event, set_message: Callable[[str], None]) -> None:
    """End this process where another one has failed."""
    while not done.wait(LOOK):
        if failure := _failure(here):
            ending.acquire()  # for ever where another thread ends this process
            _say_others(here, failure)
            _leave(here, failure["code"], set_message)


def _failure(here: ProcessSlot) -> dict[str, Any] | None:
    """Return the failure of another process, if one has told it."""
    try:
        failure = json.loads(processes.client().key_value_try_get(FAILED))
        return failure if failure["process"] != here.number else None
    except Exception:  # not there; or the coordinator is gone, of which JAX's own thread knows
        return None


def _say_others(here: ProcessSlot, failure: dict[str, Any]) -> None:
    print(
        f"vlm-jax train: process {failure['process']} of {here.count} stopped the run: "
        f"{failure['text']}",
        file=sys.stderr,
    )


def _fail(
    here: ProcessSlot,
    error: BaseException,
    report: Callable[[BaseException], int],
    set_message: Callable[[str], None],
    joined: bool,
) -> None:
    """Report an exception, tell the others if it had joined them, and end this process."""
    ending.acquire()  # for ever where another thread ends this process
    mine = isinstance(error, UserError | KeyboardInterrupt)
    failure = _explained(here) if joined and not mine else None
    code = 1
    if failure is not None:
        _say_others(here, failure)
        code = failure["code"]
    elif mine:
        code = report(error)
    elif _is_of_others(error):
        error = UserError(
            f"{str(here).capitalize()} can no longer reach another one, which may have died or "
            f"been killed ({first_line(error)}). What was saved is whole: start all processes "
            f"again, with --resume if there is a checkpoint."
        )
        report(error)
    else:
        traceback.print_exception(error)
    _tell(here, code, " ".join(str(error).split()), set_message, joined)


def _stopped(
    here: ProcessSlot,
    report: Callable[[BaseException], int],
    set_message: Callable[[str], None],
    joined: bool,
) -> None:
    """End this process at once, as it was asked to, and the others with it."""
    if ending.acquire(blocking=False):
        with contextlib.suppress(Exception):  # the main thread may be in the midst of a line
            report(KeyboardInterrupt())
        _tell(here, INTERRUPTED, "", set_message, joined)


def _tell(
    here: ProcessSlot, code: int, text: str, set_message: Callable[[str], None], joined: bool
) -> None:
    """Tell the others why this process ends, if it had joined them, and end it."""
    if joined:
        with contextlib.suppress(Exception):  # another was first, or there is no coordinator
            failure = {"process": here.number, "code": code, "text": text or "it was interrupted."}
            processes.client().key_value_set(FAILED, json.dumps(failure))
    _leave(here, code, set_message, joined)


def _explained(here: ProcessSlot) -> dict[str, Any] | None:
    """Return another process's failure, where that is why this one failed too."""
    for _ in range(6):
        if failure := _failure(here):
            return failure
        time.sleep(LOOK)
    return None


def _is_of_others(error: BaseException) -> bool:
    """Return whether an exception is one of communication."""
    import jax

    signs = ("gloo", "connection", "unavailable", "peer", "heartbeat", "coordination", "nccl")
    found = any(sign in str(error).lower() for sign in signs)
    return isinstance(error, jax.errors.JaxRuntimeError) and found


def _leave(
    here: ProcessSlot, code: int, set_message: Callable[[str], None], joined: bool = True
) -> None:
    """End this process, at once; process 0 once the others know.

    An ordinary exit would wait for the others in JAX, and JAX abort those that process 0 leaves.
    """
    with contextlib.suppress(Exception):
        set_message("")
    if joined:
        with contextlib.suppress(Exception):
            client, end = processes.client(), time.monotonic() + PATIENCE
            client.key_value_set(f"{LEFT}{here.number}", "")
            if here.number == 0:
                while len(client.key_value_dir_get(LEFT)) < here.count and time.monotonic() < end:
                    time.sleep(0.1)
                time.sleep(LOOK)  # for the last one to end
    clear()  # last, since the main thread may run until now
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
