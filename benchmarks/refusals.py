"""Measures what a stranger who is refused costs a data port with TLS, and what a member's frames wait beside many of them.

Processor time per attempt is that of the process that listens, TLS included; attempts come one after the other, each over a connection
of its own, and a member who is let in is measured in the same way. By the clock: a member sends a frame and waits for the answer,
again and again, alone and beside a process of the lowest priority that knocks as fast as it can. All share the machine's cores.
--smoke: a few attempts and frames.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, main
from edgelam_fl.addresses import split_address
from edgelam_fl.errors import Refused
from edgelam_fl.federation.template import warm_template
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, HOST, load_identity, save_identity
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.secure import Security
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import Frame, Link
from tests.floods import half_open
from tests.links import Heard, hello, make_terms, ready, terms
from tests.support import WAIT_S, cpu_seconds

ATTEMPTS, PAIRS, FRAMES = 300, 5, 1000
MOST_WAIT_MS = 50.0
_MEMBER, _FORKED = "member", multiprocessing.get_context("forkserver")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
Knock = Callable[[], object]


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    warm_template()  # what the other processes import is there once
    attempts, pairs, frames = (10, 1, 20) if smoke else (ATTEMPTS, PAIRS, FRAMES)
    with tempfile.TemporaryDirectory() as name, _listener(Path(name)) as (pid, address):
        kinds = _kinds(address, Path(name))
        for knock in kinds.values():
            knock()
        costs = {kind: _cpu_ms(pid, knock, attempts) for kind, knock in kinds.items()}
        link, heard = _call(address, Path(name), _MEMBER)
        _waits_ms(link, heard, frames)
        alone, beside, knocked = [], [], []
        for _ in range(pairs):
            alone.append(_waits_ms(link, heard, frames))
            with _attack(address, Path(name)) as tally:
                beside.append(_waits_ms(link, heard, frames))
            knocked.append(tally.recv())
        link.close()
    settings = {"attempts": attempts, "pairs": pairs, "frames": frames, "refused beside the frames": knocked}
    figures = [Figure(f"processor time per attempt: {kind}", round(cost, 3), "ms") for kind, cost in costs.items()]
    longest = statistics.median(map(max, beside))
    return settings, [
        *figures,
        Figure("longest wait of a member's frame, alone, median of the pairs", round(statistics.median(map(max, alone)), 2), "ms"),
        Figure(
            "longest wait of a member's frame beside strangers, median of the pairs", round(longest, 2), "ms",
            None if smoke else f"at most {MOST_WAIT_MS:g} ms", None if smoke else longest <= MOST_WAIT_MS,
        ),
        Figure("median wait of a member's frame, alone", round(statistics.median(map(statistics.median, alone)), 3), "ms"),
        Figure("median wait of a member's frame beside strangers", round(statistics.median(map(statistics.median, beside)), 3), "ms"),
        Figure("strangers refused per second", round(statistics.median(each["count"] / each["seconds"] for each in knocked), 1), ""),
    ]  # fmt: skip


def _cpu_ms(pid: int, knock: Knock, attempts: int) -> float:
    before = cpu_seconds(pid)
    for _ in range(attempts):
        knock()
    return 1000 * (cpu_seconds(pid) - before) / attempts


def _waits_ms(link: Link, heard: Heard, frames: int) -> list[float]:
    """Returns the time from each frame to its answer, in ms."""
    waits = []
    for step in range(frames):
        began = time.monotonic()
        link.send(pb.Header(kind=pb.STEP_CLOSE, step=step))
        answer = heard.get(timeout=WAIT_S)
        waits.append(1000 * (time.monotonic() - began))
        assert isinstance(answer, Frame)
        time.sleep(0.002)
    return waits


# ---------------------------------------------------------------- who knocks


def _kinds(address: str, folder: Path) -> dict[str, Knock]:
    """Returns what each kind of caller does, once."""
    return {
        "connects and hangs up": partial(_hang_up, address),
        "plain text": lambda: _hang_up_on(half_open(address, 1)),
        "no certificate": partial(_shake_hands, address, _context(folder, "")),
        "another federation's certificate": partial(_shake_hands, address, _context(folder, "stranger")),
        "a member without a route": partial(_ask_in, address, folder, "insider"),
        "a member who is let in": lambda: _call(address, folder, _MEMBER)[0].close(),
    }


def _hang_up(address: str) -> None:
    socket.create_connection(split_address(address, "the address"), timeout=WAIT_S).close()


def _hang_up_on(connection: socket.socket | None) -> None:
    if connection is not None:
        with suppress(OSError):
            connection.recv(1)
        connection.close()


def _context(folder: Path, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if name:
        context.load_cert_chain(folder / name / "certificate.pem", folder / name / "key.pem")
    return context


def _shake_hands(address: str, context: ssl.SSLContext) -> None:
    """Begins HTTP/2 over TLS, and waits until the port hangs up."""
    plain = socket.create_connection(split_address(address, "the address"), timeout=WAIT_S)
    with suppress(OSError), context.wrap_socket(plain) as connection:  # OSError: it has hung up
        connection.sendall(_PREFACE)
        while connection.recv(1 << 10):
            pass


def _ask_in(address: str, folder: Path, name: str) -> None:
    with suppress(Refused):
        _call(address, folder, name)


def _call(address: str, folder: Path, name: str) -> tuple[Link, Heard]:
    heard = Heard()
    security = Security(load_identity(folder / name))
    return dial(
        "edge-1",
        address,
        "entry edge-1",
        hello(node=name),
        ByteCounters(),
        make_terms(heard),
        WAIT_S,
        security=security,
    ), heard


@contextmanager
def _attack(address: str, folder: Path) -> Iterator[Connection]:
    """Has strangers knock until the block ends; yields where the tally comes then."""
    ours, theirs = _FORKED.Pipe()
    process = _FORKED.Process(target=_knock_on, args=(address, folder, theirs), daemon=True)
    process.start()
    ours.recv()
    yield ours
    ours.send("enough")
    assert ours.poll(WAIT_S)
    process.join()


def _knock_on(address: str, folder: Path, starter: Connection) -> None:
    os.nice(19)
    knocks = list(_kinds(address, folder).values())[:-1]
    count, began = 0, time.monotonic()
    starter.send("begins")
    while not starter.poll():
        knocks[count % len(knocks)]()
        count += 1
    starter.send({"count": count, "seconds": time.monotonic() - began})


# ---------------------------------------------------------------- who listens


@contextmanager
def _listener(folder: Path) -> Iterator[tuple[int, str]]:
    """Runs a data port in a process of its own; yields the process's number and the port's address."""
    authority = Authority.open(folder / "trust")
    for name, role in (("edge-1", HOST), (_MEMBER, DEVICE), ("insider", DEVICE)):
        save_identity(issue(authority, name, role), folder / name)
    stranger = issue(Authority.open(folder / "elsewhere"), _MEMBER, DEVICE)
    save_identity(replace(stranger, authority=authority.certificate), folder / "stranger")
    ours, theirs = _FORKED.Pipe()
    process = _FORKED.Process(target=_listen, args=(folder, theirs), daemon=True)
    process.start()
    assert process.pid is not None
    yield process.pid, ours.recv()
    ours.send("end")
    process.join()


def _listen(folder: Path, starter: Connection) -> None:
    def answer(link: Link, frame: Frame) -> None:
        link.send(pb.Header(kind=pb.STEP_CLOSE, step=frame.header.step))

    def admit(asked: pb.Hello, link: Link) -> pb.Ready | pb.Refuse:
        if asked.node != _MEMBER:
            return pb.Refuse(reason=f"node {asked.node!r} has no route here")
        link.open(terms(answer=ready(), on_frame=answer))
        return ready()

    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT, 0o600), 2)  # each refusal is a line there, as at a node
    server = DataPlaneServer("127.0.0.1", 0, admit, security=Security(load_identity(folder / "edge-1")))
    starter.send(f"127.0.0.1:{server.port}")
    starter.recv()
    server.stop()


if __name__ == "__main__":
    main("refusals", measure)
