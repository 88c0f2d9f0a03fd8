from __future__ import annotations

import math
from dataclasses import astuple

import pytest

from edgelam_fl.telemetry.events import NodeShares, RoundTimeline, TimelineInterval
from edgelam_fl.telemetry.timeline import BusyTime, Phase, read_phase


def interval(
    kind: str, start: float | None, seconds: float | None, *, role: str = "device", step: int = 0
) -> TimelineInterval:
    return TimelineInterval(kind, role, start, seconds, step, 0, "")


def phase(**nodes: list[TimelineInterval]) -> Phase:
    found = read_phase(RoundTimeline(round=2, nodes={name: tuple(own) for name, own in nodes.items()}))
    assert found is not None
    return found


def test_shares_count_what_overlaps_once_and_add_up_to_the_phase() -> None:
    both = [
        interval("forward", 1.0, 2.0),
        interval("send", 2.0, 3.0),  # 1 s of it while it computed, 2 s alone
        interval("backward", 2.5, 1.0, role="host"),  # 0.5 s of it beside the forward
        interval("step", 7.0, 0.5, role="host"),
    ]
    found = phase(pi=both, **{"edge-1": [interval("forward", 0.0, 10.0, role="host")]})
    assert list(found.rows) == [("pi", "device"), ("edge-1", "host"), ("pi", "host")]
    assert (found.round, found.start_s, found.end_s) == (2, 0.0, 10.0)
    computed, either = (3.5 - 1.0) + 0.5, (5.0 - 1.0) + 0.5
    shares = found.shares()
    assert set(shares) == {"edge-1", "pi"}
    assert shares["edge-1"] == NodeShares(computed_s=10.0, sent_s=0.0, waited_s=0.0)
    assert astuple(shares["pi"]) == pytest.approx((computed, either - computed, 10.0 - either))
    assert found.shares()["pi"].phase_s == pytest.approx(10.0)


def test_the_phase_begins_where_the_most_forgetful_node_begins() -> None:
    slow = [interval("forward", 0.5, 1.0), interval("forward", 8.0, 2.0, step=9)]
    busy = [interval("forward", 6.0, 1.0, step=7), interval("forward", 9.0, 1.0, step=9)]
    found = phase(slow=slow, busy=busy)
    assert (found.start_s, found.end_s) == (6.0, 10.0)
    assert found.shares() == {
        "busy": NodeShares(computed_s=2.0, sent_s=0.0, waited_s=2.0),
        "slow": NodeShares(computed_s=2.0, sent_s=0.0, waited_s=2.0),
    }


def test_what_cannot_be_is_left_out() -> None:
    pairs = ((math.nan, 1.0), (0.0, math.inf), (-1.0, 1.0), (0.0, -1.0), (1.0, None), (None, 1.0))
    nonsense = [interval("forward", *pair) for pair in pairs]
    found = phase(a=[*nonsense, interval("forward", 0.0, 2.0)])
    assert found.rows == {("a", "device"): [BusyTime("forward", 0.0, 2.0, 0, 0, "")]}


@pytest.mark.parametrize("nodes", [{}, {"a": ()}, {"a": (interval("step", None, 1.0),)}])
def test_a_silent_round(nodes: dict[str, tuple[TimelineInterval, ...]]) -> None:
    assert read_phase(RoundTimeline(round=2, nodes=nodes)) is None
