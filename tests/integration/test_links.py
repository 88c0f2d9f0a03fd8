"""Real links where the network is slow, idle, or not what it should be."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
import torch

from edgelam_fl.errors import PeerLost
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc import dial as dialling
from edgelam_fl.wire.grpc import options as grpc_options
from edgelam_fl.wire.grpc import serve as serving
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import CHUNK_BYTES, MIN_CHUNK_BYTES, Frame, Link
from edgelam_fl.wire.pace import Pace

Heard = queue.Queue[Frame | str]


def ears(heard: Heard) -> tuple[Callable[[Link, Frame], None], Callable[[Link, str], None]]:
    return (lambda link, frame: heard.put(frame)), (lambda link, reason: heard.put(reason))


def hello() -> pb.Hello:
    return pb.Hello(version=PROTOCOL_VERSION, job="test/1/1", node="device-1", window=1, codecs=["raw"])


@contextmanager
def open_pair(silent_s: float) -> Iterator[tuple[Link, Heard, Link, Heard]]:
    """Both ends of a link over loopback, and what they hear: the dialler's, the host's."""
    near_heard, far_heard, admitted = Heard(), Heard(), list[Link]()

    def admit(hello: pb.Hello, link: Link) -> pb.Ready:
        link.attach(*ears(far_heard))
        link.silent_s, link.max_tensor_bytes = silent_s, 1 << 20
        admitted.append(link)
        return pb.Ready(version=PROTOCOL_VERSION, window=1, codec="raw", job_token=7)

    server = DataPlaneServer("127.0.0.1", 0, admit)
    deadlines = pb.Deadlines(ready_s=30, silent_s=silent_s)
    try:
        near, ready = dial(f"127.0.0.1:{server.port}", "entry", hello(), ByteCounters(), ears(near_heard), deadlines)
        near.job_token, near.max_tensor_bytes = ready.job_token, 1 << 20
        yield near, near_heard, admitted[0], far_heard
        near.close()
    finally:
        server.stop()


def test_a_paced_link_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are due every two seconds, and pings that come through between them."""
    monkeypatch.setattr(grpc_options, "_PING_EVERY_S", 0.2)
    with open_pair(silent_s=1.5) as (near, near_heard, far, far_heard):
        near.pace = Pace(MIN_CHUNK_BYTES / 2)
        far.pace = Pace(MIN_CHUNK_BYTES / 2)
        for link in (near, far):
            link.send(pb.Header(kind=pb.ACT), torch.zeros(1, 4, MIN_CHUNK_BYTES // 4))
        time.sleep(4.5)
        near.send(pb.Header(kind=pb.STEP_CLOSE, step=1))
        far.send(pb.Header(kind=pb.STEP_CLOSE, step=2))
        for heard, step in ((far_heard, 1), (near_heard, 2)):
            frame = heard.get(timeout=30)
            assert isinstance(frame, Frame), frame
            assert frame.header.step == step, "the tensor cannot be here already"
        counted = {(c.direction, c.kind): c.messages for c in far.counters.report()}
        assert 1 <= counted["received", "ACT"] <= 4


def test_a_ping_comes_through_a_slow_network_that_is_not_paced() -> None:
    """Two links of 1 Mbit/s in all: the message under way on each leaves time for a ping within half of the silence."""
    silent_s, links, bytes_per_s = 10.0, 2, 1e6 / 8
    assert links * CHUNK_BYTES / bytes_per_s < silent_s / 2


def test_an_idle_link_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times faster than real: gRPC's own keepalive, and not a word of ours. A host that thought these too many
    pings would end the link at the third."""
    faster = {"grpc.keepalive_time_ms", "grpc.http2.min_ping_interval_without_data_ms"}
    options = [(name, value // 100 if name in faster else value) for name, value in grpc_options._OPTIONS]
    assert options != grpc_options._OPTIONS
    for module in (dialling, serving):
        monkeypatch.setattr(module, "_OPTIONS", options)
    monkeypatch.setattr(grpc_options, "_PING_EVERY_S", 3600.0)
    with open_pair(silent_s=3600.0) as (near, near_heard, _, far_heard):
        time.sleep(4.0)
        near.send(pb.Header(kind=pb.DONE))
        frame = far_heard.get(timeout=30)
        assert isinstance(frame, Frame), frame
        assert near_heard.empty()


def test_the_host_too_takes_no_frames_of_another_job() -> None:
    with open_pair(silent_s=10.0) as (near, near_heard, _, far_heard):
        near.job_token = 8
        near.send(pb.Header(kind=pb.DONE))
        assert "a frame of job 8 on a link of job 7" in str(far_heard.get(timeout=30))
        assert "a frame of job 8 on a link of job 7" in str(near_heard.get(timeout=30))


def test_dialling_something_else_says_so() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(PeerLost, match="something else than a stage host answers there"):
            dial(f"127.0.0.1:{port}", "entry", hello(), ByteCounters(), ears(Heard()), pb.Deadlines(ready_s=2))
    finally:
        server.stop(grace=0)


def test_dialling_where_nobody_listens_says_so() -> None:
    with pytest.raises(
        PeerLost, match=r"entry at 127\.0\.0\.1:9 could not be reached within 1 s: nobody listens there"
    ):
        dial("127.0.0.1:9", "entry", hello(), ByteCounters(), ears(Heard()), pb.Deadlines(ready_s=1))
