"""The hub's echo over real sockets, and what measures a link with it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.hub import echo
from edgelam_fl.hub import link_speed as link
from tests.support import grpc_server


@pytest.fixture
def port() -> Iterator[int]:
    with grpc_server(echo.handlers()) as port:
        yield port


@pytest.fixture
def channel(port: int) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


def refused(call: object, *arguments: object, **options: object) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        list(call(*arguments, **options))  # type: ignore[operator]
    code: grpc.StatusCode = caught.value.code()
    return code


def test_bytes_are_taken_and_given(channel: grpc.Channel) -> None:
    chunks = [bytes(3), bytes(5)]
    taken = channel.stream_unary(f"/{echo.SERVICE}/Take")(iter(chunks), timeout=10)
    assert int.from_bytes(taken, "big") == 3 + 5
    size = 2 * echo.CHUNK_BYTES + 1
    given = channel.unary_stream(f"/{echo.SERVICE}/Give")(size.to_bytes(8, "big"), timeout=10)
    assert sum(map(len, given)) == size


def test_limits_of_bytes_and_time(channel: grpc.Channel) -> None:
    give = channel.unary_stream(f"/{echo.SERVICE}/Give")
    take = channel.stream_unary(f"/{echo.SERVICE}/Take")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert refused(give, (echo.MAX_BYTES + 1).to_bytes(8, "big"), timeout=10) == invalid
    assert refused(give, b"", timeout=10) == invalid
    assert refused(give, (1).to_bytes(8, "big")) == invalid, "without a deadline"
    too_many = (bytes(echo.CHUNK_BYTES) for _ in range(echo.MAX_BYTES // echo.CHUNK_BYTES + 1))
    assert refused(take, too_many, timeout=20) == invalid
    assert sum(map(len, give((7).to_bytes(8, "big"), timeout=10))) == 7, "refused calls have left their places"


def test_few_measure_at_once(channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(echo.MAX_CALLS):
        assert echo._calls.acquire(blocking=False)
    try:
        give = channel.unary_stream(f"/{echo.SERVICE}/Give")
        assert refused(give, bytes(8), timeout=10) == grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        for _ in range(echo.MAX_CALLS):
            echo._calls.release()


def test_a_link_is_measured(port: int) -> None:
    found = link.measure_link("127.0.0.1", port)
    assert min(found.up_bps, found.down_bps) > 1e6
    assert 0 < found.round_trip_s < 5


def test_no_hub_at_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_ANSWER_S", 0.5)
    with pytest.raises(EnvironmentProblem, match=r"hub at 127\.0\.0\.1:.*--data-plane"):
        link.measure_link("127.0.0.1", free_port())


@pytest.mark.parametrize("bps", [1e6, 5e6])
def test_the_rate_is_bits_a_second(bps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_timed", lambda work: work())
    assert link._rate(lambda size: 0.02 + 8 * size / bps, 0.02) == pytest.approx(bps)  # type: ignore[arg-type, return-value]
