"""Nodes in network namespaces of their own that reach the server and nobody else, and whom nobody reaches.

`home` holds a device, `away` an edge server that listens nowhere. The other edge server listens on this machine's loopback,
where the other devices find it and the one at home does not. Nobody told anyone who reaches whom, but for `--listen relay`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgelam_fl.addresses import free_port
from edgelam_fl.errors import RunFailed
from edgelam_fl.federation.child import Child, end_all, log_tail
from edgelam_fl.federation.hub_process import HubProcess
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.federation.operator import Operator, operator_folder
from edgelam_fl.federation.submission import Submission
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import Event, RoundDone, RunDone, of_kind
from tests.integration.federation import Run, config_of
from tests.support import WAIT_S

pytestmark = pytest.mark.processes

NUMBER = os.getpid() % 250  # of this test's networks, should two run at a time


@dataclass(frozen=True)
class Namespace:
    name: str
    server: str  # this machine's address in it

    def run(self, *command: str) -> None:
        subprocess.run(self.inside(*command), check=True, capture_output=True, text=True)

    def inside(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]


@dataclass
class NodeElsewhere(NodeProcesses):
    """A node whose processes, forked like others, are in a network namespace; None: in this machine's own."""

    space: Namespace | None = None

    def _start_child(self, kind: str, command: Sequence[str], log: str) -> None:
        python, option, *module = command
        into = ["tests.integration.in_namespace", f"/run/netns/{self.space.name}"] if self.space else []
        super()._start_child(kind, [python, option, *into, *module], log)


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


def make(name: str, number: int) -> Namespace:
    """Joined to this machine by a wire: no route leads further, and nothing that is begun outside comes in."""
    space = Namespace(f"edgelam-{name}-{os.getpid()}", f"10.{NUMBER}.{number}.1")
    outer, inner = f"el{number}o{os.getpid()}", f"el{number}i{os.getpid()}"
    ip(f"netns add {space.name}")
    ip(f"link add {outer} type veth peer name {inner} netns {space.name}")
    ip(f"addr add {space.server}/30 dev {outer}")
    ip(f"link set {outer} up")
    for words in (
        "link set lo up",
        f"addr add 10.{NUMBER}.{number}.2/30 dev {inner}",
        f"link set {inner} up",
    ):
        space.run("ip", *words.split())
    space.run("iptables", "-A", "INPUT", "-i", inner, "-p", "tcp", "--syn", "-j", "DROP")
    return space


@pytest.fixture
def spaces() -> Iterator[tuple[Namespace, Namespace]]:
    if os.geteuid() or not (shutil.which("ip") and shutil.which("iptables")):
        pytest.skip("network namespaces need root, ip and iptables")
    try:
        yield make("home", 1), make("away", 2)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    finally:
        for name in ("home", "away"):
            subprocess.run(["ip", "netns", "del", f"edgelam-{name}-{os.getpid()}"], check=False, capture_output=True)


def test_nodes_that_reach_the_server_alone_train_through_its_relay(
    spaces: tuple[Namespace, Namespace],
    few_pairs: dict[str, Path],
    averaged: Run,
    tiny: ModelSource,
    tmp_path: Path,
) -> None:
    home, away = spaces
    port = free_port()
    hub = HubProcess("0.0.0.0", free_port(), tmp_path / "hub", insecure=True)
    children: list[Child] = []
    nodes = [
        NodeElsewhere(
            name,
            f"{space.server if space else '127.0.0.1'}:{port}",
            tmp_path / name,
            data=few_pairs.get(name),
            threads=1,
            forked=True,
            insecure=True,
            space=space,
        )
        for name, space in (("device-1", home), ("device-2", None), ("device-3", None), ("edge-1", None))
    ]
    try:
        hub.start()
        assert hub.child is not None
        children = [hub.child, start_superlink("0.0.0.0", port, tmp_path / "server", beside=hub)]
        for node in nodes:
            node.start()
            children += node.children.values()
        command = [str(Path(sys.executable).with_name("edgelam")), "client", "--insecure", "--threads", "1"]
        command += ["--server", f"{away.server}:{port}", "--name", "edge-2", "--state", str(tmp_path / "edge-2")]
        children.append(Child("edge-2", away.inside(*command, "--listen", "relay"), tmp_path / "edge-2.log"))
        events = train(f"127.0.0.1:{port}", tiny, tmp_path, children)
    finally:
        end_all(children)
    ours, theirs = (load_file(path / "adapter/adapter_model.safetensors") for path in (tmp_path / "run", averaged.path))
    assert ours
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    trained = [device for done in of_kind(events, RoundDone) for device in done.devices]
    assert trained
    for device in trained:
        assert device.bytes_relayed > 0, "its exit is the host that nobody reaches"
        everything = device.bytes_relayed == device.bytes_up + device.bytes_down
        assert everything == (device.name == "device-1"), "the others find their entry themselves"


def train(server: str, model: ModelSource, folder: Path, children: list[Child]) -> list[Event]:
    """Trains over both edge servers; returns the run's events."""
    submission = Submission(Operator(server, operator_folder(folder / "server")))
    submission.submit(config_of(model.name, "split.hosts=2"), folder / "run")

    def all_run() -> None:
        ended = [child.ended() for child in children if child.ended()]
        if ended:
            raise RunFailed("; ".join(ended))

    try:
        events = list(submission.events(WAIT_S, meanwhile=all_run))
    except RunFailed as error:
        error.add_note("\n".join(f"{log.name}: {log_tail(log, 5)}" for log in sorted(folder.rglob("*.log"))))
        raise
    assert isinstance(events[-1], RunDone), events[-1]
    return events
