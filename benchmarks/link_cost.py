"""Compares the product's link over gRPC with a plain TCP socket: two processes on this machine, tensors one way and round trips.

Messages of 1 MiB one way, eight of them under way, then round trips of 64 KiB, in turns; the work is of both processes. A half of a link's rate and ten times a
round trip sound like much; at 20 Mbit/s a tensor of 1 MiB takes 420 ms, of which the link's work is a hundredth. --smoke: a few messages.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.common import Figure, main
from benchmarks.compared.workers import Step, Trains, Worker, Workers
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.terms import link_terms

BIG, SMALL, TINY, HIDDEN = 1 << 20, 64 << 10, 2 << 10, 512
WINDOW = 8  # messages under way; a link gives up an end that leaves many unread
TURNS, MESSAGES, TRIPS = 5, 100, 200
WAYS = {"grpc one way": 0, "grpc round trips": 1, "tcp one way": 2, "tcp round trips": 3}
READY_S, SILENT_S = 60.0, 60.0


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    turns, messages, trips = (1, 4, 4) if smoke else (TURNS, MESSAGES, TRIPS)
    with ExitStack() as stack:
        server = Worker(receiver, messages, trips)
        stack.callback(server.close)
        client = Worker(sender, *server.answer(), messages, trips)
        stack.callback(client.close)
        client.answer()
        both = Workers([server, client])
        for number in WAYS.values():
            both.step(number)
        steps = {way: list[Step]() for way in WAYS}
        for _ in range(turns):
            for way, number in WAYS.items():
                steps[way].append(both.step(number))
    figures = []
    for way, found in steps.items():
        if "one way" in way:
            figures.append(
                Figure(f"{way}: rate", round(median(messages * BIG / step.wall_s for step in found) / 1e6), "MB/s")
            )
            work = median(step.cpu_s / messages for step in found)
            figures.append(Figure(f"{way}: work per MiB", round(1e3 * work, 2), "CPU ms"))
        else:
            figures.append(Figure(way, round(1e3 * median(step.wall_s / trips for step in found), 3), "ms"))
            work = median(step.cpu_s / trips for step in found)
            figures.append(Figure(f"{way}: work of one", round(1e3 * work, 3), "CPU ms"))
    rates = [median(step.wall_s for step in steps[f"{way} one way"]) for way in ("tcp", "grpc")]
    figures.append(Figure("rate over gRPC, of that of a TCP socket", round(rates[0] / rates[1], 2), ""))
    return {
        "turns": turns,
        "messages": messages,
        "trips": trips,
        "bytes": {"one way": BIG, "round trip": SMALL},
    }, figures


# ---------------------------------------------------------------- in the two processes


def receiver(messages: int, trips: int) -> tuple[Trains, tuple[int, int]]:
    """Takes messages, answers each: those one way with a tiny one. Says the ports of gRPC and TCP."""
    torch.set_num_threads(1)
    through, count = threading.Semaphore(0), 0

    def heard(link: Link, frame: Frame) -> None:
        nonlocal count
        if frame.header.kind != pb.ACT:
            return
        count += 1
        answer = _tensor(TINY if frame.header.step == 0 else SMALL)
        link.send(pb.Header(kind=pb.ACT, phase=pb.TRAIN, step=frame.header.step), answer)
        if count == (messages if frame.header.step == 0 else trips):
            count = 0
            through.release()

    def admit(hello: pb.Hello, link: Link) -> pb.Ready:
        ready = pb.Ready(
            version=PROTOCOL_VERSION, window=WINDOW, activation_codec="raw", gradient_codec="raw", job_token=1
        )
        link.open(_terms(heard)(hello.node, ByteCounters(), ready))
        return ready

    server = DataPlaneServer("127.0.0.1", 0, admit)
    listening = socket.create_server(("127.0.0.1", 0))
    peers: list[socket.socket] = []

    def trains(number: int) -> int:
        if not peers:
            peers.append(listening.accept()[0])
            peers[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if number in (0, 1):
            through.acquire()
        elif number == 2:
            for _ in range(messages):
                _exactly(peers[0], BIG)
            peers[0].sendall(b"k")
        else:
            for _ in range(trips):
                peers[0].sendall(_exactly(peers[0], SMALL))
        return number

    trains.server = server  # type: ignore[attr-defined]  # it lives as long as the steps can be made
    return trains, (server.port, listening.getsockname()[1])


def sender(port: int, tcp_port: int, messages: int, trips: int) -> tuple[Trains, None]:
    """Sends messages, and waits for the answers."""
    torch.set_num_threads(1)
    answers = threading.Semaphore(0)

    def heard(link: Link, frame: Frame) -> None:
        if frame.header.kind == pb.ACT:
            answers.release()

    hello = pb.Hello(version=PROTOCOL_VERSION, job="link", node="device", link=pb.ENTRY, window=WINDOW, codecs=["raw"])
    link = dial("host", f"127.0.0.1:{port}", "entry", hello, ByteCounters(), _terms(heard), READY_S)
    peer = socket.create_connection(("127.0.0.1", tcp_port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    big, small, data = _tensor(BIG), _tensor(SMALL), bytes(BIG)

    def trains(number: int) -> int:
        if number == 0:
            for ahead in range(messages):
                if ahead >= WINDOW:
                    answers.acquire()
                link.send(pb.Header(kind=pb.ACT, phase=pb.TRAIN, step=0), big)
            for _ in range(min(WINDOW, messages)):
                answers.acquire()
        elif number == 1:
            for _ in range(trips):
                link.send(pb.Header(kind=pb.ACT, phase=pb.TRAIN, step=1), small)
                answers.acquire()
        elif number == 2:
            for _ in range(messages):
                peer.sendall(data)
            _exactly(peer, 1)
        else:
            for _ in range(trips):
                peer.sendall(data[:SMALL])
                _exactly(peer, SMALL)
        return number

    return trains, None


def _terms(heard: Any) -> Any:
    return partial(link_terms, most_bytes=BIG, silent_s=SILENT_S, on_frame=heard, on_lost=_give_up)


def _give_up(link: Link, reason: str) -> None:
    """Ends the process: without its link it would wait for ever."""
    print(f"the link is lost: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _tensor(size: int) -> torch.Tensor:
    return torch.zeros(1, size // (4 * HIDDEN), HIDDEN)


def _exactly(peer: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = peer.recv_into(view)
        if not got:
            raise ConnectionError("the other end is gone")
        view = view[got:]
    return data


if __name__ == "__main__":
    from benchmarks import link_cost  # by the name under which the processes that it starts find its functions

    main("link_cost", link_cost.measure)
