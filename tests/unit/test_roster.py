"""The nodes that are here, cannot take part, or were lost."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, RecordDict

from edgelam_fl.errors import RunFailed
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.exchange import ExchangeTiming
from tests.by_hand import ByHand
from tests.unit.conftest import MakeFederation


def test_a_board_that_is_back_before_its_old_self_is_missed(federation: MakeFederation) -> None:
    """As after a power cut: for a minute Flower lists both."""
    run = federation("ab", "e")
    grid, roster = run.grid, run.roster
    roster.refresh()
    grid.nodes[9] = ByHand(run.nodes["b"].profile)
    roster.refresh()
    assert roster.problems == {"b": "another node has this name already; give each its own with --name"}
    del grid.nodes[2]
    assert list(grid.nodes) == [1, 3, 9]
    roster.refresh(ask_lost=True)
    assert roster.devices() == ["a", "b"]
    assert roster.request("b", "train", RecordDict()).node_id == 9
    assert roster.problems == {}


def test_a_node_that_could_not_answer_is_asked_again(federation: MakeFederation) -> None:
    """As at boot: its stage host may take longer to start than its SuperNode."""
    run = federation("ab", "e")
    grid, roster = run.grid, run.roster
    answer = grid._answer
    grid._answer = lambda message: (
        Message(Error(code=0, reason="no endpoint"), reply_to=message)
        if message.metadata.dst_node_id == 2
        else answer(message)
    )
    roster.refresh()
    assert roster.devices() == ["a"]
    grid._answer = answer
    roster.refresh()
    assert roster.devices() == ["a"], "asked once a round"
    roster.refresh(ask_lost=True)
    assert roster.devices() == ["a", "b"]


def test_a_node_that_is_refused_holds_nobody_up(federation: MakeFederation) -> None:
    """The node answers each query, and its answer changes nothing."""
    run = federation("ab", "e", "federation.min_nodes=2")
    run.nodes["b"].profile.protocol_version = PROTOCOL_VERSION + 1
    with pytest.raises(RunFailed, match=r"1 devices \(a\) .* at least 2 .*; b: speaks protocol version"):
        run.run()


def test_no_hosts(federation: MakeFederation) -> None:
    run = federation("ab", "")
    with pytest.raises(
        RunFailed, match=r"2 devices \(a, b\) and 0 edge servers .* at least 1 and 1 edge servers \(split.hosts\)"
    ):
        run.run()


def test_too_few_devices_with_the_tag(federation: MakeFederation) -> None:
    run = federation("ab", "e", "strategy.require_tags=lab")
    with pytest.raises(RunFailed, match=r"; a: has no tag lab \(strategy.require_tags\); b: has no tag lab"):
        run.run()


def test_s16_a_silent_node_delays_the_start_a_little_and_once(federation: MakeFederation) -> None:
    """Enough devices are enough; the late node's profile is taken when it comes."""
    run = federation("abc", "e", "federation.min_nodes=2")
    silent = run.nodes["c"]
    silent.loses = lambda plan: True
    settle_s = ExchangeTiming().settle_s
    run.roster.gather(run.config, at_start=True)
    assert run.roster.devices() == ["a", "b"]
    assert settle_s <= run.clock.now_s < settle_s + 1
    for _ in range(3):
        run.roster.gather(run.config, at_start=False)
    assert run.clock.now_s < settle_s + 1, "the others have waited for it once"
    silent.loses = lambda plan: False
    run.roster.gather(run.config, at_start=False)
    assert run.roster.devices() == ["a", "b", "c"]


def test_s16_who_comes_while_a_silent_node_is_waited_for_is_asked_at_once(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.min_nodes=2")
    late = pb.Profile.FromString(run.nodes["a"].profile.SerializeToString())
    late.name = "d"
    run.nodes["b"].loses = lambda plan: bool(run.grid.nodes.setdefault(9, ByHand(late)))
    run.roster.gather(run.config, at_start=True)
    assert run.roster.devices() == ["a", "d"]
    assert run.clock.now_s < 2 * ExchangeTiming().settle_s


def test_s16_as_long_as_too_few_are_here_a_slow_node_is_waited_for(federation: MakeFederation) -> None:
    """A small board needs minutes to start Python."""
    run = federation("ab", "e", "federation.min_nodes=2", "federation.join_deadline_s=15")
    slow = run.nodes["b"]
    slow.loses = lambda plan: run.clock.now_s < 60
    run.roster.gather(run.config, at_start=True)
    assert run.roster.devices() == ["a", "b"]
    assert 60 <= run.clock.now_s < 62


def test_s16_a_silent_node_does_not_hold_up_the_end_either(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.min_nodes=2", "federation.join_deadline_s=15")
    run.nodes["b"].loses = lambda plan: True
    with pytest.raises(RunFailed, match=r"1 devices \(a\) .*no reply within 90 s"):
        run.roster.gather(run.config, at_start=True)
    assert run.clock.now_s < 100
