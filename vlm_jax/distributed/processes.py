"""Several processes, often one a host: start, barriers, exchange of small values."""

import dataclasses
import functools
import itertools
import json
import operator
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from vlm_jax.errors import UserError, explained, first_line

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's own: where process 0 listens, if not everywhere
START_TIMEOUT = "VLM_JAX_START_TIMEOUT"  # seconds in which all processes must have come
HEARTBEAT_TIMEOUT = "VLM_JAX_HEARTBEAT_TIMEOUT"  # seconds after which a silent one counts as dead
SECONDS = {START_TIMEOUT: 300, HEARTBEAT_TIMEOUT: 30}
EVER = 7 * 24 * 3600  # seconds, where whoever waits is ended in another way
_calls = itertools.count()  # all processes make the same calls in the same order


@dataclasses.dataclass(frozen=True)
class ProcessSlot:
    """Which of the processes this is. address: host:port, where number 0 coordinates them.

    devices: the numbers of this host's devices that are its own; None: all of them.
    """

    address: str
    count: int
    number: int
    devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"process {self.number} of {self.count}"


def process_slot() -> ProcessSlot | None:
    """Return this process's slot, or None where it is alone.

    The three variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID say it, or else
    what JAX finds itself: a TPU pod, SLURM, Open MPI. JAX_NUM_PROCESSES=1: alone.
    Raises `UserError` where one of the three is missing or has no meaning.
    """
    names = (ADDRESS, COUNT, NUMBER)
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given.get(COUNT) == "1":
        return None
    if not given:
        return _detected()
    if missing := [name for name in names if name not in given]:
        raise UserError(
            f"The environment sets {' and '.join(given)}, but not {' and '.join(missing)}. To "
            f"start several processes set all three in each: {ADDRESS}=host:port of process 0, "
            f"{COUNT}=how many there are, {NUMBER}=0, 1, ... For one process unset them."
        )
    count, number = _integer(COUNT, 1), _integer(NUMBER, 0)
    if number >= count:
        raise UserError(
            f"{NUMBER} is {number}, but {COUNT} is {count}: processes are numbered from 0 to "
            f"{count - 1}."
        )
    _host_and_port(given[ADDRESS])
    return ProcessSlot(given[ADDRESS], count, number)


def _integer(name: str, least: int) -> int:
    text = os.environ.get(name) or str(SECONDS.get(name))
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"The environment variable {name} is {text!r}; expected a whole number of {least} or "
            f"more."
        )
    return int(text)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"{ADDRESS} is {address!r}; expected the host and a free port of process 0, as in "
            f"10.0.0.1:1234."
        )
    return host.strip("[]"), int(port)


def _detected() -> ProcessSlot | None:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks too

    unknown = explained(
        Exception,  # each kind of cluster raises its own
        lambda error: (
            f"This looks like one process of a cluster, but which one cannot be found out: "
            f"{error}. Set {ADDRESS}, {COUNT} and {NUMBER}, or {COUNT}=1 to train in this process "
            f"alone."
        ),
    )
    with unknown, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice for who wants several processes
        address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, _integer(START_TIMEOUT, 1)
        )
    if address is None or count is None or number is None or count == 1:
        return None
    return ProcessSlot(address, count, number, None if devices is None else tuple(devices))


def start(here: ProcessSlot | None = None) -> None:
    """Join the other processes, see `process_slot`; nothing is done without any.

    Call it before anything touches a device. Raises `UserError` where the coordinator cannot be
    reached, or not all processes come, within VLM_JAX_START_TIMEOUT seconds (300); then this
    process should end by `os._exit`, since JAX may abort it. A process that JAX has not heard of
    for VLM_JAX_HEARTBEAT_TIMEOUT seconds (30) ends the others.
    """
    import jax

    here = here or process_slot()
    if here is None or jax.distributed.is_initialized():
        return
    timeout, heartbeat = _integer(START_TIMEOUT, 1), _integer(HEARTBEAT_TIMEOUT, 5)
    end = time.monotonic() + timeout
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Programs with collectives must run in one order everywhere; on the CPU, dispatched ahead,
    # they run side by side and may wait for each other's threads.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Its handler of SIGTERM would stand beside ours.
    jax.config.update("jax_enable_preemption_service", False)
    if here.number:
        _reach(here, end, timeout)
    elif not os.environ.get(BIND):
        _check_free(here)

    join = functools.partial(
        jax.distributed.initialize,
        here.address,
        here.count,
        here.number,
        here.devices,
        # On its own timeout JAX aborts the process: ours comes first.
        initialization_timeout=timeout + 600,
        heartbeat_timeout_seconds=heartbeat,
    )
    with explained(
        jax.errors.JaxRuntimeError,
        lambda error: (
            f"The processes could not be connected at '{here.address}' (this is number "
            f"{here.number} of {here.count}): {first_line(error)}. {ADDRESS} must name the host of "
            f"process 0 and a port that is free there."
        ),
    ):
        joined = returned(join, end)
    if not joined:
        raise UserError(
            f"Not all of {here.count} processes came to '{here.address}' within {timeout} seconds "
            f"(this is number {here.number}). Start all of them, with the same {ADDRESS} and "
            f"{COUNT} and each its own {NUMBER}; {START_TIMEOUT} sets how long they wait for each "
            f"other."
        )


