"""The nodes that are here, cannot take part, or were lost."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from edgelam_fl.errors import RunFailed
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.exchange import ExchangeTiming
from server.membership import Owner
from server.roster import Roster
from tests.by_hand import ByHand, FederationByHand
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


def refresh_while_b_fails(run: FederationByHand, error: Error) -> None:
    """Asks all nodes, one of which answers with an error."""
    grid, answer = run.grid, run.grid._answer
    grid._answer = lambda message: (
        Message(error, reply_to=message) if message.metadata.dst_node_id == 2 else answer(message)
    )
    run.roster.refresh()
    grid._answer = answer
    assert run.roster.devices() == ["a"]


def test_a_node_that_could_not_answer_is_asked_again(federation: MakeFederation) -> None:
    """As at boot: its stage host may take longer to start than its SuperNode."""
    run = federation("ab", "e")
    roster = run.roster
    refresh_while_b_fails(run, Error(code=0, reason="no endpoint"))
    roster.refresh()
    assert roster.devices() == ["a"], "asked once a round"
    roster.refresh(ask_lost=True)
    assert roster.devices() == ["a", "b"]


def test_a_node_whose_supernode_was_started_again_is_asked_once_more_and_not_refused(
    federation: MakeFederation,
) -> None:
    run = federation("ab", "e")
    roster = run.roster
    refresh_while_b_fails(run, Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="unknown message"))
    roster.refresh()
    assert roster.devices() == ["a", "b"]
    assert roster.problems == {}


def test_a_node_that_is_refused_holds_nobody_up(federation: MakeFederation) -> None:
    """The node answers each query, and its answer changes nothing."""
    run = federation("ab", "e", "federation.min_nodes=2")
    run.nodes["b"].profile.protocol_version = PROTOCOL_VERSION + 1
    with pytest.raises(RunFailed, match=r"1 device \(a\) .* at least 2 .*; b: speaks protocol version"):
        run.run()


def test_no_hosts(federation: MakeFederation) -> None:
    run = federation("ab", "")
    with pytest.raises(
        RunFailed, match=r"2 devices \(a, b\) and 0 edge servers .* at least 1 device and 1 edge server \(split.hosts\)"
    ):
        run.run()


def test_too_few_devices_with_the_tag(federation: MakeFederation) -> None:
    run = federation("ab", "e", "strategy.require_tags=lab")
    with pytest.raises(
        RunFailed, match=r"no device is left .*; a: has no tag lab \(strategy.require_tags\); b: has no tag lab"
    ):
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
    with pytest.raises(RunFailed, match=r"1 device \(a\) .*no reply within 90 s"):
        run.roster.gather(run.config, at_start=True)
    assert run.clock.now_s < 100


# ---------------------------------------------------------------- refusals that nothing in the run can change


def refuses(run: FederationByHand, name: str, code: str, problem: str) -> None:
    profile = run.nodes[name].profile
    profile.problem, profile.code = problem, code


def asked(run: FederationByHand) -> dict[str, int]:
    """Counts the questions for a profile that each node gets from now on."""
    counts = dict.fromkeys(run.nodes, 0)
    for name, node in run.nodes.items():

        def count(plan: pb.Plan | None, name: str = name) -> bool:
            counts[name] += plan is None
            return False

        node.loses = count
    return counts


@pytest.mark.parametrize(("codes", "exit_code"), [(("data", "data"), 2), (("model", "config"), 2), (("data", "mismatch"), 4)])  # fmt: skip
@pytest.mark.parametrize("expected", [0, 2])
def test_when_every_device_has_refused_for_good_the_run_ends_at_once(
    federation: MakeFederation, codes: tuple[str, str], exit_code: int, expected: int
) -> None:
    run = federation("ab", "e", f"federation.expect_nodes={expected}", "federation.join_deadline_s=600")
    for name, code in zip("ab", codes, strict=True):
        refuses(run, name, code, f"why {name} cannot")
    with pytest.raises(RunFailed, match=r"no device is left .*; a: why a cannot; b: why b cannot") as caught:
        run.run()
    assert caught.value.exit_code == exit_code
    assert run.clock.now_s < (1 if expected else ExchangeTiming().settle_s + 2), "whoever is on the way gets a moment"
    assert {event["code"] for event in run.events("node_refused")} == set(codes)


@pytest.mark.parametrize("code", ["environment", "bug", "", "peer-lost", "unheard-of"])
def test_a_refusal_that_may_pass_is_waited_for(federation: MakeFederation, code: str) -> None:
    """A disk may be freed and a stage host may start: until the deadline, and not a moment less."""
    run = federation("a", "e", "federation.join_deadline_s=300")
    refuses(run, "a", code, "not now")

    def is_mended(plan: pb.Plan | None) -> bool:
        if run.clock.now_s > 200:
            refuses(run, "a", "", "")
        return False

    run.nodes["a"].loses = is_mended
    run.roster.gather(run.config, at_start=True)
    assert run.roster.devices() == ["a"]
    assert run.clock.now_s > 200


def test_who_has_refused_for_good_is_not_asked_again_unless_it_joins_anew(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.rounds=3")
    refuses(run, "b", "data", "its data cannot be used: json at line 3")
    counts = asked(run)
    run.roster.gather(run.config, at_start=True)
    run.roster.gather(run.config, at_start=False)
    run.roster.revisit()
    assert counts == {"a": 1, "b": 1, "e": 1}
    del run.grid.nodes[2]
    run.rounds._exchange.present()  # as whoever waits for replies looks
    refuses(run, "b", "", "")
    run.grid.nodes[2] = run.nodes["b"]  # under its old number, as a member's
    run.roster.gather(run.config, at_start=False)
    assert run.roster.devices() == ["a", "b"]


def test_a_device_that_is_out_is_not_waited_for_among_the_expected(federation: MakeFederation) -> None:
    run = federation("abc", "e", "federation.expect_nodes=3", "federation.join_deadline_s=600")
    refuses(run, "c", "model", "the model cannot be found, read or cut as asked (model)")
    run.roster.gather(run.config, at_start=True)
    assert run.roster.devices() == ["a", "b"]
    assert run.clock.now_s < 1


def test_a_node_that_cannot_load_the_model_is_not_tried_three_times(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.rounds=1")
    run.nodes["e"].fails = lambda plan: "model m is 12 on node e and 34 at the server"
    run.nodes["e"].code = "mismatch"
    with pytest.raises(RunFailed, match=r"no host is left .*; e: model m is 12 on node e") as caught:
        run.run()
    assert caught.value.exit_code == 4
    assert [event["attempt"] for event in run.events("plan")] == [1]
    assert [(event["node"], event["code"]) for event in run.events("node_lost")] == [("e", "mismatch")]


def test_a_node_that_does_not_know_a_codec_of_the_run_is_refused_by_name(federation: MakeFederation) -> None:
    run = federation("ab", "e")
    roster = Roster(run.rounds._exchange, run.folder, pb.ProfileRequest(), codecs=["int8"])
    roster.refresh()
    assert not roster.profiles
    assert "does not know the codec 'int8', which the run asks for ([wire]); it knows" in roster.problems["a"]
    assert {event["code"] for event in run.events("node_refused")} == {"mismatch"}


def test_a_device_whose_part_failed_for_good_is_left_out_of_the_next_attempt(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.rounds=2")
    run.nodes["b"].fails = lambda plan: "its data cannot be used: no-answer-fits"
    run.nodes["b"].code = "data"
    run.run()
    assert [len(event["routes"]) for event in run.events("plan")] == [2, 1, 1]


def test_a_node_without_a_profile_is_named_by_its_key(federation: MakeFederation) -> None:
    """Its ClientApp fails before it has said who it is; without a key, Flower's number is all that is known."""
    run = federation("ab", "e")
    answer = run.grid._answer
    run.grid._answer = lambda message: (
        Message(Error(code=2, reason="UnicodeEncodeError in app.py, line 40 (a bug)"), reply_to=message)
        if message.metadata.dst_node_id == 2
        else answer(message)
    )
    owners = {1: Owner("a", pb.DEVICE), 2: Owner("bob", pb.DEVICE), 3: Owner("e", pb.EDGE)}
    roster = Roster(run.rounds._exchange, run.folder, pb.ProfileRequest(), owner_of=owners.get)
    roster.refresh()
    assert roster.problems["bob"] == "its ClientApp failed: UnicodeEncodeError in app.py, line 40 (a bug)"
    assert [(event["node"], event["code"]) for event in run.events("node_refused")] == [("bob", "bug")]


