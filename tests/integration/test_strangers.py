"""Strangers, and members out of bounds, at the ports of a live federation: all are refused, and the run beside them is the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import pytest
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes
from flwr.supercore.runtime.runtime_http_client import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from safetensors.numpy import load_file

from edgelam_fl.addresses import free_port, join_address
from edgelam_fl.errors import EdgelamError
from edgelam_fl.federation.child import log_tail
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.hub.passes import relay_key
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import RoundFacts, make_plans
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.known import shipped
from edgelam_fl.telemetry.events import (
    TIMELINES_FILE,
    EventTail,
    JobStarted,
    LinkLost,
    LinkSuspended,
    NodeLost,
    NodeRefused,
    PlanMade,
    RoundDone,
    RoundTimeline,
    of_kind,
    read_events,
)
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, SERVER, Identity, save_identity, tls_name
from edgelam_fl.trust.invites import Invitation
from edgelam_fl.trust.join import join, renew, sync
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import control
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.relay import DIAL, LISTEN, RELAY_SERVICE, make_token, token_metadata
from tests.integration.federation import START_DEADLINE_S, Federation, Run, config_of
from tests.links import hello, make_terms
from tests.support import WAIT_S, cpu_seconds

pytestmark = pytest.mark.processes

ATTEMPTS = 3  # during the run
IN_RUN_S = 10.0  # for a host that has the job; it answers at once, however long that takes on a busy machine
TRIES, MOST_PATIENCE_S = 10, 5.0  # after it, at a door whose log has no reason yet
MOST_WAIT_S = 0.05  # of the round beside them, for one who is refused
HOST, HUB, SUPERLINK = "stage host", "hub", "SuperLink"
UNMEASURED = "--trust measured:0.2 of node wary-2 refuses the plan: what hosts read is not measured for"
LEAKY = (
    "--trust measured:0.2 of node wary-2 refuses the plan: with 2 layers in front hosts can read about 100 % of the tokens, and it "
    "allows 20 %"
)
ONCE = {  # a device's forward passes are one through its front and one through its back, whose backward pass is in the latter
    ("host", "forward", 1),
    ("host", "backward", 1),
    ("device", "forward", 2),
    ("device", "backward", 1),
}
NO_HOST = "joined as a device (with --data) and takes part as an edge server (--role host, without --data)"


class Refusal(NamedTuple):
    """What is refused at a door, and the reason in that door's log."""

    who: str
    door: str
    log: str
    reason: str


