"""Snapshots on a node's disk: what is kept, what is swept, and what a damaged file or a full disk costs."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from edgelam_fl.errors import Refused
from edgelam_fl.node.snapshots import Snapshots
from edgelam_fl.split.snapshot import SourceState
from edgelam_fl.telemetry.events import Event, SnapshotIgnored, SnapshotLost, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb


def plan(run: str = "run", round_: int = 1, attempt: int = 1, first_step: int = 0, resume_attempt: int = 0) -> pb.Plan:
    return pb.Plan(
        run=run, round=round_, attempt=attempt, node="edge-1", steps=20, snapshot_every=2, adapter_digest="d",
        first_step=first_step, resume_attempt=resume_attempt,
    )  # fmt: skip


def state(value: float) -> SourceState:
    return SourceState(
        {"a": np.full(3, value, np.float32), "step": np.array(value)}, {"n": 1}, pb.JobReport(examples=7)
    )


def keep(snapshots: Snapshots, of: pb.Plan, *steps: int, source: str = "site") -> None:
    snapshots.keeper(of, "warm").take(source, steps, state(float(steps[0])))


def kept(snapshots: Snapshots, of: pb.Plan) -> list[tuple[int, int]]:
    return [(one.attempt, one.steps) for one in snapshots.steps(of.run, of.round)]


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def snapshots(tmp_path: Path, events: list[Event]) -> Snapshots:
    return Snapshots(tmp_path, events.append)


def test_a_state_comes_back_after_a_restart(snapshots: Snapshots, tmp_path: Path) -> None:
    keep(snapshots, plan(), 2)
    keep(snapshots, plan(), 4, 6)  # no step of this source lies between
    assert kept(snapshots, plan()) == [(1, 2), (1, 4), (1, 5), (1, 6)]
    again = Snapshots(tmp_path, lambda event: None)
    found = again.resumed(plan(attempt=2, first_step=6, resume_attempt=1), ["site"])["site"]
    assert np.array_equal(found.arrays["a"], np.full(3, 4.0, np.float32))
    assert (found.arrays["step"].shape, found.report.examples, found.report.moments) == ((), 7, "warm")


def test_only_what_all_sources_have_is_listed(snapshots: Snapshots) -> None:
    keep(snapshots, plan(), 2, source="site device-1")
    keep(snapshots, plan(), 2, source="site device-2")
    keep(snapshots, plan(), 4, source="site device-1")
    assert kept(snapshots, plan()) == [(1, 2)]
    snapshots.keeper(plan(), "").drop("site device-2")
    assert kept(snapshots, plan()) == [(1, 2), (1, 4)]


def test_the_newest_few_are_kept(snapshots: Snapshots) -> None:
    for steps in range(2, 14, 2):
        keep(snapshots, plan(), steps)
    assert kept(snapshots, plan()) == [(1, 6), (1, 8), (1, 10), (1, 12)]


def test_a_new_attempt_sweeps_what_nobody_goes_on_from(snapshots: Snapshots, tmp_path: Path) -> None:
    for steps in (2, 4):
        keep(snapshots, plan(), steps)
    snapshots.begin(plan(attempt=2, first_step=2, resume_attempt=1))
    assert kept(snapshots, plan()) == [(1, 2)]
    snapshots.begin(plan(attempt=3))
    assert kept(snapshots, plan()) == []
    keep(snapshots, plan(), 2)
    for number, run in enumerate(("second", "third"), 1):
        snapshots.begin(plan(run, number))
        keep(snapshots, plan(run, number), 2)
    snapshots.begin(plan("third", 2))
    assert sorted(folder.name for folder in (tmp_path / "snapshots").iterdir()) == ["run-second", "run-third"]
    assert kept(snapshots, plan("third", 1)) == []


@pytest.mark.parametrize("damage", [b"", b"x", b"EdgeLAM snapshot 1\n" + bytes(80)])
def test_a_damaged_file_is_as_if_it_were_not_there(
    snapshots: Snapshots, tmp_path: Path, events: list[Event], damage: bytes
) -> None:
    keep(snapshots, plan(), 2)
    snapshots.keep_round(plan(), state(1.0))
    for file in tmp_path.rglob("*.snap"):
        file.write_bytes(damage)
    assert list(snapshots.rounds("run")) == []
    with pytest.raises(Refused, match="node edge-1 has no snapshot of site after 2 steps of attempt 1"):
        snapshots.resumed(plan(attempt=2, first_step=2, resume_attempt=1), ["site"])
    assert len(list(of_kind(events, SnapshotIgnored))) == 2
    assert kept(snapshots, plan()) == []


def test_one_wrong_bit_is_found(snapshots: Snapshots, tmp_path: Path) -> None:
    snapshots.keep_round(plan(), state(1.0))
    (file,) = tmp_path.rglob("*.snap")
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert list(snapshots.rounds("run")) == []
    file.write_bytes(whole)
    assert len(list(snapshots.rounds("run"))) == 1


def test_other_work_is_refused(snapshots: Snapshots) -> None:
    keep(snapshots, plan(), 2)
    other = plan(attempt=2, first_step=2, resume_attempt=1)
    other.adapter_digest = "another"
    with pytest.raises(Refused, match="node edge-1 has a snapshot of step 2 of another plan"):
        snapshots.resumed(other, ["site"])


def test_a_full_disk_costs_the_snapshot_alone(tmp_path: Path, events: list[Event]) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    snapshots = Snapshots(tmp_path, events.append, full)
    keep(snapshots, plan(), 2)
    snapshots.keep_round(plan(), state(1.0))
    assert kept(snapshots, plan()) == []
    lost = list(of_kind(events, SnapshotLost))
    assert [(event.job, event.file, event.reason) for event in lost] == [
        ("run/1/1/edge-1", "2-2.snap", "No space left on device"), ("run/1/1/edge-1", "000001.snap", "No space left on device"),
    ]  # fmt: skip


def test_without_a_folder_nothing_is_kept(events: list[Event]) -> None:
    snapshots = Snapshots(None, events.append)
    snapshots.begin(plan())
    keep(snapshots, plan(), 2)
    snapshots.keep_round(plan(), state(1.0))
    assert (kept(snapshots, plan()), list(snapshots.rounds("run")), events) == ([], [], [])


def test_a_run_cannot_name_a_folder_elsewhere(snapshots: Snapshots, tmp_path: Path) -> None:
    for name in ("..", "../../up", "/etc"):
        keep(snapshots, plan(name), 2)
        assert kept(snapshots, plan(name)) == [(1, 2)]
    assert {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*.snap")} == {"snapshots"}