def test_a_device_that_left_may_come_back_and_is_waited_for(federation: MakeFederation) -> None:
    """As after a power cut: the other one's refusal does not end the run."""
    run = federation("ab", "e", "federation.join_deadline_s=300")
    run.roster.gather(run.config, at_start=True)
    run.roster.failed("a", "its data cannot be used: json", "data", silent=False)
    gone = run.grid.nodes.pop(2)

    def here() -> list[int]:
        if run.clock.now_s > 100:
            run.grid.nodes[2] = gone
        return list(run.grid.nodes)

    run.grid.get_node_ids = here
    run.roster.gather(run.config, at_start=False)
    assert run.roster.devices() == ["b"]
    assert run.clock.now_s > 100


def test_a_conversation_needs_hosts_and_no_device(federation: MakeFederation) -> None:
    run = federation("a", "e", "strategy.require_tags=lab")
    run.roster.await_hosts(run.config)
    assert [edge.name for edge in run.roster.edges()] == ["e"]
    waits = federation("a", "e", "federation.join_deadline_s=600")
    refuses(waits, "e", "model", "the model cannot be read")
    with pytest.raises(RunFailed, match=r"no host is left .*; e: the model cannot be read"):
        waits.roster.await_hosts(waits.config)
    assert waits.clock.now_s < 60
