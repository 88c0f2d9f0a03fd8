"""A federation of real commands on this machine, with TLS and with lines that can be cut: what a person would start and watch.

`edgelam server`, `edgelam client` once per node, `edgelam run`. Nodes reach SuperLink and hub at 127.0.0.2 and each other at
ports there, through lines; the operator's commands reach the server directly. Knows nothing of faults.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.line import Line
from benchmarks.chaos.processes import MARK, Process, listening, processes
from edgelam_fl.addresses import answers, free_port
from edgelam_fl.trust.identity import DEVICE, HOST
from edgelam_fl.trust.invites import Invitation
from edgelam_fl.trust.server import open_trust
from tests.support import write_data_files, write_tiny_llama

START_S = 400.0
_GRACE_S = 15.0
_OUTSIDE = "127.0.0.2"
_DISK_BYTES = 256 << 20
_POLL_S = 0.2
_TORCH_CACHE = "torchinductor_"  # one empty folder per user, which torch makes when it is imported


@dataclass
class Federation:
    """One server, its edge servers and three devices; started by `start`, ended by `stop`."""

    folder: Path
    edges: list[str]
    relay: bool = False
    """Edge servers are reached through the hub alone."""
    tree: Path | None = None
    """A checkout whose code the commands run; None: that of this process."""
    rules: Sequence[str] = ()
    """Modules in its folder from which runs may take strategies."""
    devices: dict[str, Path] = field(default_factory=dict)
    model: Path = Path()
    commands: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """The newest command by its name: server, a node's name, or run."""
    disks: dict[str, Path] = field(default_factory=dict)
    """Small disks of their own, by what is on them: "server" (the runs), and a device's name (its state). Empty if this user cannot mount."""

    def __post_init__(self) -> None:
        self.mark = f"{os.getpid()}-{time.time_ns():x}"
        self.port = free_port("0.0.0.0", 2)  # the hub takes the second
        self.server = f"127.0.0.1:{self.port}"
        self.environment = {
            **os.environ, MARK: self.mark, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200", "TMPDIR": str(self.folder / "tmp"), "EDGELAM_CACHE": str(self.folder / "cache"),
        }  # fmt: skip
        if self.tree is not None:
            self.environment["PYTHONPATH"] = str(self.tree)
        self.control = Line(self.server, f"{_OUTSIDE}:{self.port}")
        self.hub = Line(f"127.0.0.1:{self.port + 1}", f"{_OUTSIDE}:{self.port + 1}")
        self._data_ports = {edge: free_port("0.0.0.0") for edge in self.edges}
        self.data = {edge: Line(f"127.0.0.1:{port}") for edge, port in self._data_ports.items()}

    # ---------------------------------------------------------------- its life

    @property
    def nodes(self) -> list[str]:
        return [*self.edges, *self.devices]

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def start(self) -> float:
        """Starts everything; returns the seconds until all nodes were here."""
        began = time.monotonic()
        for folder in ("tmp", "nodes", "runs", "models", "data"):
            (self.folder / folder).mkdir(parents=True)
        self.model = write_tiny_llama(self.folder / "models" / "tiny")
        self.devices = {file.stem: file for file in write_data_files(self.folder / "data")}
        for name, place in [("server", self.runs), *((name, self.node_state(name)) for name in self.devices)]:
            place.mkdir(exist_ok=True)
            if _mounted(place):
                self.disks[name] = place
        self.start_server()
        for name in self.nodes:
            self.start_node(name, self._join_text(name))
        self.until(lambda: all(self.is_here(name) for name in self.nodes), START_S, "the nodes")
        return time.monotonic() - began

    def start_server(self) -> None:
        self.command(
            "server", "server", "--listen", self.server, "--state", str(self.folder / "server"), "--runs", str(self.runs),
            "--models", str(self.folder / "models"), "--address", _OUTSIDE,
            *(word for module in self.rules for word in ("--strategies", module)),
        )  # fmt: skip
        self.until(lambda: answers("127.0.0.1", self.port), START_S, "the SuperLink")

    def start_node(self, name: str, join_text: str = "") -> None:
        """Starts a node: the first time by its invitation, later as a service at boot does."""
        options = ["--state", str(self.node_state(name))]
        if not join_text:
            self.command(name, "client", *options, "--wait")
            return
        if name in self.devices:
            options += ["--data", str(self.devices[name])]
        elif self.relay:
            options += ["--listen", "relay"]
        else:
            options += ["--listen", f"127.0.0.1:{self._data_ports[name]}", "--advertise", self.data[name].address]
        self.command(name, "client", "--join", join_text, "--threads", "1", *options)

    def _join_text(self, name: str) -> str:
        trust, role = open_trust(self.folder / "server"), DEVICE if name in self.devices else HOST
        token = trust.members.invite(name, role, 3600.0)
        return Invitation(f"{_OUTSIDE}:{self.port}", role, name, token, trust.authority.fingerprint).text

    def start_run(self, name: str, settings: list[str]) -> Path:
        """Starts `edgelam run`; returns the run's folder."""
        file = self.folder / f"{name}.toml"
        file.write_text("", encoding="utf-8")
        options = [part for setting in settings for part in ("--set", setting)]
        self.command("run", "run", str(file), *self.as_operator, "--out", str(self.runs / name), *options)
        return self.runs / name

    @property
    def as_operator(self) -> list[str]:
        return ["--server", self.server, "--operator", str(self.folder / "server" / "operator")]

    def go_on(self, line: str) -> None:
        """Types a line that a command printed, with the server's address and keys if it leaves them to the person."""
        words = shlex.split(line)[1:]
        self.command("run", *words, *([] if "--server" in words else self.as_operator))

    def stop(self) -> dict[str, list[str]]:
        """Ends it as a person does, by Ctrl-C at each command; returns what was left after that, and removes it."""
        for command in self.commands.values():
            if command.poll() is None:
                command.send_signal(signal.SIGINT)
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end and processes(self.mark):
            time.sleep(_POLL_S)
            for command in self.commands.values():
                command.poll()
        left = processes(self.mark)
        found = {
            "processes": sorted(map(str, left)),
            "ports": listening(process.pid for process in left),
            "temporary files": self._temporary_files(),
        }
        for process in left:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGKILL)
        for command in self.commands.values():
            command.wait()
        for line in [self.control, self.hub, *self.data.values()]:
            line.close()
        for place in self.disks.values():
            subprocess.run(["umount", "-l", str(place)], check=False)
        return found

    def _temporary_files(self) -> list[str]:
        places = [file for file in (self.folder / "tmp").iterdir() if not file.name.startswith(_TORCH_CACHE)]
        places += [file for file in self.folder.rglob("*") if re.search(r"^\.tmp|\.part$|\.tmp$", file.name)]
        return sorted(str(file.relative_to(self.folder)) for file in places)

    # ---------------------------------------------------------------- what goes on

    def command(self, name: str, *words: str) -> None:
        """Starts `edgelam WORDS`, its output in NAME.out."""
        with (self.folder / f"{name}.out").open("ab") as output:
            self.commands[name] = subprocess.Popen(
                [_program(), *words], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def said(self, name: str) -> str:
        file = self.folder / f"{name}.out"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def node_state(self, name: str) -> Path:
        return self.folder / "nodes" / name

    def is_here(self, name: str) -> bool:
        """Returns whether a node serves and Flower knows it."""
        log = self.node_state(name) / "supernode.log"
        serves = (self.node_state(name) / "endpoint.json").exists()
        return serves and log.exists() and "SuperNode ID:" in log.read_text(encoding="utf-8", errors="replace")

    def find(self, kind: str, node: str = "") -> list[Process]:
        return [one for one in processes(self.mark) if one.kind == kind and (not node or one.node == node)]

    def of_node(self, name: str) -> list[Process]:
        """Returns a node's processes that do its work, without the command that watches them."""
        return [one for one in processes(self.mark) if one.node == name and one.kind != "client"]

    def until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits; raises TimeoutError with the last words of all commands."""
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                words = " | ".join(f"{name}: {self.said(name)[-300:]}" for name in self.commands)
                raise TimeoutError(f"waited {seconds:.0f} s for {what}: {words}")
            time.sleep(_POLL_S)


def fill(disk: Path) -> Callable[[], None]:
    """Fills a small disk to its last byte; returns what makes room again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
        with suppress(OSError):
            while True:
                file.seek(0, os.SEEK_END)
                file.write(bytes(4096))
    return lambda: filler.unlink(missing_ok=True)


def _mounted(place: Path) -> bool:
    options = ["-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(place)]
    try:
        return subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _program() -> str:
    return str(Path(sys.executable).with_name("edgelam"))
