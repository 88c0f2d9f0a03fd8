"""The template: a process that has imported what nodes' processes import, and from which those of this machine are forked.

These imports take seconds of a processor and hundreds of megabytes per process; forked ones share both. Python's own
forkserver is the template. It imports and does nothing else: it has one thread and no gRPC channel, which a fork would not
survive. Linux only. Knows nothing of what the forked modules do.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from edgelam_fl.federation.environment import child_environment

Made = TypeVar("Made")

_GRACE_S = 8.0  # between SIGTERM and the end for sure
_IMPORTED = [
    "edgelam_fl.federation.no_database",
    "edgelam_fl.node.preloaded",
    "edgelam_fl.federation.clientapp",
    "flwr.supernode.start_client_internal",
    "edgelam_fl.federation.settled",
]
# Nodes may share this machine's cores: a thread that spins while it waits takes them from the others.
# One arena for all threads: what one frees, another can use (the links' threads bring in what compute frees).
# Flower would report its use to its makers; it reads this when it is imported.
# gRPC says in the log why it refused a handshake; Flower would turn that off.
GRPC_LOG = {"GRPC_VERBOSITY": "info"}
NODE_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1", "FLWR_TELEMETRY_ENABLED": "0", **GRPC_LOG,
}  # fmt: skip


def can_fork() -> bool:
    """Returns whether this system can fork nodes' processes from a template."""
    return sys.platform == "linux"


def warm_template() -> None:
    """Starts the template, which imports in the background; without this the first fork starts and awaits it.

    Does nothing on a system that cannot fork them.
    """
    if not can_fork():
        return
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
    before = dict(os.environ)
    os.environ.update(NODE_ENVIRONMENT)  # its libraries read them once, when they are loaded
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_fork(function: Callable[..., Made], *arguments: Any) -> Made:
    """Returns what `function`, of a module, returns in a process of its own: what it imports and reads is gone with it.

    The process is forked from the template; on a system that cannot fork, this process calls the function.
    """
    if not can_fork():
        return function(*arguments)
    warm_template()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as one, _no_main_module():
        return one.submit(function, *arguments).result()


class ForkedProcess:
    """`python -m module arguments` in a process forked from the template; answers what Child asks of a subprocess.Popen."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        """Forks it into a session of its own, with an environment of its own; its output is appended to `log`."""
        warm_template()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(
            target=_run, args=(module, list(arguments), str(log), {**child_environment(), **GRPC_LOG}), daemon=True
        )
        with _no_main_module():
            self._process.start()
        with suppress(ProcessLookupError):  # until then a signal to its session would find nobody
            while self.poll() is None and os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Keeps multiprocessing from importing the caller's script in the forked process: nothing there needs it."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _run(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, file in enumerate((nothing, output, output)):
        os.dup2(file, descriptor)
    os.close(output)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_starter, name="starter", daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_starter() -> None:
    """Ends this process when the one that asked for it ends; its parent is the template, which lives as long as its forks."""
    starter = multiprocessing.parent_process()
    assert starter is not None
    wait([starter.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)  # with nobody left to make it end
    os._exit(1)
