"""Two runs that want the same nodes at once: both end well, one after the other."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest

from edgelam_fl.federation.submission import Submission
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import NodeLost, RunDone, RunStarted, RunWaits, of_kind, read_events
from tests.integration.federation import DEAD_PROXY, Federation, config_of

pytestmark = pytest.mark.processes


def test_a_second_run_waits_until_the_first_has_ended(federation: Federation, tiny: ModelSource) -> None:
    config = config_of(tiny.name, "federation.rounds=1", "federation.local_steps=1")
    one = Submission(federation.operator)
    out = federation.folder / "runs" / "one"
    with patch.dict(os.environ, DEAD_PROXY):
        one.submit(config, out)
    two = federation.run("two", config)  # which of their ServerApps is ready first is chance
    found = {"one": list(read_events(out / "events.jsonl")), "two": two.events}
    first, second = sorted(found, key=lambda name: len(list(of_kind(found[name], RunWaits))))
    assert not list(of_kind(found[first], RunWaits))
    waits = list(of_kind(found[second], RunWaits))
    assert {event.run for event in waits} == {first}
    assert waits[-1].nodes in ((), ("device-1", "device-2", "device-3", "edge-1"))
    (ended,), (began,) = of_kind(found[first], RunDone), of_kind(found[second], RunStarted)
    assert (ended.time or 0) <= (began.time or 0)
    for name, events in found.items():
        assert any(of_kind(events, RunDone)), name
        assert not list(of_kind(events, NodeLost)), name
