"""Full disks: a run waits for room, an event that finds none fails nobody."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest

from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import read_peft_folder
from edgelam_fl.telemetry.events import DiskFull, Event, EventLog, EventsDropped, RouteReady, RunDone, read_events
from server.checkpoint import CHECKPOINTS, load_newest
from server.exchange import ExchangeTiming
from server.room import PATIENCE_S, Room
from server.state import FederationState
from tests.by_hand import HandClock
from tests.disk_faults import fill_at
from tests.unit.conftest import MakeFederation

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def room_with(free: list[int], events: list[Event]) -> tuple[Room, HandClock]:
    """Returns a room with so many free bytes at one look after the other; the last of them stays."""
    clock = HandClock()
    timing = ExchangeTiming(now=clock.now, sleep=clock.sleep)
    return Room(Path(), events.append, timing, lambda _: free.pop(0) if len(free) > 1 else free[0]), clock


def test_a_run_waits_for_room_with_a_sign_of_life() -> None:
    events: list[Event] = []
    room, clock = room_with([5, 5, 7, 7, 100], events)
    room.await_bytes(100)
    assert clock.now_s == 20
    assert events == [
        DiskFull(free_bytes=5, needed_bytes=100, waited_s=0.0),
        DiskFull(free_bytes=7, needed_bytes=100, waited_s=10.0),
    ]


def test_a_disk_that_stays_full_ends_the_run() -> None:
    room, clock = room_with([5_000_000], [])
    with pytest.raises(RunFailed, match=r"full for 30 minutes: 5.00 MB are free .* 9.00 MB are needed"):
        room.await_bytes(9_000_000)
    assert clock.now_s == PATIENCE_S


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_what_a_full_disk_refused_is_written_again(number: int) -> None:
    tries: list[int] = []

    def write() -> None:
        tries.append(1)
        if len(tries) < 4:
            raise OSError(number, "")

    events: list[Event] = []
    room, clock = room_with([10**12], events)
    room.store(write, 100)
    assert (len(tries), clock.now_s, len(events)) == (4, 30, 3)
    with pytest.raises(PermissionError):
        room.store(lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "")), 100)


def test_a_round_waits_until_the_disk_has_room_for_its_end(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation("ab", "e")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 10**5 if run.clock.now_s < 95 else 10**9))
    assert run.state().round == 2
    waits = run.events("disk_full")
    assert [event["waited_s"] for event in waits] == [10.0 * n for n in range(10)]
    assert waits[0]["needed_bytes"] > 2_000_000, "a report too"


def test_a_disk_that_is_full_at_any_write_of_a_checkpoint_costs_time_alone(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while it is full: the checkpoint before can be loaded, the adapter is whole, and nothing half-written is left."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them take their time
    run = federation("ab", "e", "strategy.aggregation=fedsa")
    second = run.rounds.saved(run.rounds.round_after(run.rounds.round_after(FederationState())))
    path = run.folder.path
    number, done, committed = 0, False, set[int]()
    while not done:
        number += 1
        shutil.rmtree(path / CHECKPOINTS / "r000002", ignore_errors=True)
        with suppress(OSError):
            done = not fill_at(number, lambda: run.folder.checkpoint(second))
        found, problem = load_newest(path)
        assert (found.state.round in (1, 2), problem) == (True, "")
        assert read_peft_folder(path / "adapter").keys() == found.state.adapter.keys()
        assert not [file for file in path.rglob("*") if ".part" in file.name or file.name.startswith(".")]
        committed.add(found.state.round)
    assert committed == {1, 2}
    assert number > 20


# ---------------------------------------------------------------- events


@pytest.fixture
def short_files() -> object:
    """Lets files grow to 1000 bytes at most, in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_event_that_cannot_be_written_is_dropped_and_counted(tmp_path: Path, short_files: object) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log(RunDone(summary="x" * 700))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert callable(short_files)
    short_files()
    for _ in range(3):
        log(RunDone(summary="y" * 700))
    assert len(log.path.read_bytes().splitlines()) == 1, "no part of a line"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log(RouteReady())
    _, dropped, last = read_events(log.path)
    assert isinstance(dropped, EventsDropped)
    assert (dropped.count, isinstance(last, RouteReady)) == (3, True)
    assert "large" in dropped.reason


def test_a_log_goes_on_after_a_line_that_a_killed_writer_left_half_done(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path)(RunDone(summary=""))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"time": 1, "event": "' + b"x" * 100_000)
    log = EventLog(path)
    assert path.read_bytes() == whole
    log(RouteReady())
    assert len(list(read_events(path))) == 2


def test_a_run_that_fails_on_a_full_disk_has_its_reason_in_the_events(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation("ab", "e")
    run.rounds.round_after(FederationState())

    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr("edgelam_fl.telemetry.report.page.write_atomically", full)
    run.folder.fail("no reason")
    assert run.events("run_failed")[0]["kept"].startswith("the adapter after round 1 is kept")
    run.folder.finish()