REFUSALS = (
    Refusal("no certificate", "nameless at the host", HOST, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
    Refusal("no certificate", "nameless at the hub", HUB, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
    Refusal("no certificate", "plain at the host", HOST, "WRONG_VERSION_NUMBER"),
    Refusal("no certificate", "plain at the hub", HUB, "WRONG_VERSION_NUMBER"),
    Refusal("another federation's", "stranger at the host", HOST, "CERTIFICATE_VERIFY_FAILED"),
    Refusal("another federation's", "stranger at the hub", HUB, "CERTIFICATE_VERIFY_FAILED"),
    Refusal("another federation's", "stranger at Flower's", SUPERLINK, "'/v1/fleet/activate-node': this node is no member"),
    Refusal("a revoked one", "revoked at the host", HOST, "refused a link of leaver: the membership of this node has ended"),
    Refusal("a revoked one", "revoked at the hub", HUB, "refused leaver: its membership in the federation has ended"),
    Refusal("a revoked one", "revoked renews", SUPERLINK, "'/v1/edgelam/renew': the membership of leaver was ended"),
    Refusal("an expired token", "late invite", SUPERLINK, "'/v1/edgelam/join': this join command has expired"),
    Refusal("a replayed token", "used invite", SUPERLINK, "'/v1/edgelam/join': this join command has been used already"),
    Refusal("a replayed token", "insider with a device's token", HUB, "refused Dial: insider shows the token of device-1"),
    Refusal("another's route", "insider as a device", HOST, "refused a link of insider: node 'insider' says that it is 'device-1'"),
    Refusal("another's route", "insider as itself", HOST, "refused a link of insider: node 'insider' has no route here"),
    Refusal("another's slice", "insider at the slices", HUB, "refused a slice to insider: no run of this server lets this node"),
    Refusal("another's relay place", "insider at a host's place", HUB, "refused Listen: insider shows no token"),
    Refusal("another's relay place", "insider at the relay", HUB, "refused Dial: insider shows no token"),
    Refusal("a run submitted by a node", "insider submits", SUPERLINK, "'/v1/control/start-run': only the operator"),
    Refusal("a run's task taken over", "insider takes a task", SUPERLINK, "'/v1/runtime/acquire-task': this server does not offer"),
    Refusal("a run's task taken over", "insider speaks for a run", SUPERLINK, "'/v1/runtime/get-nodes': Flower does not know"),
)  # fmt: skip


class Intruders:
    """Everybody who knocks; `outcomes` holds all that came of it, by door."""

    def __init__(self, federation: Federation, elsewhere: Path, model: ModelSource) -> None:
        assert federation.trust is not None
        assert federation.hub is not None
        self._host = federation.nodes["edge-1"].listen
        self._hub = join_address(federation.hub.host, federation.hub.port)
        self._federation, self._folder, self.outcomes = federation, elsewhere, defaultdict[str, list[str]](list)
        self._trust = federation.trust
        self.patience_s = (
            0.3  # of a dialler; on a busy machine it may end before the host has looked at the certificate
        )
        self.job = ""  # that the host plays at this moment
        own = self._trust.authority.certificate  # no secret
        self.stranger = replace(issue(Authority.open(elsewhere), "device-1", DEVICE), authority=own)
        self.insider, self.revoked = self._member("insider"), self._member("leaver")
        self._trust.members.revoke("leaver")
        save_identity(self.revoked, elsewhere / "leaver")
        self._pretender = f"127.0.0.1:{free_port()}"
        self._late, self._used = self._invited("late", -1.0), self._invited("guest", START_DEADLINE_S)
        join(self._used, elsewhere / "guest")
        self._trust.members.revoke("guest")
        key = relay_key(federation.folder / "hub")
        guess, anothers = bytes(32), make_token(key, DIAL, "strangers/1/1/edge-1", "device-1", 1)
        part = "strangers/1/1/edge-1"
        stranger, insider, revoked = map(Security, (self.stranger, self.insider, self.revoked))
        slice_of_all = pb.SliceRequest(model_digest=model.digest)
        self.doors: dict[str, Callable[[], object]] = {
            # First: only a host that has the job can say who has no route in it, and the others take longer than a round.
            "insider as itself": partial(self._link, insider, "insider", ready_s=IN_RUN_S),
            "nameless at the host": partial(self._ping, partial(self._nameless, self._host, "edge-1")),
            "nameless at the hub": partial(self._ping, partial(self._nameless, self._hub, SERVER)),
            **{f"{who} at the hub": partial(self._ping, partial(security.channel, self._hub, SERVER, [])) for who, security in (("plain", PLAIN), ("stranger", stranger), ("revoked", revoked))},
            **{f"{who} at the host": partial(self._link, security, "device-1") for who, security in (("plain", PLAIN), ("stranger", stranger))},
            "revoked at the host": partial(self._link, revoked, "leaver"),
            "revoked renews": partial(renew, federation.server, elsewhere / "leaver"),
            "late invite": partial(join, self._late, elsewhere / "late"),
            "used invite": partial(join, self._used, elsewhere / "second guest"),
            "insider as a device": partial(self._link, insider, "device-1"),
            "pretender as edge-1": partial(self._link, insider, "insider", self._pretender),
            "insider at the slices": partial(self._call, insider, "Slices", "Describe", slice_of_all, guess),
            "insider at a host's place": partial(self._call, insider, RELAY_SERVICE, LISTEN, b"", make_token(guess, LISTEN, part, "insider")),
            "insider at the relay": partial(self._call, insider, RELAY_SERVICE, DIAL, iter([]), make_token(guess, DIAL, part, "insider", 1)),
            "insider with a device's token": partial(self._call, insider, RELAY_SERVICE, DIAL, iter([]), anothers),
            "stranger at Flower's": partial(self._flower, self.stranger, FleetHttpClient, "ActivateNode", ActivateNodeRequest()),
            "insider submits": partial(self._flower, self.insider, ControlHttpClient, "StartRun", StartRunRequest()),
            "insider takes a task": partial(
                self._flower, self.insider, RuntimeHttpClient, "AcquireTask", AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
            ),
            "insider speaks for a run": partial(
                self._flower, self.insider, RuntimeHttpClient, "GetNodes", GetNodesRequest(), RuntimeTokenHttpInterceptor(token="0" * 32)
            ),
        }  # fmt: skip

    @property
    def listeners(self) -> dict[str, tuple[int, Path]]:
        """Process number and log of what listens, by kind."""
        host, hub, superlink = self._federation.nodes["edge-1"], self._federation.hub, self._federation.superlink
        assert hub is not None
        assert hub.child is not None
        children = {HOST: host.children["stage host"], HUB: hub.child, SUPERLINK: superlink}
        return {kind: (child.pid, child.log) for kind, child in children.items()}

    def _member(self, name: str) -> Identity:
        identity = issue(self._trust.authority, name, DEVICE)
        self._trust.members.add(identity)
        return identity

    def _invited(self, name: str, valid_s: float) -> Invitation:
        token = self._trust.members.invite(name, DEVICE, valid_s)
        return Invitation(self._federation.server, DEVICE, name, token, self._trust.authority.fingerprint)

    @contextmanager
    def more_nodes(self, data: Path) -> Iterator[dict[str, NodeProcesses]]:
        """Runs more nodes until the block ends: a device that takes part as a host, one whose owner trusts no host, and one whose
        owner allows hosts to read a fifth of its text.
        """
        federation = self._federation
        start = partial(NodeProcesses, server=federation.server, forked=True)
        folder = federation.folder / "nodes"
        nodes = [
            start("pretender", state=folder / "pretender", listen=self._pretender),
            start("wary-1", state=folder / "wary-1", data=data, threads=1, trust="none"),
            start("wary-2", state=folder / "wary-2", data=data, threads=1, trust="measured:0.2"),
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
            yield {node.name: node for node in nodes}
        finally:
            for node in nodes:
                node.end()
                self._trust.members.revoke(node.name)
            sync(federation.server, self.stranger.authority)

    def knock(self, job: str) -> None:
        """Tries every door once, while the host plays its part of `job`."""
        self.job = job
        for door in self.doors:
            self.knock_at(door)

    def reason(self, refusal: Refusal) -> str:
        """Knocks at one door, each time with more patience, until its log gives the reason; returns what the log says else."""
        return self._knock_until(refusal.door, partial(log_tail, self.listeners[refusal.log][1], 5000), refusal.reason)

    def told(self, door: str, words: str) -> str:
        """Knocks at one door, each time with more patience, until whoever knocks hears `words`; returns what is heard else."""
        return self._knock_until(door, lambda: "\n".join(self.outcomes[door]), words)

    def _knock_until(self, door: str, read: Callable[[], str], words: str) -> str:
        for _ in range(TRIES):
            if words in read():
                return words
            self.patience_s = min(MOST_PATIENCE_S, 2 * self.patience_s)
            self.knock_at(door)
        return words if words in read() else read()

    def knock_at(self, door: str) -> None:
        """Tries one door, and notes what came of it."""
        try:
            self.doors[door]()
            outcome = "let in"
        except (EdgelamError, httpx.HTTPStatusError) as error:
            outcome = str(error)
        except grpc.RpcError as error:
            outcome = str(error.details())
        self.outcomes[door].append(outcome)

    def _link(self, security: Security, node: str, address: str = "", ready_s: float = 0.0) -> None:
        dial(
            "edge-1", address or self._host, "entry edge-1", hello(self.job, node), ByteCounters(), make_terms(),
            ready_s or self.patience_s, security=security,
        ).close()  # fmt: skip

    def _nameless(self, address: str, node: str) -> grpc.Channel:
        """Returns a channel over TLS that shows no certificate."""
        credentials = grpc.ssl_channel_credentials(self.stranger.authority)
        return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", tls_name(node))])

    def _ping(self, open_channel: Callable[[], grpc.Channel]) -> None:
        with open_channel() as channel:
            stub(channel, "Echo", "Ping")(b"", timeout=self.patience_s)

    def _call(self, security: Security, service: str, method: str, request: object, token: bytes) -> None:
        with security.channel(self._hub, SERVER, []) as channel:
            answer = stub(channel, service, method)(request, timeout=WAIT_S, metadata=token_metadata(token))
            list(answer) if method != "Describe" else answer

    def _flower(self, who: Identity, client: Any, method: str, request: Any, *more: Any) -> None:
        """Asks Flower's port as a SuperNode with this member's key does."""
        key = bytes_to_private_key(who.key)
        if isinstance(request, ActivateNodeRequest):
            request.public_key = public_key_to_bytes(key.public_key())
        interceptors = (
            RuntimeVersionHttpInterceptor(component_name="a test"),
            NodeAuthHttpInterceptor(key, key.public_key()),
            *more,
        )
        opened = client.from_server_address(self._federation.server, False, self.stranger.authority, interceptors)
        with ExitStack() as stack:
            stack.callback(opened.close)
            getattr(opened, method)(request)


def micro_batches(run: Run) -> Counter[tuple[object, ...]]:
    """Counts each pass over a micro-batch: by round, node, kind, role, step, number of the micro-batch and whose it was."""
    events = of_kind(read_events(run.path / TIMELINES_FILE), RoundTimeline)
    return Counter(
        (event.round, node, one.kind, one.role, one.step, one.micro_batch, one.peer)
        for event in events
        for node, intervals in event.nodes.items()
        for one in intervals
        if one.kind in ("forward", "backward")
    )


def leaky_plan(device: str, tiny: ModelSource) -> pb.SubmitRequest:
    """A plan with a host for one device, which names a model of which more than a fifth can be read at the device's layers."""
    known = next(one for one in shipped() if one.model == "smollm2-135m")
    spec = RunSpec(config_of(tiny.name, "federation.min_nodes=1"), tiny)
    profiles = {"edge-1": pb.Profile(name="edge-1", role=pb.EDGE), device: pb.Profile(name=device, role=pb.DEVICE)}
    layout = make_layout(spec, [profiles[device]], [profiles["edge-1"]])
    plan = make_plans(spec, RoundFacts("leaky", 1, 1, 0, 1), profiles, layout, {}, {device: b"secret"})[device]
    plan.model.name, plan.model.weights_digest = known.model, known.digest
    return pb.SubmitRequest(plan=plan)


def test_strangers_are_refused_and_the_run_beside_them_is_the_same(
    averaged: Run, federation: Federation, tiny: ModelSource, tmp_path: Path
) -> None:
    """All of REFUSALS knock while a run goes on, and each is refused with the reason in the log of the process that it knocked at.

    The run beside them: the adapter is that of the run without them, to the bit; each pass over a micro-batch was done once, and they are
    the same passes; no link of a member broke, and no device was left out. Two more devices, whose owners allow hosts less than the run
    asks for, take no part: the server does not plan for one of them, and the other refuses its plan.

    Waits: what one who is refused costs the process that refuses it, TLS and all, is measured in processor time, which does not
    depend on what else the machine does. A member waits for nobody who is refused beyond that: test_refusals_hold_nobody_up stops the
    judging of strangers in the middle, and members go on. By the clock: `python -m benchmarks.refusals`.
    """
    host = EventTail(federation.nodes["edge-1"].state / "events.jsonl")
    host.poll()
    intruders, heard, attempts = Intruders(federation, tmp_path, tiny), list(host.poll()), 0

    def knock() -> None:
        nonlocal attempts
        heard.extend(host.poll())
        started = list(of_kind(heard, JobStarted))
        if attempts < ATTEMPTS and started:
            attempts += 1
            intruders.knock(started[-1].job.rpartition("/")[0])

    with intruders.more_nodes(federation.data["device-1"]) as more:
        run = federation.run("strangers", config_of(tiny.name), knock)
        hears = "its certificate is another node's"
        assert intruders.told("pretender as edge-1", hears) == hears
        with control(more["wary-2"].state) as stage_host:
            answer = stage_host.call("Submit", leaky_plan("wary-2", tiny), WAIT_S)
    heard.extend(host.poll())
    assert attempts

    # the devices whose owners allow less
    assert all("--trust none" in plan.why["wary-1"] and "wary-1" not in plan.selected for plan in run.of_kind(PlanMade))
    refusals = [lost.reason for lost in run.of_kind(NodeLost) if lost.node == "wary-2"]
    assert refusals
    assert all(reason.startswith(UNMEASURED) for reason in refusals)
    assert not answer.accepted
    assert answer.reason == LEAKY

    # the run
    ours, theirs = (load_file(path / "adapter/adapter_model.safetensors") for path in (run.path, averaged.path))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    passes = micro_batches(run)
    assert passes == micro_batches(averaged)
    assert {(role, kind, count) for (_, _, kind, role, *_), count in passes.items()} == ONCE, "not one was done again"
    assert {lost.link for lost in of_kind(heard, LinkLost)} <= {"wary-2"}, (
        "a member's place is given up only if it takes no part"
    )
    assert not list(of_kind(heard, LinkSuspended))
    assert all(plan.first_step == 0 for plan in run.of_kind(PlanMade))
    assert all(not device.left_out for done in run.of_kind(RoundDone) for device in done.devices)

    # the refusals
    refused = {one.node: one.reason.partition(";")[0] for one in run.of_kind(NodeRefused)}
    assert refused["pretender"] == NO_HOST
    for refusal in REFUSALS:
        assert intruders.reason(refusal) == refusal.reason, refusal
    assert {door for door, outcomes in intruders.outcomes.items() if "let in" in outcomes} == set()
    assert set(intruders.doors) == {refusal.door for refusal in REFUSALS} | {"pretender as edge-1"}

    for kind, (pid, _) in intruders.listeners.items():
        doors = [refusal.door for refusal in REFUSALS if refusal.log == kind and refusal.door != "insider as itself"]
        before = cpu_seconds(pid)
        for door in doors:
            intruders.knock_at(door)
        assert (cpu_seconds(pid) - before) / len(doors) < MOST_WAIT_S, f"what a refusal costs the {kind}"
