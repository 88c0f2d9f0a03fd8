"""The hub's echo over real sockets, and the measuring of a link with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.hub import echo
from edgelam_fl.hub.link_speed import measure_link, rate_bps
from edgelam_fl.wire.grpc.services import stub
from tests.support import grpc_server


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with grpc_server([echo.make_service(tmp_path)]) as port:
        yield port


@pytest.fixture
def channel(port: int) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


def refused(call: object, *arguments: object, **options: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        list(call(*arguments, **options))  # type: ignore[operator]
    code: grpc.StatusCode = caught.value.code()
    return code


def test_bytes_are_taken_and_given(channel: grpc.Channel) -> None:
    chunks = [bytes(3), bytes(5)]
    taken = stub(channel, "Echo", "Take")(iter(chunks), timeout=10)
    assert int.from_bytes(taken, "big") == 3 + 5
    size = 2 * echo.CHUNK_BYTES + 1
    given = stub(channel, "Echo", "Give")(size.to_bytes(8, "big"), timeout=10)
    assert sum(map(len, given)) == size


def test_limits_of_bytes_and_time(channel: grpc.Channel) -> None:
    give, take, most_bytes = stub(channel, "Echo", "Give"), stub(channel, "Echo", "Take"), echo.LIMITS.most_bytes
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert refused(give, (most_bytes + 1).to_bytes(8, "big"), timeout=10) == invalid
    assert refused(give, b"", timeout=10) == invalid
    assert refused(give, (1).to_bytes(8, "big")) == invalid, "without a deadline"
    too_many = (bytes(echo.CHUNK_BYTES) for _ in range(most_bytes // echo.CHUNK_BYTES + 1))
    assert refused(take, too_many, timeout=20) == invalid
    assert sum(map(len, give((7).to_bytes(8, "big"), timeout=10))) == 7, "refused calls have left their places"


def test_few_measure_at_once(channel: grpc.Channel) -> None:
    """Calls of which one message was read: they have their places, and the rest of their bytes waits for a reader."""
    give = stub(channel, "Echo", "Give")
    most = echo.write_length(echo.LIMITS.most_bytes)
    measuring = [give(most, timeout=20) for _ in range(echo.LIMITS.places.most)]
    for call in measuring:
        assert next(call)
    assert refused(give, echo.write_length(0), timeout=10) == grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in measuring:
        call.cancel()


def test_a_link_is_measured(port: int) -> None:
    found = measure_link("127.0.0.1", port)
    assert min(found.up_bps, found.down_bps) > 1e6
    assert 0 < found.round_trip_s < 5


def test_no_hub_at_the_port() -> None:
    with pytest.raises(EnvironmentProblem, match=r"hub at 127\.0\.0\.1:.*--data-plane"):
        measure_link("127.0.0.1", free_port(), answer_s=0.5)


@pytest.mark.parametrize("bps", [1e6, 5e6])
def test_the_rate_is_bits_per_second(bps: float) -> None:
    assert rate_bps(lambda size: 0.02 + 8 * size / bps, round_trip_s=0.02) == pytest.approx(bps)
