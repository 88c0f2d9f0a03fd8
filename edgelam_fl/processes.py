"""The processes of a federation on this machine: Flower's SuperLink and SuperNodes, and the stage hosts beside them.

Starts, watches and ends them; knows nothing of what they say to each other. A child ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgelam_fl import clientapps, hub
from edgelam_fl.errors import ConfigError, EnvironmentProblem, RunFailed

_GRACE_S = 5.0
_START_DEADLINE_S = 180.0
_RESTARTS, _RESTARTS_WITHIN_S = 3, 120.0
_PR_SET_PDEATHSIG = 1
_COLOUR = re.compile("\x1b\\[[0-9;]*m")  # Flower's logs have some
_MOST_LOG_BYTES, _KEPT_LOG_BYTES = 4 << 20, 256 << 10  # a board's card is small, and a node may run for years


class Child:
    """One process in a session of its own, its output in a log file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, log
        shorten(log)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children in order
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                env={**tool_environment(), **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> str:
        """Empty while it runs; else its exit status and the end of its log."""
        status = self._status()
        return "" if status is None else f"{self.name} ended with status {status}: {log_tail(self.log)}"

    def _status(self) -> int | None:
        """None while it runs. What an ended one left behind in its session ends at once: later its number may be another's."""
        if self._process.returncode is None and self._process.poll() is not None:
            self._signal(signal.SIGKILL)
        return self._process.returncode

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def ask_to_end(self) -> None:
        if self._status() is None:
            self._signal(signal.SIGTERM)

    def make_end(self, grace_s: float = _GRACE_S) -> None:
        end = time.monotonic() + grace_s
        while self._status() is None and time.monotonic() < end:
            time.sleep(0.02)
        if self._status() is None:
            self._signal(signal.SIGKILL)
            self._process.wait()


def tool_environment() -> dict[str, str]:
    """This process's environment with this Python's console scripts on PATH: Flower's own start each other by name."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def app_folder() -> Path:
    """The Flower App: the repository itself, or its copy inside an installed package."""
    package = Path(__file__).parent
    return package / "_app" if (package / "_app").is_dir() else package.parent


def _end_with_parent() -> None:
    # However the parent ends, kill -9 included, the kernel then sends SIGTERM here.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_all(children: Sequence[Child]) -> None:
    for child in children:
        child.ask_to_end()
    end = time.monotonic() + _GRACE_S
    for child in children:
        child.make_end(max(0.1, end - time.monotonic()))


def log_tail(log: Path, lines: int = 3) -> str:
    with contextlib.suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:
        kept = deque((_COLOUR.sub("", line).strip() for line in file if line.strip()), maxlen=lines)
        return " | ".join(kept) or "it said nothing"
    return "it left no log"


def shorten(log: Path) -> None:
    """Leaves the end of a log that has grown long. Its writers, which append, go on behind that."""
    if not log.exists() or log.stat().st_size <= _MOST_LOG_BYTES:
        return
    with log.open("rb") as old:
        old.seek(-_KEPT_LOG_BYTES, os.SEEK_END)
        kept = old.read().partition(b"\n")[2]
    os.truncate(log, 0)  # in place: its writers have it open
    with log.open("ab") as new:
        new.write(kept)


# ---------------------------------------------------------------- addresses


def split_address(address: str, option: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise ConfigError(f"{option} = {address!r} must be HOST:PORT, as in 127.0.0.1:8000")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, as `split_address` takes it apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def hub_address(host: str, port: int, data_plane: str = "") -> tuple[str, int]:
    """The server's end of the data plane: `data_plane` (HOST:PORT), or one port after its SuperLink's."""
    if data_plane:
        return split_address(data_plane, "--data-plane")
    if port == 65535:
        raise ConfigError(f"port {port} of {host} leaves none after it for the data plane; give --data-plane HOST:PORT")
    return host, port + 1


def check_plain_text(host: str, option: str, insecure: bool) -> None:
    """Raises ConfigError for an address beyond this machine, unless plain text was agreed to."""
    if insecure or is_loopback(host):
        return
    raise ConfigError(
        f"{option} = {host} is beyond this machine, and this version sends plain text: whoever is on the way can read and "
        f"change activations, gradients and adapters, and anyone can join. Use it on a network that you trust, with --insecure"
    )


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def answers(host: str, port: int, timeout_s: float = 2.0) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout_s):
        return True
    return False


def check_port_free(host: str, port: int, option: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentProblem(
                f"port {port} on {host} cannot be opened ({error.strerror}); end what uses it or choose another with {option}"
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- Flower's and ours


def start_superlink(
    host: str, port: int, state: Path, simulation: dict[str, str] | None = None, beside: Hub | None = None
) -> Child:
    """The SuperLink, answering. It starts the ServerApp of each run as a process of its own.

    simulation: and Flower's simulation engine with it, which plays the nodes, in this environment. beside: the hub.
    """
    check_port_free(host, port, "--listen")
    child = Child(
        "SuperLink",
        # The flag keeps it from running `uv sync`, which would fetch torch before each run.
        [
            "flower-superlink",
            "--insecure",
            "--host",
            host,
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
            *(["--simulation"] if simulation is not None else []),
        ],
        state / "superlink.log",
        {
            "FLWR_HOME": str(state / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            **(simulation or {}),
            **(beside.environment if beside else {}),
        },
    )
    _await_answer(child, host, port)
    return child


def _await_answer(child: Child, host: str, port: int) -> None:
    end = time.monotonic() + _START_DEADLINE_S
    while not answers(host, port, 0.5):
        if child.ended() or time.monotonic() > end:
            problem = child.ended() or f"no answer within {_START_DEADLINE_S:.0f} s"
            end_all([child])
            raise EnvironmentProblem(f"the {child.name} did not start: {problem}")
        time.sleep(0.1)


@dataclass
class Hub:
    """The server's end of the data plane (edgelam_fl.hub): a process beside the SuperLink."""

    host: str
    port: int
    state: Path
    child: Child | None = None
    _restarts: list[float] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What a SuperLink hands on to its ServerApps, so that they find the hub."""
        return {hub.PORT: str(self.port), hub.STATE: str(self.state.absolute())}

    def start(self) -> None:
        """Starts it, answering."""
        check_port_free(self.host, self.port, "--data-plane")
        shutil.rmtree(self.state, ignore_errors=True)  # what runs of an earlier server let it do
        self._start()
        assert self.child is not None
        _await_answer(self.child, self.host, self.port)

    def _start(self) -> None:
        command = [sys.executable, "-m", "edgelam_fl.hub.daemon", "--listen", join_address(self.host, self.port)]
        command += ["--state", str(self.state)]
        self.child = Child("hub", command, self.state.parent / "hub.log")

    def watch(self) -> str:
        """Starts it again where it has ended; returns what happened, if anything. Raises RunFailed when it keeps ending."""
        problem = self.child.ended() if self.child else ""
        if not problem:
            return ""
        _note_restart(self._restarts, problem)
        self._start()
        return f"{problem}; it was started again"


def _note_restart(restarts: list[float], problem: str) -> None:
    """Adds one to `restarts`. Raises RunFailed where there are too many in a short time."""
    now = time.monotonic()
    restarts[:] = [moment for moment in restarts if now - moment < _RESTARTS_WITHIN_S] + [now]
    if len(restarts) > _RESTARTS:
        raise RunFailed(f"{problem} (for the {len(restarts)}th time in {_RESTARTS_WITHIN_S:.0f} s)")


@dataclass
class Node:
    """A node of the federation: its stage host, its SuperNode, and what this one's ClientApps are forked from."""

    name: str
    server: str  # host:port of the SuperLink
    state: Path
    data: Path | None = None
    listen: str = ""  # host:port of the data plane; 'relay': only through the hub; '': an edge server takes a free one, a device only dials
    advertise: str = ""
    threads: int = 0
    tags: Sequence[str] = ()  # words by which runs may choose it
    children: dict[str, Child] = field(default_factory=dict)
    _restarts: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Starts all three. `ready` tells when the stage host serves."""
        self.state.mkdir(parents=True, exist_ok=True)
        for start in self._starters().values():
            start()

    def _starters(self) -> dict[str, Callable[[], None]]:
        """By the child's kind."""
        return {
            "stage host": self._start_stage_host,
            "ClientApps": self._start_clientapps,
            "SuperNode": self._start_supernode,
        }

    def _start_stage_host(self) -> None:
        (self.state / "endpoint.json").unlink(missing_ok=True)  # an older one's: whoever calls now waits for the new
        command = [sys.executable, "-m", "edgelam_fl.split.daemon", "--name", self.name, "--state", str(self.state)]
        command += ["--listen", self.listen, "--advertise", self.advertise, "--threads", str(self.threads)]
        command += ["--server", self.server]
        command += ["--data", str(self.data.absolute())] if self.data else []
        command += [f"--tag={tag}" for tag in self.tags]
        # Nodes may share this machine's cores: a thread that spins while it waits takes them from the others.
        # One arena for all threads: what one frees, another can use (the links' threads bring in what compute frees).
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"}
        self.children["stage host"] = Child(
            f"{self.name}'s stage host", command, self.state / "stage-host.log", environment
        )

    def _start_clientapps(self) -> None:
        fifo = clientapps.prepare(self.state.absolute())
        command = [sys.executable, "-m", clientapps.__name__, str(fifo), str(app_folder())]
        self.children["ClientApps"] = Child(
            f"{self.name}'s ClientApps", command, self.state / "clientapps.log", self._for_flower()
        )

    def _start_supernode(self) -> None:
        command = ["flower-supernode", "--insecure", "--superlink", self.server, "--port", str(free_port())]
        command += ["--node-config", f'state="{self.state.absolute()}" name="{self.name}"']
        self.children["SuperNode"] = Child(
            f"{self.name}'s SuperNode", command, self.state / "supernode.log", self._for_flower()
        )

    def _for_flower(self) -> dict[str, str]:
        path = f"{clientapps.folder(self.state.absolute())}{os.pathsep}{tool_environment()['PATH']}"
        return {"FLWR_HOME": str(self.state / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}

    def ready(self) -> bool:
        """Whether the stage host serves. Raises EnvironmentProblem when it ended instead."""
        problem = self.children["stage host"].ended()
        if problem:
            raise EnvironmentProblem(problem)
        return (self.state / "endpoint.json").exists()

    def watch(self) -> str:
        """Starts again what has ended; returns what happened, if anything. Raises RunFailed when it keeps ending."""
        for kind, child in self.children.items():
            shorten(child.log)
            problem = child.ended()
            if not problem:
                continue
            _note_restart(self._restarts, problem)
            self._starters()[kind]()
            return f"{problem}; it was started again"
        return ""
