"""Strangers, and members out of bounds, at the ports of a live federation: all are refused, and the run beside them is the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file

from edgelam_fl.addresses import free_port, join_address
from edgelam_fl.errors import EdgelamError
from edgelam_fl.federation.child import log_tail
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.hub.link_speed import measure_link
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import EventTail, JobStarted, LinkLost, NodeRefused, PlanMade, RoundDone, of_kind
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, SERVER, Identity, save_identity
from edgelam_fl.trust.join import sync
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.relay import DIAL, LISTEN, RELAY_SERVICE, make_token, token_metadata
from tests.integration.federation import START_DEADLINE_S, Federation, Run, config_of
from tests.links import hello, make_terms
from tests.support import WAIT_S

pytestmark = pytest.mark.processes

ATTEMPTS = 3  # during the run
TRIES, MOST_PATIENCE_S = 10, 5.0  # after it, for a log that has no reason yet


class Intruders:
    """Everybody who knocks; `outcomes` holds all that came of it, by who and where."""

    def __init__(self, federation: Federation, elsewhere: Path) -> None:
        assert federation.trust is not None
        assert federation.hub is not None
        self._host = federation.nodes["edge-1"].listen
        self._hub = join_address(federation.hub.host, federation.hub.port)
        self._federation, self.outcomes = federation, defaultdict[str, list[str]](list)
        self.patience_s = (
            0.3  # of a dialler; on a busy machine it may end before the host has looked at the certificate
        )
        own = federation.trust.authority.certificate  # no secret
        self.stranger = replace(issue(Authority.open(elsewhere), "device-1", DEVICE), authority=own)
        self.insider, self.revoked = self._member("insider"), self._member("leaver")
        federation.trust.members.revoke("leaver")
        self._pretender = f"127.0.0.1:{free_port()}"

    def _member(self, name: str) -> Identity:
        assert self._federation.trust is not None
        identity = issue(self._federation.trust.authority, name, DEVICE)
        self._federation.trust.members.add(identity)
        return identity

    @contextmanager
    def more_nodes(self, data: Path) -> Iterator[None]:
        """Runs two more nodes until the block ends: a device that takes part as a host, and one whose owner trusts no host."""
        federation = self._federation
        assert federation.trust is not None
        folder = federation.folder / "nodes"
        nodes = [
            NodeProcesses("pretender", federation.server, folder / "pretender", listen=self._pretender, forked=True),
            NodeProcesses("wary", federation.server, folder / "wary", data, threads=1, trust="none", forked=True),
        ]
        for node in nodes:
            node.identity = node.state / "identity"
            save_identity(self._member(node.name), node.identity)
        sync(federation.server, self.stranger.authority)
        here = lambda: federation.superlink.log.read_text("utf-8").count("Activated node_id")  # noqa: E731
        before = here()
        for node in nodes:
            node.start()
        try:
            are_here = lambda: all(node.ready() for node in nodes) and here() == before + len(nodes)  # noqa: E731
            federation.wait_for(are_here, START_DEADLINE_S, "the nodes out of bounds")
            yield
        finally:
            for node in nodes:
                node.end()
                federation.trust.members.revoke(node.name)
            sync(federation.server, self.stranger.authority)

    def knock(self) -> None:
        """Tries every door once."""
        stranger, insider, revoked = map(Security, (self.stranger, self.insider, self.revoked))
        for who, security in (("plain", PLAIN), ("stranger", stranger), ("insider", insider), ("revoked", revoked)):
            self._try(f"{who} at the host", partial(self._link, security, "device-1"))
        self._try("insider as itself at the host", lambda: self._link(insider, "insider"))
        self._try("pretender as edge-1", lambda: self._link(insider, "insider", self._pretender))
        for who, security in (("plain", PLAIN), ("stranger", stranger), ("revoked", revoked)):
            self._try(f"{who} at the hub", partial(self._measure, security))
        self._try(
            "insider at the slices",
            lambda: self._call(insider, "Slices", "Describe", pb.SliceRequest(model_digest="0" * 64)),
        )
        forged = make_token(bytes(32), LISTEN, "run/1/1/edge-1", "insider")
        self._try("insider at a host's place", lambda: self._call(insider, RELAY_SERVICE, LISTEN, b"", forged))
        forged = make_token(bytes(32), DIAL, "run/1/1/edge-1", "insider", 1)
        self._try("insider at the relay", lambda: self._call(insider, RELAY_SERVICE, DIAL, iter([]), forged))

    def knock_until_logged(self, log: Path, words: str) -> None:
        """Tries every door, each time with more patience, until a log gives the reason."""
        self._knock_until(lambda: log_tail(log, 1000), words)

    def knock_until_told(self, what: str, words: str) -> None:
        """Tries every door, each time with more patience, until one who knocks there gets these words."""
        self._knock_until(lambda: "\n".join(self.outcomes[what]), words)

    def _knock_until(self, read: Callable[[], str], words: str) -> None:
        for _ in range(TRIES):
            if words in read():
                return
            self.patience_s = min(MOST_PATIENCE_S, 2 * self.patience_s)
            self.knock()
        assert words in read()

    def _try(self, what: str, attempt: Callable[[], object]) -> None:
        try:
            attempt()
            outcome = "let in"
        except (EdgelamError, grpc.RpcError) as error:
            outcome = error.details() if isinstance(error, grpc.RpcError) else str(error)
        self.outcomes[what].append(outcome)

    def _link(self, security: Security, node: str, address: str = "") -> None:
        dial(
            "edge-1", address or self._host, "entry edge-1", hello("averaged/1/1", node), ByteCounters(), make_terms(),
            self.patience_s, security=security,
        ).close()  # fmt: skip

    def _measure(self, security: Security) -> None:
        host, _, port = self._hub.rpartition(":")
        measure_link(host, int(port), 2.0, security)

    def _call(self, security: Security, service: str, method: str, request: object, token: bytes = b"") -> None:
        with security.channel(self._hub, SERVER, []) as channel:
            answer = stub(channel, service, method)(request, timeout=WAIT_S, metadata=token_metadata(token))
            list(answer) if method != "Describe" else answer


def test_strangers_are_refused_and_the_run_beside_them_is_the_same(
    averaged: Run, federation: Federation, tiny: ModelSource, tmp_path: Path
) -> None:
    host = EventTail(federation.nodes["edge-1"].state / "events.jsonl")
    host.poll()
    intruders, heard, attempts = Intruders(federation, tmp_path), list(host.poll()), 0

    def knock() -> None:
        nonlocal attempts
        heard.extend(host.poll())
        if attempts < ATTEMPTS and any(of_kind(heard, JobStarted)):
            attempts += 1
            intruders.knock()

    with intruders.more_nodes(federation.data["device-1"]):
        run = federation.run("strangers", config_of(tiny.name), knock)
        intruders.knock_until_told("pretender as edge-1", "its certificate is another node's")
    heard.extend(host.poll())
    assert attempts
    assert all("--trust none" in plan.why["wary"] and "wary" not in plan.selected for plan in run.of_kind(PlanMade))
    ours, theirs = (load_file(path / "adapter/adapter_model.safetensors") for path in (run.path, averaged.path))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours), "not a micro-batch was done again"
    assert not any(of_kind(heard, LinkLost))
    (refused,) = run.of_kind(NodeRefused)
    assert (refused.node, refused.reason.partition(";")[0]) == (
        "pretender",
        "joined as a device (with --data) and takes part as an edge server (--role host, without --data)",
    )
    assert all(not device.left_out for done in run.of_kind(RoundDone) for device in done.devices)
    stage_host, hub = federation.nodes["edge-1"].state / "stage-host.log", federation.folder / "hub.log"
    intruders.knock_until_logged(stage_host, "refused a link of insider")
    intruders.knock_until_logged(stage_host, "CERTIFICATE_VERIFY_FAILED")  # of the stranger
    intruders.knock_until_logged(stage_host, "WRONG_VERSION_NUMBER")  # of plain text
    intruders.knock_until_logged(hub, "refused leaver: its membership in the federation has ended")
    intruders.knock_until_told("insider at the host", "node 'insider' says that it is 'device-1'")
    intruders.knock_until_told("insider at the relay", "no token of this server for that")
    intruders.knock_until_told("insider at the slices", "no run of this server lets this node fetch")
    assert {what for what, outcomes in intruders.outcomes.items() if "let in" in outcomes} == set()
