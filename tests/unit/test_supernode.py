"""The process of a node's SuperNode: what of Flower's main loop it replaces, and its pauses."""

from __future__ import annotations

import datetime
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
from flwr.app.message import message
from flwr.supercore import date, heartbeat
from flwr.supercore.inflatable import inflatable_utils
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode import fleet_http_connection as connection
from flwr.supernode import start_client_internal as flower

from edgelam_fl.federation.supernode import Pauses, await_tensors_briefly, beat_often, set_flowers_clock
from edgelam_fl.machine import since_boot_s


def test_its_process_brings_no_database() -> None:
    code = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module('edgelam_fl.federation.supernode', run_name='__main__')\nexcept SystemExit: print('sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_flowers_loop_has_what_is_replaced_there() -> None:
    assert flower.time is time
    assert callable(flower.get_fused_config_from_fab)
    assert not hasattr(flower, "sleep")


def test_pauses_without_a_message_grow_to_flowers_and_are_short_after_one() -> None:
    waits, replied = list[float](), threading.Event()
    pauses = Pauses(replied, waits.append)
    for _ in range(30):
        pauses.sleep(3.0)
    assert waits[0] == 0.1
    assert waits == sorted(waits)
    assert waits[-1] == 3.0
    assert all(later <= 1.3 * earlier for earlier, later in pairwise(waits))
    replied.set()
    pauses.sleep(0.5)
    pauses.sleep(3.0)
    assert waits[-1] == 0.1


def test_flowers_time_is_the_servers_where_the_clock_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(date, "datetime", datetime)  # to be put back
    set_flowers_clock(1e9 - since_boot_s())
    signed = message.now()  # as Flower's modules have it, which signs and dates messages
    assert 0 <= signed.timestamp() - 1e9 < 60
    assert signed.tzinfo is datetime.UTC
    assert date.isoformat8601_utc(signed).startswith("2001-09-09T01:4")


def test_a_reply_that_is_there_ends_a_pause() -> None:
    replied, waits = threading.Event(), list[float]()
    pauses = Pauses(replied, waits.append)
    replied.set()
    pauses.sleep(0.99)
    assert not replied.is_set(), "the next pause waits for the next reply"
    assert not waits


def test_tensors_that_are_on_their_way_are_asked_for_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is None:  # Python's own, for a thread to begin
                return super().wait()
            waits.append(timeout)
            return False

    monkeypatch.setattr(flower, "pull_objects", flower.pull_objects)  # to be put back
    await_tensors_briefly()
    monkeypatch.setattr(inflatable_utils.threading, "Event", Waits)
    missing = iter(range(8))

    def pull(object_id: str) -> bytes:
        if next(missing, None) is not None:
            raise inflatable_utils.ObjectUnavailableError(object_id)
        return b"tensor"

    assert flower.pull_objects(["it"], pull) == {"it": b"tensor"}
    assert 0 < waits[0] <= 0.1
    assert len(waits) == 8
    assert 0.8 <= waits[-1] <= 1.2, "a server that stands still is not flooded"


def test_heartbeats_are_sent_often_and_promised_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heartbeat, connection):
        monkeypatch.setattr(module, "HEARTBEAT_DEFAULT_INTERVAL", module.HEARTBEAT_DEFAULT_INTERVAL)  # to be put back
    beat_often()
    waits, stopped = list[float](), threading.Event()
    sender = heartbeat.HeartbeatSender(lambda: True)
    monkeypatch.setattr(
        stopped, "wait", lambda pause_s: waits.append(pause_s) or (stopped.set() if len(waits) > 9 else None)
    )
    sender._stop_event = stopped
    sender._run()
    assert max(waits) <= connection.HEARTBEAT_DEFAULT_INTERVAL / 2
    assert connection.HEARTBEAT_DEFAULT_INTERVAL >= fleet_handlers.HEARTBEAT_MIN_INTERVAL, (
        "Flower's server refuses less"
    )
