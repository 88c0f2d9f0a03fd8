"""A stranger who is being judged holds nothing that a member waits for: no lock, no thread and no place.

At each of the program's ports the judging of strangers is stopped in the middle, for as long as the test lasts, and members go on. So
a refusal costs members the processor time that it takes and nothing else, however slow a machine is; how much that is, `python -m
benchmarks.refusals` measures.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.errors import EdgelamError
from edgelam_fl.federation.guard import OWN_ROUTES, Guard, Receive, Scope, Send
from edgelam_fl.hub import passes
from edgelam_fl.trust.identity import HOST, Identity
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.options import LinkTiming
from edgelam_fl.wire.grpc.secure import Security
from edgelam_fl.wire.grpc.serve import DataPlaneServer, RelayedDoor
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.relay import BEHIND, DIAL, LISTEN, Relay
from edgelam_fl.wire.relay import read_token as truly_read_token
from tests.links import Heard, hello, make_terms, ready, terms
from tests.members import SmallFederation
from tests.support import WAIT_S

STRANGERS = 24
FRAMES = 20
PATIENT = LinkTiming(hello_s=3600.0, answer_s=3600.0, connect_s=WAIT_S)


class Judge:
    """Judges strangers and never comes to an end, until it is told to."""

    def __init__(self) -> None:
        self.over, self._begun = threading.Event(), threading.Semaphore(0)

    def judge(self) -> None:
        self._begun.release()
        self.over.wait(WAIT_S)

    def await_strangers(self, number: int) -> None:
        """Waits until so many are being judged."""
        for _ in range(number):
            assert self._begun.acquire(timeout=WAIT_S)


class Door:
    """The data port of a host: lets in ann and ben, and judges others without end."""

    def __init__(self, identity: Identity) -> None:
        self.security, self.judge, self.heard = Security(identity), Judge(), Heard()
        self.server = DataPlaneServer("127.0.0.1", 0, self.admit, PATIENT, self.security)
        self.address = f"127.0.0.1:{self.server.port}"

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.Refuse:
        if hello.node not in ("ann", "ben"):
            self.judge.judge()
            return pb.Refuse(reason="a stranger")
        link.open(terms(answer=ready(), heard=self.heard))
        return ready()


def call(door: Door, who: Identity, way: Relay | None = None, judge: Judge | None = None) -> Link:
    """Dials a host. `judge`: of one who gives up as soon as the judging goes on; None: the dialler does not give up."""

    def given_up() -> str:
        return "refused" if judge is not None and judge.over.is_set() else ""

    address = BEHIND + "edge-1" if way is not None else door.address
    return dial(
        "edge-1", address, "entry edge-1", hello(node=who.name), ByteCounters(), make_terms(), WAIT_S, way, given_up,
        timing=PATIENT, security=Security(who),
    )  # fmt: skip


def exchange(link: Link, heard: Heard) -> None:
    """Sends frames on an open link, each after the one before has arrived."""
    for step in range(FRAMES):
        link.send(pb.Header(kind=pb.STEP_CLOSE, step=step))
        frame = heard.get(timeout=WAIT_S)
        assert isinstance(frame, Frame)
        assert frame.header.step == step


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[SmallFederation]:
    made = SmallFederation(tmp_path)
    yield made
    made.hub.stop()


@contextmanager
def opened(federation: SmallFederation) -> Iterator[Door]:
    door = Door(federation.join("edge-1", HOST))
    try:
        yield door
    finally:
        door.judge.over.set()
        door.server.stop()


@contextmanager
def knocking(judge: Judge, knock: Any, refusals: list[str], number: int = STRANGERS) -> Iterator[None]:
    """Has strangers knock at the same time; the block runs while all of them are being judged. Keeps what they are told."""

    def try_once() -> None:
        try:
            knock()
        except EdgelamError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=try_once, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    judge.await_strangers(number)
    try:
        yield
    finally:
        judge.over.set()
        for thread in threads:
            thread.join(WAIT_S)


def test_members_pass_a_hosts_port_while_strangers_are_judged_there(federation: SmallFederation) -> None:
    """A link that is open goes on, and another member is let in."""
    ann, ben, mallory, refusals = *map(federation.join, ("ann", "ben", "mallory")), list[str]()
    with opened(federation) as door:
        link = call(door, ann)
        with knocking(door.judge, partial(call, door, mallory, None, door.judge), refusals):
            exchange(link, door.heard)
            newcomer = call(door, ben)
            exchange(newcomer, door.heard)
            assert not refusals, "all of them are still being judged"
        assert len(refusals) == STRANGERS
        link.close()
        newcomer.close()


def test_members_pass_the_hub_while_strangers_are_judged_there(
    federation: SmallFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relayed link that is open goes on, and another member gets one."""
    ann, ben, mallory, refusals = *map(federation.join, ("ann", "ben", "mallory")), list[str]()
    judge, stolen = Judge(), federation.way(DIAL, "ann")

    def read_token(key: bytes, method: str, token: bytes) -> pb.RelayPass | None:
        if token == b"guessed":
            judge.judge()
        return truly_read_token(key, method, token)

    monkeypatch.setattr(passes, "read_token", read_token)
    with opened(federation) as door:
        relayed = RelayedDoor(federation.way(LISTEN, "edge-1"), door.admit, PATIENT, door.security)
        link = call(door, ann, federation.way(DIAL, "ann"))
        guess = Relay(stolen.hub, b"guessed")
        with knocking(judge, partial(call, door, mallory, guess, judge), refusals):
            exchange(link, door.heard)
            newcomer = call(door, ben, federation.way(DIAL, "ben"))
            exchange(newcomer, door.heard)
            assert not refusals
        link.close()
        newcomer.close()
        relayed.close()


def test_nodes_pass_flowers_port_while_strangers_are_answered_there() -> None:
    """More strangers ask to join than an event loop has threads by itself; a node's request is judged and passed on meanwhile."""
    judge, passed, most = Judge(), list[str](), 40  # Python's own loops have up to 32

    async def flower(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope["path"])

    def join(asked: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        judge.judge()
        return 403, {"detail": "no such invite"}

    guard = Guard(flower=flower, token="", judge_run=lambda body: "", own={"join": join})

    async def ask(path: str) -> None:
        async def receive() -> Mapping[str, Any]:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                passed.append(f"{message['status']}")

        await guard(
            {"type": "http", "path": path, "headers": [], "client": ("192.0.2.7", 5), "server": None}, receive, send
        )

    async def all_of_them() -> None:
        strangers = [asyncio.create_task(ask(f"{OWN_ROUTES}join")) for _ in range(most)]
        await asyncio.to_thread(judge.await_strangers, 1)
        try:
            await asyncio.wait_for(ask("/v1/fleet/pull-messages"), WAIT_S)
            assert passed == ["/v1/fleet/pull-messages"]
        finally:
            judge.over.set()
        await asyncio.gather(*strangers)

    asyncio.run(all_of_them())
    assert passed[1:] == ["403"] * most
