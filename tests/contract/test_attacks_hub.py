"""Attacks on the services of a server's hub, each by the number of its finding; the attackers' slow readers are raw gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from edgelam_fl.errors import Refused
from edgelam_fl.hub import echo, slices
from edgelam_fl.hub.fetch import FetchTiming, open_model
from edgelam_fl.hub.link_speed import measure_link
from edgelam_fl.hub.places import PlaceLimits
from edgelam_fl.model.source import ModelSource
from edgelam_fl.trust.identity import SERVER, Identity
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.secure import Security
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.relay import token_metadata
from tests.members import SmallFederation
from tests.support import WAIT_S

STILL_S = 1.0  # instead of 30 s and 10 s
# Takes almost nothing off the wire: what it does not read stays with the hub.
SLOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
RETRIES = FetchTiming(tries=1000, retry_s=0.05)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallFederation]:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    few = slices.LIMITS.most_per_member
    services = [
        partial(slices.make_service, limits=PlaceLimits(most=2 * few, most_per_member=few, still_s=STILL_S)),
        partial(
            echo.make_service,
            limits=echo.EchoLimits(places=PlaceLimits(most=4, most_per_member=1, still_s=STILL_S)),
        ),
    ]
    federation = SmallFederation(tmp_path, services)
    yield federation
    federation.hub.stop()


def fetched(federation: SmallFederation, model: ModelSource, member: Identity, token: bytes) -> ModelSource:
    return open_model(
        "elsewhere/tiny", model.digest, federation.address, token=token, timing=RETRIES, security=Security(member)
    )


def slow_fetch(stack: ExitStack, federation: SmallFederation, thief: Identity, request: Any, token: bytes) -> Any:
    """Asks for far more than the connection's buffers hold, over a connection of its own, and reads nothing."""
    channel = stack.enter_context(Security(thief).channel(federation.address, SERVER, SLOW))
    return stub(channel, slices.SLICES_SERVICE, "Fetch")(request, timeout=WAIT_S, metadata=token_metadata(token))


def test_s13_slices_are_for_members_with_the_token_of_a_run(
    federation: SmallFederation, tiny: ModelSource, tmp_path: Path
) -> None:
    member = federation.join("ann")
    foreign = SmallFederation(tmp_path / "foreign", [])
    stranger, request = foreign.join("ann"), pb.SliceRequest(model_digest=tiny.digest)
    with slices.offered(tiny, federation.state) as token:
        with Security(stranger).channel(federation.address, SERVER, []) as channel, pytest.raises(grpc.RpcError):
            stub(channel, slices.SLICES_SERVICE, "Describe")(request, timeout=WAIT_S, metadata=token_metadata(token))
        with pytest.raises(Refused, match="no run of this server lets this node fetch"):
            fetched(federation, tiny, member, b"")
        assert fetched(federation, tiny, member, token).digest == tiny.digest
    foreign.hub.stop()


def test_s13_slow_readers_neither_shut_the_slices_for_others_nor_stay(
    federation: SmallFederation, tiny: ModelSource, caplog: pytest.LogCaptureFixture
) -> None:
    """One member asks for three times the calls that it may have, and reads nothing: others are served, and its calls end."""
    thief, honest, few = federation.join("thief"), federation.join("ann"), slices.LIMITS.most_per_member
    part = pb.SlicePart(name="model.embed_tokens.weight")
    request = pb.SliceRequest(model_digest=tiny.digest, base="fp32", parts=[part] * 200)
    with slices.offered(tiny, federation.state) as token, ExitStack() as stack:
        calls = [slow_fetch(stack, federation, thief, request, token) for _ in range(3 * few)]
        assert fetched(federation, tiny, honest, token).digest == tiny.digest
        until(lambda: caplog.text.count("ended a call of thief: not a byte for 1 s") == few)
        assert fetched(federation, tiny, thief, token).digest == tiny.digest, "its places are free again"
        assert len(calls) == 3 * few, "they lived so long"


def test_s14_whoever_reads_slowly_keeps_nobody_from_measuring(
    federation: SmallFederation, caplog: pytest.LogCaptureFixture
) -> None:
    thief, honest = federation.join("thief"), federation.join("ann")
    with ExitStack() as stack:
        calls = []
        for _ in range(echo.LIMITS.places.most):
            channel = stack.enter_context(Security(thief).channel(federation.address, SERVER, SLOW))
            give = stub(channel, echo.ECHO_SERVICE, "Give")
            calls.append(give(echo.write_length(echo.LIMITS.most_bytes), timeout=echo.LIMITS.most_s))
        assert measure_link("127.0.0.1", federation.port, security=Security(honest)).down_bps > 0
        until(lambda: "ended a call of thief: not a byte for 1 s" in caplog.text)
        assert len(calls) == echo.LIMITS.places.most, "they lived so long"


def test_s14_whoever_sends_nothing_loses_its_place(federation: SmallFederation) -> None:
    thief, over = federation.join("thief"), threading.Event()
    with Security(thief).channel(federation.address, SERVER, []) as channel:
        nothing = iter(lambda: over.wait(WAIT_S), True)
        taking = stub(channel, echo.ECHO_SERVICE, "Take").future(nothing, timeout=echo.LIMITS.most_s)
        assert taking.exception(timeout=WAIT_S).code() == grpc.StatusCode.CANCELLED
        over.set()


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)
