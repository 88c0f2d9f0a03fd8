"""The faults: which there are, a seeded order of them, and how each is done. Knows the federation, but no run and no event."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.chaos.federation import Federation, fill
from benchmarks.chaos.line import Line, owns
from benchmarks.chaos.processes import Process, processes

LONG_S, SHORT_S = 25.0, 8.0
RESTART_S = 3.0  # after which a service manager starts a killed command again
_FIND_S = 10.0

_SECONDS = {"stop8": SHORT_S, "stop25": LONG_S, "hole25": LONG_S, "part25": LONG_S, "full25": LONG_S}
_PROCESS = ("kill", "stop8", "stop25")
_NETWORK = ("cut", "part25", "hole25")
_NODE = {"stage": _PROCESS, "supernode": _PROCESS, "client": ("kill", "stop25"), "links": _NETWORK, "control": _NETWORK}
ACTIONS: dict[str, tuple[str, ...]] = {
    **{f"device-{part}": actions for part, actions in _NODE.items()},
    "device-network": ("hole25",),
    "device-disk": ("full25",),
    **{f"edge-{part}": actions for part, actions in _NODE.items()},
    "hub": _PROCESS,
    "superlink": _PROCESS,
    "serverapp": _PROCESS,
    "server": ("kill", "stop8"),
    "server-disk": ("full25",),
    "run": ("kill",),
    "everything": ("kill",),
}
"""What is done to what. stage: the stage host; client: the command that watches a node's processes; links: all connections of
its data plane, those through the hub included; control: all to the SuperLink; network: both; everything: power is lost."""


@dataclass(frozen=True)
class Fault:
    action: str
    target: str
    victim: str
    """The node that is struck; empty: none, or all."""
    moment: float
    """When, as a share of a round."""

    def __str__(self) -> str:
        return f"{self.action}:{self.target}{f' ({self.victim})' if self.victim else ''}"

    @staticmethod
    def of(text: str) -> Fault:
        """Returns the fault that `str` wrote, without its moment."""
        kind, _, victim = text.rstrip(")").partition(" (")
        action, _, target = kind.partition(":")
        return Fault(action, target, victim, math.nan)

    @property
    def seconds(self) -> float:
        """How long it lasts; 0: it is over at once."""
        return _SECONDS.get(self.action, 0.0)


def schedule(seed: int, count: int, devices: Sequence[str], targets: Sequence[str] = ()) -> list[Fault]:
    """Draws `count` faults: all kinds in a random order, then all again. targets: those wanted, as TARGET or ACTION:TARGET."""
    chance = random.Random(seed)
    kinds = [(action, target) for target, actions in ACTIONS.items() for action in actions]
    if targets:
        kinds = [kind for kind in kinds if kind[1] in targets or ":".join(kind) in targets]
    drawn: list[Fault] = []
    while len(drawn) < count:
        for action, target in chance.sample(kinds, len(kinds)):
            victim = chance.choice(list(devices)) if target.startswith("device-") else ""
            drawn.append(Fault(action, target, victim, chance.uniform(0.0, 1.2)))
    return drawn[:count]


@dataclass(frozen=True)
class Struck:
    """What a fault has hit."""

    what: str
    """In words; empty: nothing."""
    mend: Callable[[], None] | None = None
    """Does what a service manager does after RESTART_S; None: nothing is to be done."""


def strike(fault: Fault, federation: Federation, host: str) -> Struck:
    """Does the fault. `host`: the edge server that holds the layers now."""
    place, _, part = fault.target.partition("-")
    name = fault.victim or (host if place == "edge" else "")
    if part in ("links", "control", "network"):
        return _strike_network(fault, federation, name, part)
    if part == "disk":
        return _fill(fault, federation, name or "server")
    if fault.target == "everything":
        return _lose_power(federation)
    hit = _await_processes(federation, part or place, name)
    for process in hit:
        _strike_process(process, fault)
    mend = None
    if fault.action == "kill" and part == "client":
        mend = _starter(federation, name)
    if fault.action == "kill" and fault.target == "server":
        mend = federation.start_server
    return Struck(", ".join(map(str, hit)), mend)


def _await_processes(federation: Federation, kind: str, node: str) -> list[Process]:
    """Returns the processes of a kind; waits for one a while, since some are just being started again."""
    end = time.monotonic() + _FIND_S
    while not (found := federation.find(kind, node)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _strike_process(process: Process, fault: Fault) -> None:
    if fault.action == "kill":
        process.signal(signal.SIGKILL)
        return
    process.signal(signal.SIGSTOP)
    _later(fault.seconds, lambda: process.signal(signal.SIGCONT))


def _strike_network(fault: Fault, federation: Federation, name: str, part: str) -> Struck:
    lines: list[tuple[Line, Callable[[int], bool]]] = []
    pids = [process.pid for process in federation.of_node(name)]

    def own(port: int) -> bool:
        return owns(pids, port)

    if part in ("control", "network"):
        lines.append((federation.control, own))
    if part in ("links", "network"):
        lines.append((federation.hub, own))
        for edge, line in federation.data.items():
            lines.append((line, (lambda port: True) if edge == name else own))
    end = time.monotonic() + _FIND_S
    while not (count := sum(line.open_to(hits) for line, hits in lines)) and time.monotonic() < end:
        time.sleep(0.02)
    for line, hits in lines:
        if fault.action == "cut":
            line.cut(hits)
        else:
            _later(fault.seconds, line.refuse(hits) if fault.action == "part25" else line.silence(hits))
    return Struck(f"{count} connections of {name}" if count or fault.seconds else "")


def _fill(fault: Fault, federation: Federation, what: str) -> Struck:
    if what not in federation.disks:
        return Struck("")
    _later(fault.seconds, fill(federation.disks[what]))
    return Struck(f"the disk of {what}")


def _lose_power(federation: Federation) -> Struck:
    hit = processes(federation.mark)
    for process in hit:
        process.signal(signal.SIGKILL)

    def mend() -> None:
        federation.start_server()
        for name in federation.nodes:
            federation.start_node(name)

    return Struck(f"{len(hit)} processes", mend)


def _starter(federation: Federation, name: str) -> Callable[[], None]:
    return lambda: federation.start_node(name)


def _later(seconds: float, act: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
