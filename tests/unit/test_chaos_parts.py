"""The parts of the chaos benchmark that can be judged alone: the seeded order of faults, lines that break, the verdict."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from benchmarks.chaos import killed, server_killed
from benchmarks.chaos.course import devices_missing
from benchmarks.chaos.faults import ACTIONS, Fault, schedule
from benchmarks.chaos.line import Line, owns
from benchmarks.chaos.table import figures, table
from benchmarks.chaos.trial import RunEnd, Verdict
from edgelam_fl.telemetry.events import RoundDone
from tests.recorded import as_events

DEVICES = ("device-1", "device-2", "device-3")
KINDS = [(action, target) for target, actions in ACTIONS.items() for action in actions]


def test_a_seed_is_an_order_of_all_faults() -> None:
    faults = schedule(7, 2 * len(KINDS), DEVICES)
    assert faults == schedule(7, 2 * len(KINDS), DEVICES)
    assert faults != schedule(8, 2 * len(KINDS), DEVICES)
    for half in (faults[: len(KINDS)], faults[len(KINDS) :]):
        assert sorted((fault.action, fault.target) for fault in half) == sorted(KINDS)
    assert all((fault.victim in DEVICES) == fault.target.startswith("device-") for fault in faults)
    assert {str(fault) for fault in schedule(7, 5, DEVICES, ["kill:hub"])} == {"kill:hub"}


class Dialled:
    """A line to a listener, and connections through it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.line = Line(f"127.0.0.1:{self._listener.getsockname()[1]}")
        stack.callback(self.line.close)

    def dial(self) -> socket.socket:
        host, _, port = self.line.address.rpartition(":")
        return self._stack.enter_context(socket.create_connection((host, int(port)), 30))

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Returns the dialler's end and the other end, over which something has passed."""
        near = self.dial()
        other = self._stack.enter_context(self._listener.accept()[0])
        other.settimeout(30)
        near.sendall(b"hello")
        assert other.recv(5) == b"hello"
        return near, other


@pytest.fixture
def dialled() -> Iterator[Dialled]:
    with ExitStack() as stack:
        yield Dialled(stack)


def test_a_cut_closes_the_connections_of_one_process(dialled: Dialled) -> None:
    near, other = dialled.connect()
    port = near.getsockname()[1]
    assert owns([os.getpid()], port)
    assert not owns([1], port)
    assert dialled.line.cut(lambda dialler: dialler != port) == 0
    assert dialled.line.cut(lambda dialler: dialler == port) == 1
    assert near.recv(1) == b""
    assert other.recv(1) == b""
    dialled.connect()


def test_nothing_passes_a_silenced_line_until_it_is_over(dialled: Dialled) -> None:
    near, other = dialled.connect()
    end = dialled.line.silence(lambda dialler: True)
    near.sendall(b"late")
    other.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.recv(4)
    end()
    other.settimeout(30)
    assert other.recv(4) == b"late"


def test_a_line_that_refuses_lets_nobody_in_until_it_is_over(dialled: Dialled) -> None:
    near, _ = dialled.connect()
    end = dialled.line.refuse(lambda dialler: True)
    assert near.recv(1) == b""
    assert dialled.dial().recv(1) == b""
    end()
    dialled.connect()


def round_done(number: int, devices: list[str], left_out: str = "") -> RoundDone:
    told = [{"name": name, "left_out": [{"step": 1, "reason": "late"}] if name == left_out else []} for name in devices]
    (event,) = as_events([{"event": "round_done", "round": number, "steps": 4, "devices": told}])
    assert isinstance(event, RoundDone)
    return event


def test_a_device_misses_a_round_or_a_step_of_it() -> None:
    rounds = [round_done(1, list(DEVICES)), round_done(2, ["device-1", "device-3"], left_out="device-3")]
    assert devices_missing(rounds, DEVICES) == [(2, "device-2"), (2, "device-3")]


def test_the_worst_that_a_fault_cost_is_its_outcome() -> None:
    cut, kill, freeze = sorted(schedule(1, 3, DEVICES, ["kill:hub", "cut:edge-links", "stop8:device-stage"]), key=str)
    verdicts = [
        Verdict(kill, 1, False, "hub", next_round_s=3.0, whole_round_s=4.0, attempts=1),
        Verdict(cut, 1, False, "2 connections", next_round_s=50.0, own_rounds=1, others_rounds=1),
        Verdict(freeze, 1, False, ""),
    ]
    assert [verdict.outcome() for verdict in verdicts] == [
        "attempt lost, nothing else", "another device's round lost", "hit nothing",
    ]  # fmt: skip
    ends = [
        RunEnd("run-1", "done", 8, True, 0, "equal", False),
        RunEnd("run-2", "no", 3, False, 0, "not finite", False),
    ]
    found = {figure.name: figure for figure in figures(verdicts, ends, {"ports": ["127.0.0.1:1"]}, [2.0])}
    assert found["faults that hit something"].value == 2
    assert found["recovery to the next round, worst"].holds is False
    assert found["rounds lost by devices that were not struck"].holds is False
    assert found["of these, adapters equal to the undisturbed run's"].value == 1
    assert found["adapters that are damaged or not finite"].value == 1
    assert found["left behind at the end: ports"].holds is False
    assert "| hub | kill | 1 | 1 attempt lost, nothing else | 3 | 4 |" in table(verdicts)


def test_a_verdict_is_read_as_it_was_written() -> None:
    fault = Fault("cut", "device-links", "device-2", 0.3)
    written = Verdict(fault, 2, False, "2 connections", round=4, next_round_s=3.5, own_rounds=1, said=["RoundShares"])
    for verdict in (written, Verdict(Fault("kill", "run", "", 1.0), 1, True, "", hang=True)):
        plain = verdict.to_json()
        assert Verdict.from_json(plain).to_json() == plain


def test_a_run_that_ends_otherwise_after_a_kill_misses_the_bar() -> None:
    well = killed.Kill(1.0, 2, "17 processes", 30.0, "equal", (), ())
    other = dataclasses.replace(well, outcome="differs", went_on_s=None)
    nothing_left = {"processes": list[str]()}
    for kills, holds in (([well], True), ([well, other], False)):
        assert all(figure.holds in (None, holds) for figure in killed.figures(kills, nothing_left, True)[:3])
    struck = server_killed.Killed("training", "step 1 is done", 9.0, 12.0, "equal", 0)
    late = dataclasses.replace(struck, phase="sending plans", back_s=31.0)
    gone = dataclasses.replace(struck, back_s=None, outcome="did not end", follower=3)
    for found, missed in (([struck], 0), ([struck, late], 1), ([struck, gone], 3)):
        figures_of = server_killed.figures(found, nothing_left, True)
        assert sum(figure.holds is False for figure in figures_of) == missed
