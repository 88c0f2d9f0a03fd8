"""Snapshots that hosts leave at the hub: who may, how much, and what a ServerApp finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from edgelam_fl.hub import kept
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.passes import relay_key
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.kept import LEAVE
from edgelam_fl.wire.relay import DIAL, make_token
from server.kept import NO_HUB_KEPT, HubKept


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    server = HubServer("127.0.0.1", 0, tmp_path, [kept.make_service])
    yield f"127.0.0.1:{server.port}"
    server.stop()


def token(state: Path, run: str = "run", round_: int = 1, attempt: int = 1, method: str = LEAVE) -> bytes:
    return make_token(relay_key(state), method, f"{run}/{round_}/{attempt}/edge-1", "edge-1")


def listed(state: Path, run: str = "run", round_: int = 1) -> list[tuple[int, int]]:
    plan = pb.Plan(run=run, round=round_, node="edge-1")
    return [(one.attempt, one.steps) for one in HubKept(state).steps(plan)]


def test_what_a_host_left_is_found_by_step(hub: str, tmp_path: Path) -> None:
    for source, value in (("site a", b"of a"), ("site b", b"x" * 600_000)):
        kept.leave(hub, token(tmp_path), source, (4, 6), value)
    kept.leave(hub, token(tmp_path), "site a", (8, 8), b"later")
    assert listed(tmp_path) == [(1, 4), (1, 5), (1, 6)]
    plan, at = pb.Plan(run="run", round=1, node="edge-1"), pb.StepSnapshot(attempt=1, steps=6)
    found = pb.KeptStates.FromString(HubKept(tmp_path).states(plan, at)).states
    assert found == {"site a": b"of a", "site b": b"x" * 600_000}
    assert NO_HUB_KEPT.steps(plan) == []


def test_old_states_rounds_and_runs_go(hub: str, tmp_path: Path) -> None:
    for steps in (2, 4, 6):
        kept.leave(hub, token(tmp_path), "site", (steps, steps), b"s")
    assert listed(tmp_path) == [(1, 4), (1, 6)]
    kept.leave(hub, token(tmp_path, round_=2), "site", (2, 2), b"s")
    assert (listed(tmp_path), listed(tmp_path, round_=2)) == ([], [(1, 2)])
    for run in ("second", "../third"):
        kept.leave(hub, token(tmp_path, run), "site", (2, 2), b"s")
    assert listed(tmp_path, round_=2) == []
    assert listed(tmp_path, "../third") == [(1, 2)]
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_only_a_token_for_it_leaves_anything(hub: str, tmp_path: Path) -> None:
    for wrong in (b"", token(tmp_path, method=DIAL), token(tmp_path)[:-1] + b"2"):
        with pytest.raises(grpc.RpcError) as caught:
            kept.leave(hub, wrong, "site", (2, 2), b"s")
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert listed(tmp_path) == []


@pytest.mark.parametrize(("source", "steps"), [("", (2, 2)), ("s" * 201, (2, 2)), ("site", (0, 2)), ("site", (4, 2))])
def test_a_state_without_its_place_is_refused(hub: str, tmp_path: Path, source: str, steps: tuple[int, int]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        kept.leave(hub, token(tmp_path), source, steps, b"s")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not list(tmp_path.rglob("*.snap"))


def test_a_state_has_a_size_that_it_may_have(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 300_000)
    with pytest.raises(grpc.RpcError) as caught:
        kept.leave(hub, token(tmp_path), "site", (2, 2), bytes(900_000))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert listed(tmp_path) == []
