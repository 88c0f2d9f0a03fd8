"""Attendance: what the hub knows of nodes that play, what they hear, and what a ServerApp sees, also over the hub's troubles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from edgelam_fl.hub.attendance import AwakeClock
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.passes import relay_key
from edgelam_fl.telemetry.events import NodeProgress
from edgelam_fl.trust.identity import Identity
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.attendance import ATTEND, ATTENDANCE_SERVICE, LEAD_FOLDER
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.relay import DIAL, make_token, token_metadata
from server.attendance import NO_ATTENDANCE, Attendance
from tests.members import SmallFederation

JOB = "run/1/1"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer("127.0.0.1", 0, tmp_path / "hub")
    yield server
    server.stop()


def attend(
    port: int, state: Path, node: str, beat: pb.Beat, job: str = JOB, *, token: bytes | None = None, who: Identity | None = None
) -> pb.Notice:  # fmt: skip
    """Beats once as a node whose plan brought the token, or with another `token`."""
    token = make_token(relay_key(state), ATTEND, f"{job}/{node}", node) if token is None else token
    security = Security(who) if who is not None else PLAIN
    with security.channel(f"127.0.0.1:{port}", "server", []) as channel:
        return stub(channel, ATTENDANCE_SERVICE, ATTEND)(beat, metadata=token_metadata(token), timeout=10)


def test_a_server_sees_who_attends_and_nodes_hear_what_it_said(hub: HubServer, tmp_path: Path) -> None:
    state, server = tmp_path / "hub", Attendance(tmp_path / "hub")
    assert server.works
    assert server.look(JOB, "", {}) == {}
    assert attend(hub.port, state, "edge-1", pb.Beat(epoch=7, state="running", step=3)) == pb.Notice()
    seen = server.look(JOB, "", {"device-1": "its disk is full"})["edge-1"]
    assert (seen.epoch, seen.restarted, seen.state, seen.step) == (7, False, "running", 3)
    assert 0 <= seen.silent_s < 60
    heard = attend(hub.port, state, "edge-1", pb.Beat(epoch=7, state="running", step=4))
    assert heard == pb.Notice(out={"device-1": "its disk is full"})
    server.look(JOB, "a host was lost", {})
    assert attend(hub.port, state, "edge-1", pb.Beat(epoch=7, state="failed")).cancelled == "a host was lost"
    assert server.look("run/1/2", "", {}) == {}, "another job has nobody yet"
    assert server.look(JOB, "", {})["edge-1"].state == "failed"
    server.close()


def test_a_server_sees_where_nodes_are(hub: HubServer, tmp_path: Path) -> None:
    state, server = tmp_path / "hub", Attendance(tmp_path / "hub")
    attend(hub.port, state, "old", pb.Beat(epoch=7, state="running"))
    told = pb.NodeProgress(doing="training", step=3, steps=6, loss=2.5, tokens=800)
    attend(hub.port, state, "device-1", pb.Beat(epoch=7, state="running", step=3, progress=told))
    wrong = pb.NodeProgress(doing="x" * 1000, loss=float("nan"))
    attend(hub.port, state, "liar", pb.Beat(epoch=7, state="running", progress=wrong))
    seen = server.look(JOB, "", {})
    assert seen["old"].progress is None
    assert seen["device-1"].progress == NodeProgress(doing="training", step=3, steps=6, loss=2.5, tokens=800)
    assert seen["liar"].progress == NodeProgress(doing="loading")
    server.close()


def test_a_node_with_another_epoch_was_restarted_and_stays_so(hub: HubServer, tmp_path: Path) -> None:
    state, server = tmp_path / "hub", Attendance(tmp_path / "hub")
    for epoch, restarted in ((7, False), (8, True), (7, True)):  # the last is a ghost of the first
        attend(hub.port, state, "edge-1", pb.Beat(epoch=epoch, state="running"))
        assert server.look(JOB, "", {})["edge-1"].restarted is restarted
    server.close()


def test_a_hub_that_is_gone_or_new_says_nothing_about_nodes(tmp_path: Path) -> None:
    server, state = Attendance(tmp_path / "hub"), tmp_path / "hub"
    assert server.look(JOB, "", {}) == {}, "no hub has ever been there"
    hub = HubServer("127.0.0.1", 0, state)
    attend(hub.port, state, "edge-1", pb.Beat(epoch=7, state="running"))
    assert server.look(JOB, "", {}).keys() == {"edge-1"}
    hub.stop()
    assert server.look(JOB, "", {}) == {}
    hub = HubServer("127.0.0.1", 0, state)
    assert server.look(JOB, "over", {}) == {}, "nobody has attended here yet"
    assert attend(hub.port, state, "edge-1", pb.Beat(epoch=8, state="running")).cancelled == "over"
    assert server.look(JOB, "over", {})["edge-1"].restarted, "the server remembers the epoch over the hub's restart"
    server.close()
    hub.stop()


def test_a_run_without_a_hub() -> None:
    assert not NO_ATTENDANCE.works
    assert NO_ATTENDANCE.look(JOB, "", {"device-1": "gone"}) == {}


def test_a_standstill_of_the_hub_is_no_silence_of_the_nodes() -> None:
    times = iter([100.0, 100.5, 101.0, 126.0, 126.5])
    clock = AwakeClock(lambda: next(times))
    assert [clock() for _ in range(4)] == [0.5, 1.0, 2.0, 2.5]


# ---------------------------------------------------------------- attacks


def refusal(port: int, state: Path, node: str, beat: pb.Beat, **how: object) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        attend(port, state, node, beat, **how)  # type: ignore[arg-type]
    return caught.value.code()


def test_who_has_no_token_of_the_part_cannot_attend(hub: HubServer, tmp_path: Path) -> None:
    state, beat, server = tmp_path / "hub", pb.Beat(epoch=1, state="running"), Attendance(tmp_path / "hub")
    for token in (
        b"", bytes(64), make_token(bytes(32), ATTEND, f"{JOB}/edge-1", "edge-1"),
        make_token(relay_key(state), DIAL, f"{JOB}/edge-1", "edge-1", 2),
    ):  # fmt: skip
        assert refusal(hub.port, state, "edge-1", beat, token=token) is grpc.StatusCode.PERMISSION_DENIED
    assert refusal(hub.port, state, "edge-1", pb.Beat(state="x" * 1000)) is grpc.StatusCode.INVALID_ARGUMENT
    assert server.look(JOB, "", {}) == {}
    server.close()


def test_a_member_cannot_attend_for_another_one(tmp_path: Path) -> None:
    federation = SmallFederation(tmp_path)
    ann, bob = federation.join("ann"), federation.join("bob")
    beat, server = pb.Beat(epoch=1, state="running"), Attendance(federation.state)
    assert attend(federation.port, federation.state, "ann", beat, who=ann) == pb.Notice()
    assert refusal(federation.port, federation.state, "ann", beat, who=bob) is grpc.StatusCode.PERMISSION_DENIED
    assert server.look(JOB, "", {}).keys() == {"ann"}
    server.close()
    federation.hub.stop()


def test_old_tokens_fill_no_memory_and_push_no_job_out(hub: HubServer, tmp_path: Path) -> None:
    state, server = tmp_path / "hub", Attendance(tmp_path / "hub")
    beat = pb.Beat(epoch=1, state="running")
    attend(hub.port, state, "edge-1", beat)
    for number in range(100):
        if number % 20 == 0:
            assert server.look(JOB, "", {}).keys() == {"edge-1"}
        attend(hub.port, state, "edge-1", beat, job=f"old/{number}/1")
    assert server.look(JOB, "", {}).keys() == {"edge-1"}
    assert server.look("old/0/1", "", {}) == {}
    server.close()


def test_the_socket_of_the_lead_is_for_this_user_alone(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / LEAD_FOLDER
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "endpoint.json").stat().st_mode & 0o777 == 0o600