def _check_free(here: ProcessSlot) -> None:
    """Raise `UserError` where process 0 cannot listen; JAX, finding that out, may crash."""
    _, port = _host_and_port(here.address)
    both = socket.has_dualstack_ipv6()
    with explained(
        OSError,
        lambda error: (
            f"Process 0 cannot listen at port {port} of '{here.address}': "
            f"{os.strerror(error.errno)}. {ADDRESS} must name the host of process 0 and a port "
            f"that is free there."
        ),
    ):  # everywhere, as JAX does; a port that a run has just left is free
        socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
        ).close()


def _reach(here: ProcessSlot, end: float, timeout: int) -> None:
    """Wait until the coordinator listens; raise `UserError` where it does not."""
    while True:
        try:
            with socket.create_connection(_host_and_port(here.address), 5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"Process {here.number} cannot reach the coordinator, process 0, at "
                    f"'{here.address}': {error}. It was tried for {timeout} seconds "
                    f"({START_TIMEOUT}). Check that process 0 is started, that {ADDRESS} names its "
                    f"host, and that no firewall stands between."
                ) from error
        time.sleep(0.2)


def returned(call: Callable[[], None], end: float) -> bool:
    """Return whether `call` came back before `end`; signals are handled meanwhile.

    It runs in a thread, since a main thread that waits inside JAX handles none.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.2)
    if failed:
        raise failed[0]
    return not thread.is_alive()


def client() -> Any:
    """Return JAX's client of the coordinator, or None where this process is alone."""
    from jax._src import distributed  # it has no public name

    return distributed.global_state.client


def count() -> int:
    """Return how many processes there are; no device is touched."""
    from jax._src import distributed

    return distributed.global_state.num_processes if client() is not None else 1


def number() -> int:
    """Return which of them this is, from 0."""
    from jax._src import distributed

    return distributed.global_state.process_id if client() is not None else 0


def is_primary() -> bool:
    """Return whether this process writes what is written once."""
    return number() == 0


def wait_for_all(name: str) -> None:
    """Return once every process has called this; all make such calls in the same order."""
    if count() > 1:
        key = f"vlm_jax/{next(_calls)}/{name}"
        # However long it takes: the one waited for may write a model, and if it died all end.
        returned(lambda: client().wait_at_barrier(key, EVER * 1000), time.monotonic() + EVER)


def gather(name: str, value: Any) -> list[Any]:
    """Return every process's value, by number: small, JSON-able. All call it."""
    if count() == 1:
        return [value]
    place = f"vlm_jax/{next(_calls)}/{name}/"
    client().key_value_set(f"{place}{number()}", json.dumps(value))
    wait_for_all(name)
    texts = {int(key.rsplit("/", 1)[1]): text for key, text in client().key_value_dir_get(place)}
    return [json.loads(texts[i]) for i in range(count())]


def check_same(what: str, value: dict[str, Any]) -> None:
    """Raise `UserError` where the first process's value of a key differs from this one's.

    value: JSON-able values by name. All call it.
    """
    values = gather(what, value)
    first, own = values[0], values[number()]
    for key in sorted(first.keys() | own.keys()):
        if first.get(key) != own.get(key):
            raise UserError(
                f"Processes train together only with equal {what}: '{key}' is "
                f"{own.get(key)!r:.200} in process {number()} and {first.get(key)!r:.200} in "
                f"process 0. Give all of them the same command and the same files."
            )


def _same(x: Any) -> Any:  # by name, so that what JAX has compiled for it is found again
    return x


def to_host(tree: Any, here: bool = True) -> Any:
    """Return the tree with arrays of numpy, whole ones, whatever devices hold parts of them.

    All processes call it; one with here=False only helps, and gets None for each array. Stacks of
    layers are gathered a layer at a time, since a device may have no room for the whole.
    """
    import jax
    import numpy as np

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf) if here else None
        everywhere = jax.sharding.NamedSharding(
            leaf.sharding.mesh,  # type: ignore[attr-defined]
            jax.sharding.PartitionSpec(),
        )
        if leaf.ndim < 3:
            gathered = jax.jit(_same, out_shardings=everywhere)(leaf)
            return np.asarray(gathered) if here else None
        layer = jax.jit(operator.getitem, out_shardings=everywhere)
        array = np.empty(leaf.shape, leaf.dtype) if here else None
        for i in range(leaf.shape[0]):
            gathered = layer(leaf, i)
            if array is not None:
                array[i] = np.asarray(gathered)
        return array

    return jax.tree.map(whole, tree)
