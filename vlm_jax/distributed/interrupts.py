"""Ctrl-C and SIGTERM: handled at once, even within a call into C.

Python runs a handler between two instructions of the main thread: late where that compiles or waits
for others, and what the handler raises may come up inside a callback, where it is lost. So a thread
of its own hears signals, nothing is raised, and a program that is to end ends by `os._exit`, which
waits for no thread of a compiler.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # the exit code of shells for Ctrl-C
STOPPED = "Stopped; nothing more was saved."
Act = Callable[[int], None]
# What must be done before the process is ended from a side thread.
at_sudden_end: list[Callable[[], None]] = []
ending = threading.Lock()  # taken by the thread that ends the process
_acts: list[Act] = []
_pipe: list[int] = []  # its ends, while somebody listens
_marks: list[threading.Event] = []  # set when the thread has heard what came before them


@contextlib.contextmanager
def on_signal(act: Act) -> Iterator[Act]:
    """Have Ctrl-C and SIGTERM call act(number) while a block lasts; yield what they did before.

    act: called from a side thread, and from the main one where that runs Python: more than once a
    signal, so it must not mind, and must wait for nothing that the main thread may hold. Where
    nothing of ours stands around the block, what they did before is to raise `KeyboardInterrupt` in
    the main thread. In another thread than that, which gets no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _raise
        return
    with contextlib.ExitStack() as stack:
        before = _acts[-1] if _acts else _raise
        _acts.append(act)
        stack.callback(_acts.pop)
        if len(_acts) == 1:
            stack.enter_context(_listening())
        else:
            stack.callback(_settle)
        yield before


def _settle() -> None:
    """Return when the thread has heard what came so far, which is not meant for the next act."""
    mark = threading.Event()
    _marks.append(mark)
    os.write(_pipe[-1], bytes(1))
    mark.wait(1.0)


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """Hear signals, by a thread that reads what Python's own handler in C writes."""
    read, write = _pipe[:] = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        while number := os.read(read, 1):
            if number[0] in SIGNALS:
                _acts[-1](number[0])
            elif not number[0]:
                _marks.pop(0).set()

    handlers = {n: signal.signal(n, lambda number, frame: _acts[-1](number)) for n in SIGNALS}
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            if handler is not None:  # else it was set by C
                signal.signal(number, handler)
        os.close(write)
        thread.join(1.0)  # a child that was forked holds the pipe too
        if not thread.is_alive():
            os.close(read)


def _raise(number: int) -> None:
    if threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@contextlib.contextmanager
def if_ended(act: Callable[[], None]) -> Iterator[None]:
    """Have an act done before the process is ended from a side thread while a block lasts."""
    at_sudden_end.append(act)
    try:
        yield
    finally:
        at_sudden_end.remove(act)


def clear() -> None:
    """Do what `at_sudden_end` holds, the last first."""
    for act in reversed(at_sudden_end):
        with contextlib.suppress(Exception):
            act()


def end_at_once(number: int) -> None:
    """End the process as after Ctrl-C, in one line, wherever its threads are."""
    if ending.acquire(blocking=False):  # else another thread is at it
        clear()
        os.write(2, f"{STOPPED}\n".encode())
        os._exit(INTERRUPTED)
