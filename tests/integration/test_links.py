"""Links over gRPC on a network that is slow or idle, and with the wrong peer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch

from edgelam_fl.errors import PeerLost, Refused, RunFailed
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import RoundFacts, make_plans
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.link import GrpcLink
from edgelam_fl.wire.grpc.options import DEFAULT_TIMING, LinkTiming
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import MIN_CHUNK_BYTES, Frame, Link
from edgelam_fl.wire.pace import Pace
from tests.links import Heard, hello, make_terms, ready, terms
from tests.support import WAIT_S, run_config


@contextmanager
def linked(
    silent_s: float, timing: LinkTiming = DEFAULT_TIMING, bytes_per_s: float | None = None, **of_dialler: Any
) -> Iterator[tuple[Link, Heard, Link, Heard]]:
    """Both ends of a link over loopback, and what they hear: the dialler's, the host's. `of_dialler`: its other terms."""
    near_heard, far_heard, admitted = Heard(), Heard(), list[Link]()
    pace = lambda: Pace(bytes_per_s) if bytes_per_s else None  # noqa: E731

    def admit(hello: pb.Hello, link: Link) -> pb.Ready:
        link.open(terms(answer=ready(), heard=far_heard, silent_s=silent_s, pace=pace()))
        admitted.append(link)
        return ready()

    server = DataPlaneServer("127.0.0.1", 0, admit, timing)
    make = make_terms(near_heard, silent_s=silent_s, pace=pace())
    try:
        link = dial(
            "edge-1", f"127.0.0.1:{server.port}", "entry", hello(), ByteCounters(),
            lambda *given: replace(make(*given), **of_dialler), ready_s=30, timing=timing,
        )  # fmt: skip
        yield link, near_heard, admitted[0], far_heard
        link.close()
    finally:
        server.stop()


def test_a_paced_link_is_not_silent() -> None:
    """Chunks that are due every two seconds, and pings that come through between them."""
    timing, bytes_per_s = LinkTiming(ping_every_s=0.2), MIN_CHUNK_BYTES / 2
    with linked(1.5, timing, bytes_per_s) as (near, near_heard, far, far_heard):
        for link in (near, far):
            link.send(pb.Header(kind=pb.ACT), torch.zeros(1, 4, MIN_CHUNK_BYTES // 4))
        time.sleep(4.5)
        near.send(pb.Header(kind=pb.STEP_CLOSE, step=1))
        far.send(pb.Header(kind=pb.STEP_CLOSE, step=2))
        for heard, step in ((far_heard, 1), (near_heard, 2)):
            frame = heard.get(timeout=WAIT_S)
            assert isinstance(frame, Frame), frame
            assert frame.header.step == step, "the tensor cannot be here already"
        counted = {(c.direction, c.kind): c.messages for c in far.counters.report()}
        assert 1 <= counted["received", "ACT"] <= 4


def test_without_a_limit_of_silence_a_link_is_never_silent() -> None:
    with linked(0.0, LinkTiming(ping_every_s=0.01)) as (near, near_heard, _, far_heard):
        while sum(count.messages for count in near.counters.report() if count.kind == "PONG") < 20:
            assert near_heard.empty(), near_heard.get()
            time.sleep(0.001)
        assert far_heard.empty()


@pytest.mark.parametrize("step_deadline_s", [1.0, 600.0])
def test_a_ping_overtakes_tensors_on_a_slow_network_that_is_not_paced(
    tiny: ModelSource, step_deadline_s: float
) -> None:
    """Two links share 1 Mbit/s; what each sends ahead of a ping takes less than half of the silence that ends a link."""
    profiles = {"a": pb.Profile(name="a", role=pb.DEVICE), "e": pb.Profile(name="e", role=pb.EDGE, address="e:1")}
    spec = RunSpec(run_config(tiny.name, f"federation.step_deadline_s={step_deadline_s}"), tiny)
    layout = make_layout(spec, [profiles["a"]], [profiles["e"]])
    plans = make_plans(spec, RoundFacts("run", 1, 1, 0, 1), profiles, layout, {}, {"a": b"secret"})
    link = GrpcLink("entry e", ByteCounters(), lambda *_: None, lambda *_: None, DEFAULT_TIMING)
    link.open(terms())
    messages = iter(link.outbox)
    link.send(pb.Header(kind=pb.ACT), torch.zeros(1, 1024, 1024))
    under_way = next(messages)
    link.ping()
    ping = next(messages)
    assert len(ping) < 100 < len(under_way)
    assert 2 * len(under_way) / (1e6 / 8) < plans["a"].deadlines.silent_s / 2


def test_an_idle_link_lives() -> None:
    """A hundred times faster than real: gRPC's own keepalive, and not a word of ours. A host that thought these too many
    pings would end the link at the third."""
    timing = LinkTiming(
        ping_every_s=3600.0, keepalive_s=DEFAULT_TIMING.keepalive_s / 100,
        keepalive_least_s=DEFAULT_TIMING.keepalive_least_s / 100,
    )  # fmt: skip
    with linked(3600.0, timing) as (near, near_heard, _, far_heard):
        time.sleep(4.0)
        near.send(pb.Header(kind=pb.DONE))
        frame = far_heard.get(timeout=WAIT_S)
        assert isinstance(frame, Frame), frame
        assert near_heard.empty()


def test_the_host_too_takes_no_frames_of_another_job() -> None:
    with linked(10.0, job_token=8) as (near, near_heard, _, far_heard):
        near.send(pb.Header(kind=pb.DONE))
        assert "a frame of job 8 on a link of job 7" in str(far_heard.get(timeout=WAIT_S))
        assert "a frame of job 8 on a link of job 7" in str(near_heard.get(timeout=WAIT_S))


@pytest.mark.parametrize("version", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1])
def test_a_dialler_of_another_version_is_refused_with_the_way_out(version: int) -> None:
    server = DataPlaneServer("127.0.0.1", 0, lambda hello, link: pb.Refuse(reason="asked, in spite of the version"))
    words = f"protocol version {version} of node 'device-1'; this host speaks {PROTOCOL_VERSION}: install the same"
    try:
        with pytest.raises(Refused, match=words):
            dial(
                "edge-1", f"127.0.0.1:{server.port}", "entry", hello(version=version), ByteCounters(), make_terms(), ready_s=30
            )  # fmt: skip
    finally:
        server.stop()


def test_dialling_something_else_says_so() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(PeerLost, match="something else than a stage host answers there"):
            dial("edge-1", f"127.0.0.1:{port}", "entry", hello(), ByteCounters(), make_terms(), ready_s=2)
    finally:
        server.stop(grace=0)


def test_dialling_where_nobody_listens_says_so() -> None:
    with pytest.raises(
        PeerLost, match=r"entry at 127\.0\.0\.1:9 could not be reached within 1 s: nobody listens there"
    ):
        dial("edge-1", "127.0.0.1:9", "entry", hello(), ByteCounters(), make_terms(), ready_s=1)


@pytest.mark.parametrize("host", ["nobody listens", "it has no such job", "it does not answer"])
def test_dialling_ends_as_soon_as_the_link_is_no_longer_wanted(host: str) -> None:
    """Whatever the dialler waits for, and whatever patience it has: half an hour here."""
    over = threading.Event()

    def doorkeeper(_: pb.Hello, __: Link) -> pb.NotReady:
        if host == "it does not answer":
            over.wait()
        return pb.NotReady(retry_ms=1_800_000)

    looks = iter([""] * 3)
    server = DataPlaneServer("127.0.0.1", 0, doorkeeper)
    address = "127.0.0.1:9" if host == "nobody listens" else f"127.0.0.1:{server.port}"
    try:
        with pytest.raises(RunFailed, match="the attempt is over"):
            dial(
                "edge-1", address, "entry", hello(), ByteCounters(), make_terms(), 1800.0,
                given_up=lambda: next(looks, "the attempt is over"), timing=LinkTiming(answer_s=1800.0, connect_s=1800.0),
            )  # fmt: skip
    finally:
        over.set()
        server.stop()
