"""Attempts over nodes that attend at the hub: who is lost and when, by a clock that only moves when the server sleeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import pytest
from flwr.app import RecordDict

from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.telemetry.events import NodeProgress, RoundProgress
from edgelam_fl.telemetry.progress import ProgressTail
from edgelam_fl.wire import edgelam_pb2 as pb
from server.attendance import Attendance, Presence
from server.hub import RunHub
from server.pauses import NodePauses
from tests.by_hand import LABELS, FederationByHand, moves
from tests.unit.conftest import MakeFederation


def seen(
    state: str = "running", silent_s: float = 0.0, restarted: bool = False, progress: NodeProgress | None = None
) -> Presence:
    return Presence(silent_s=silent_s, epoch=1, restarted=restarted, state=state, step=1, progress=progress)


class AttendanceByHand:
    """All nodes attend from their first message on, unless a test says otherwise; remembers what they were told."""

    works = True

    def __init__(self) -> None:
        self.says: dict[str, Callable[[int], Presence | None]] = {}
        """What a node's beats say in an attempt, by its name; None: it has not attended."""
        self.away: Callable[[], bool] = lambda: False
        self.out: Mapping[str, str] = {}
        self.attempt = 0
        self.told: dict[str, dict[str, str]] = {}
        """Who was out of a job, by round/attempt."""

    def look(self, job: str, cancelled: str, out: Mapping[str, str]) -> Mapping[str, Presence]:
        self.attempt = int(job.rpartition("/")[2])
        self.out = dict(out)
        self.told.setdefault(job.partition("/")[2], {}).update(out)
        if self.away():
            return {}
        found = {name: says(self.attempt) for name, says in self.says.items()}
        return {name: one for name, one in found.items() if one is not None}


@pytest.fixture
def attended(federation: MakeFederation) -> Callable[..., tuple[FederationByHand, AttendanceByHand]]:
    def make(devices: str, edges: str, *overrides: str) -> tuple[FederationByHand, AttendanceByHand]:
        attendance = AttendanceByHand()
        run = federation(devices, edges, *overrides, hub=RunHub(attendance=cast(Attendance, attendance)))
        attendance.says = {name: lambda attempt: seen() for name in run.nodes}
        return run, attendance

    return make


MakeAttended = Callable[..., tuple[FederationByHand, AttendanceByHand]]
ONE_ROUND = "federation.rounds=1"


def waits_in(run: FederationByHand, attendance: AttendanceByHand, names: str, attempt: int = 1) -> None:
    """Has nodes play on in an attempt until they are told to stop; then their parts fail."""

    def waits(name: str) -> Callable[[pb.Plan | None], bool]:
        return lambda plan: (
            plan is not None and plan.steps > 0 and plan.attempt == attempt and name not in attendance.out
        )

    for name in names:
        run.nodes[name].loses = waits(name)
        run.nodes[name].fails = lambda plan: "cancelled" if plan.attempt == attempt and plan.steps else ""


def lost(run: FederationByHand) -> list[str]:
    return [event["node"] for event in run.events("node_lost")]


def took_s(run: FederationByHand) -> float:
    """The clock after the whole run, without the look at the result that closes it."""
    return run.clock.now_s


def test_a_host_that_fails_ends_its_sites_attempt_at_once(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "ef", ONE_ROUND)
    run.nodes["e"].fails = lambda plan: "no memory" if plan.steps else ""
    waits_in(run, attendance, "ab")
    assert moves(run.run(), run.start)[2] == 2
    (aborted,) = run.events("attempt_aborted")
    assert (aborted["attempt"], aborted["site"], aborted["node"], aborted["reason"]) == (1, "e", "e", "no memory")
    assert attendance.told["1/1"] == {
        "e": "no memory", "a": "host e is out: no memory", "b": "host e is out: no memory",
    }  # fmt: skip
    assert [[site["site"] for site in event["sites"]] for event in run.events("plan")] == [["e"], ["f"], ["f"]], (
        "f holds what the next round starts from"
    )
    assert lost(run) == ["e"], "its devices have nothing to answer for"
    assert took_s(run) < 5


def test_a_silent_host_is_lost_after_seconds_if_another_can_take_its_place(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "ef", ONE_ROUND)
    run.nodes["e"].loses = lambda plan: bool(run.events("plan"))
    attendance.says["e"] = lambda attempt: seen(silent_s=run.clock.now_s)
    waits_in(run, attendance, "ab")
    run.run()
    (aborted,) = run.events("attempt_aborted")
    assert aborted["reason"] == "silent for 10 s"
    assert [event["attempt"] for event in run.events("plan")] == [1, 2, 1]
    assert took_s(run) < 14


def test_a_host_that_stands_still_for_8_s_keeps_its_place(attended: MakeAttended) -> None:
    """Its newest beat may be a second older, and its next one comes a second later."""
    run, attendance = attended("ab", "ef", ONE_ROUND)
    run.nodes["e"].loses = lambda plan: plan is not None and run.clock.now_s < 9.5
    attendance.says["e"] = lambda attempt: seen(silent_s=min(run.clock.now_s, 9.5))
    run.run()
    assert [event["attempt"] for event in run.events("plan")] == [1, 1]
    assert lost(run) == []


def test_nobody_waits_for_the_report_of_a_host_that_has_failed_and_left_flower(attended: MakeAttended) -> None:
    """As if its `edgelam client` was killed, which ends its stage host and its SuperNode."""
    run, attendance = attended("ab", "ef", ONE_ROUND)
    run.nodes["e"].leaves = lambda plan: True
    attendance.says["e"] = lambda attempt: seen(state="failed")
    waits_in(run, attendance, "ab")
    run.run()
    (aborted,) = run.events("attempt_aborted")
    assert (aborted["node"], aborted["reason"]) == ("e", "its part failed")
    assert took_s(run) < 3


def test_a_silent_node_that_has_left_flower_is_lost_after_three_beats(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "ef", ONE_ROUND)
    run.nodes["e"].leaves = lambda plan: True
    attendance.says["e"] = lambda attempt: seen(silent_s=run.clock.now_s)
    waits_in(run, attendance, "ab")
    run.run()
    (aborted,) = run.events("attempt_aborted")
    assert (aborted["node"], aborted["reason"]) == ("e", "left the federation")
    assert took_s(run) < 6


def test_a_host_that_nobody_can_replace_is_waited_for(attended: MakeAttended) -> None:
    """It is frozen for 25 s, which costs nothing but time."""
    run, attendance = attended("ab", "e", ONE_ROUND)
    run.nodes["e"].loses = lambda plan: plan is not None and run.clock.now_s < 25
    attendance.says["e"] = lambda attempt: seen(silent_s=run.clock.now_s % 25)
    run.run()
    assert [event["attempt"] for event in run.events("plan")] == [1, 1]
    assert lost(run) == []
    said = [(event["node"], event["seconds"], event["limit_s"]) for event in run.events("node_silent")]
    assert [(node, limit) for node, _, limit in said] == [("e", 60.0)] * 2
    assert 10 <= said[0][1] < 12
    assert 9.9 < said[1][1] - said[0][1] < 12


def test_where_nodes_are_reaches_whoever_follows_the_run(attended: MakeAttended) -> None:
    """The host is frozen for 25 s, in which a device has 2 of 6 steps."""
    run, attendance = attended("ab", "e", ONE_ROUND)
    follower, told = ProgressTail(run.folder.path), list[RoundProgress]()
    run.nodes["e"].loses = lambda plan: plan is not None and run.clock.now_s < 25
    trained = NodeProgress(doing="training", step=2, steps=6, loss=2.0)

    def says(attempt: int) -> Presence:
        if (progress := follower.poll()) is not None:
            told.append(progress)
        return seen(progress=trained)

    attendance.says["a"] = says
    run.run()
    assert told[0].words() == "step 2 of 6, loss 2.000"
    assert told[0].nodes == {"a": trained}
    assert len(told) > 8
    assert follower.poll() is None, "nobody plays any more"
    assert not run.events("progress"), "the events are told later"


@pytest.mark.parametrize("known_by", ["beats", "report"])
def test_a_host_that_was_started_again_takes_part_in_the_next_attempt(attended: MakeAttended, known_by: str) -> None:
    run, attendance = attended("ab", "e", ONE_ROUND)
    if known_by == "beats":
        run.nodes["e"].loses = lambda plan: plan is not None and plan.attempt == 1 and plan.steps > 0
        attendance.says["e"] = lambda attempt: seen(restarted=attempt == 1 and not run.events("attempt_aborted"))
    else:
        run.nodes["e"].fails = lambda plan: "the part is gone" if plan.attempt == 1 and plan.steps else ""
        run.nodes["e"].code = "restarted"
    waits_in(run, attendance, "ab")
    assert moves(run.run(), run.start)[2] == 2
    assert lost(run) == ["e"]
    assert [event["attempt"] for event in run.events("plan")] == [1, 2, 1]
    assert took_s(run) < 10


def test_a_host_that_vanishes_again_and_again_is_not_counted_by_attempts(attended: MakeAttended) -> None:
    run, _ = attended("ab", "e", ONE_ROUND)
    run.nodes["e"].fails = lambda plan: "the part is gone" if plan.attempt < 6 and plan.steps else ""
    run.nodes["e"].code = "restarted"
    assert moves(run.run(), run.start)[2] == 2
    assert [event["attempt"] for event in run.events("plan")] == [1, 2, 3, 4, 5, 6, 1]


def test_nodes_that_play_for_another_run_are_waited_for(attended: MakeAttended) -> None:
    run, _ = attended("ab", "e", ONE_ROUND)
    run.nodes["e"].fails = lambda plan: "busy with run x" if plan.steps and run.clock.now_s < 60 else ""
    run.nodes["e"].code = "busy"
    assert moves(run.run(), run.start)[2] == 2
    attempts = [event["attempt"] for event in run.events("plan")]
    assert attempts[-2] > 3, "none of them counts"
    assert 60 <= run.clock.now_s < 75
    assert run.events("node_set_aside") == []


def test_hosts_are_told_of_a_device_that_failed(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "e", ONE_ROUND)
    run.nodes["b"].fails = lambda plan: "its data cannot be used"
    run.nodes["e"].loses = lambda plan: plan is not None and plan.steps > 0 and "b" not in attendance.out
    assert moves(run.run(), run.start)[0] == 1
    assert attendance.told["1/1"] == {"b": "its data cannot be used"}
    assert run.events("attempt_aborted") == []
    assert took_s(run) < 5


def test_a_silent_device_is_lost_alone(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "e", ONE_ROUND)
    run.nodes["b"].loses = lambda plan: plan is not None
    attendance.says["b"] = lambda attempt: seen(silent_s=run.clock.now_s)
    run.nodes["e"].loses = lambda plan: plan is not None and plan.steps > 0 and "b" not in attendance.out
    assert moves(run.run(), run.start)[0] == 1
    assert lost(run)[0] == "b"
    assert [event["attempt"] for event in run.events("plan")] == [1, 1]


def test_a_node_that_plays_is_waited_for_though_flower_misses_it(attended: MakeAttended) -> None:
    """Its SuperNode was started again: the part goes on, and its reply is asked for by another message."""
    run, attendance = attended("ab", "e", ONE_ROUND)
    node_id = next(number for number, node in run.grid.nodes.items() if node is run.nodes["b"])
    all_nodes = dict(run.grid.nodes)
    run.grid.get_node_ids = lambda: [n for n in all_nodes if n != node_id or not 1 < run.clock.now_s < 20]
    state = lambda: "running" if run.clock.now_s < 15 else "done"  # noqa: E731
    attendance.says["b"] = lambda attempt: seen(state=state())
    run.nodes["b"].loses = lambda plan: plan is not None and plan.steps > 0 and not run.events("message_resent")
    assert moves(run.run(), run.start)[0] == 1
    assert lost(run) == []
    (again,) = run.events("message_resent")
    assert (again["node"], again["reason"]) == ("b", "its part is over, and no reply has come")


def test_a_node_whose_message_flower_has_lost_is_sent_it_again(attended: MakeAttended) -> None:
    run, _ = attended("ab", "e", ONE_ROUND)
    run.nodes["b"].unavailable = lambda plan: bool(plan.steps) and not run.events("message_resent")
    assert moves(run.run(), run.start)[0] == 1
    assert lost(run) == []
    assert [event["reason"] for event in run.events("message_resent")] == ["its SuperNode was away"]
    assert took_s(run) < 5


def test_without_a_hub_a_node_whose_message_is_lost_is_lost(federation: MakeFederation) -> None:
    run = federation("ab", "e", ONE_ROUND)
    run.nodes["b"].unavailable = lambda plan: bool(plan.steps)
    run.run()
    assert [(event["node"], event["reason"]) for event in run.events("node_lost")] == [("b", "its SuperNode was away")]


def test_a_message_that_nobody_has_is_sent_again(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "e", ONE_ROUND)
    run.nodes["b"].loses = lambda plan: plan is not None and plan.steps > 0 and not run.events("message_resent")
    attendance.says["b"] = lambda attempt: seen() if run.events("message_resent") else None
    assert moves(run.run(), run.start)[0] == 1
    assert lost(run) == []
    (again,) = run.events("message_resent")
    assert (again["node"], again["reason"]) == ("b", "it has not begun")
    assert 20 <= again["seconds"] < 24, "nothing is known of it yet"


def test_a_known_node_that_takes_no_message_is_lost_after_seconds(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "e", "federation.rounds=2")
    run.nodes["b"].loses = lambda plan: plan is not None and plan.round == 2
    run.nodes["e"].loses = lambda plan: (
        plan is not None and plan.round == 2 and plan.steps > 0 and "b" not in attendance.out
    )
    attendance.says["b"] = lambda attempt: None if len(run.events("plan")) == 2 else seen()
    assert moves(run.run(), run.start)[0] == 2
    assert [event["node"] for event in run.events("message_resent")] == ["b"] * 2
    (gone,) = [event for event in run.events("node_lost") if event["round"] == 2]
    assert (gone["node"], gone["reason"]) == ("b", "it took none of 3 messages")
    assert run.clock.now_s < 45


def test_a_standstill_of_the_server_is_no_slow_beginning_of_its_nodes(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "e", "federation.rounds=2")
    frozen: list[float] = []

    def stands_still() -> bool:
        if len(run.events("plan")) == 2 and not frozen:
            run.clock.now_s += 30
            frozen.append(run.clock.now_s)
        return False

    def is_on_its_way() -> bool:
        return len(run.events("plan")) == 2 and (not frozen or run.clock.now_s < frozen[0] + 4)

    attendance.away = stands_still
    attendance.says["b"] = lambda attempt: None if is_on_its_way() else seen()
    for name in "be":
        run.nodes[name].loses = lambda plan: plan is not None and plan.steps > 0 and is_on_its_way()
    assert moves(run.run(), run.start)[0] == 2
    assert lost(run) == []
    assert frozen
    assert run.events("message_resent") == []


@pytest.mark.parametrize("wait", ["block", "park"])
def test_a_node_that_asks_for_tensors_is_sent_them_within_the_attempt(federation: MakeFederation, wait: str) -> None:
    """Device b has lost what it held, which the server cannot know."""
    run = federation("ab", "e", f"federation.wait={wait}")
    work = run.nodes["b"].work

    def forgets(plan: pb.Plan, content: RecordDict) -> tuple[pb.JobReport, list[Adapter]]:
        if plan.round == 2 and plan.steps and "adapter" not in content:
            run.nodes["b"].held = {}
            return pb.JobReport(state="needs"), []
        return work(plan, content)

    run.nodes["b"].work = forgets  # type: ignore[method-assign]
    assert moves(run.run(), run.start)[0] == 2
    assert lost(run) == []
    assert [event["attempt"] for event in run.events("plan")] == [1, 1, 1]
    first, second, _ = ({d["name"]: d["adapter_bytes_down"] for d in e["devices"]} for e in run.events("round_done"))
    assert (second["a"], second["b"]) == (0, first["b"]), "what it asked for counts as sent"


def test_a_node_that_cannot_reach_the_hub_is_waited_for_as_without_one(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "e", "federation.rounds=2")
    attendance.says["b"] = lambda attempt: None
    slow: dict[int, float] = {}
    run.nodes["b"].loses = lambda plan: (
        plan is not None and run.clock.now_s < slow.setdefault(plan.round, run.clock.now_s) + 200
    )
    assert moves(run.run(), run.start)[0] == 2
    assert lost(run) == []
    assert [event["node"] for event in run.events("message_resent")] == ["b"], "once, until it is known not to attend"


def test_nobody_is_judged_by_silence_while_the_hub_is_away(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "ef", ONE_ROUND)
    attendance.away = lambda: 2 < run.clock.now_s < 40
    run.nodes["e"].loses = lambda plan: plan is not None and run.clock.now_s < 45
    attendance.says["e"] = lambda attempt: seen(silent_s=1.0)
    run.run()
    assert lost(run) == []
    assert run.events("attempt_aborted") == []


def test_the_other_sites_results_stand(attended: MakeAttended) -> None:
    run, attendance = attended("abc", "ef", "split.sites=2", ONE_ROUND)
    run.nodes["e"].fails = lambda plan: "no memory" if plan.steps else ""
    waits_in(run, attendance, "ac")
    assert moves(run.run(), run.start) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1, 5: 1}
    assert [event["attempt"] for event in run.events("plan")] == [1, 1]
    assert set(attendance.told["1/1"]) == {"a", "c", "e"}


# ---------------------------------------------------------------- what the next attempt goes on from


def restarts(run: FederationByHand, host: str, attempts: int = 1) -> None:
    """Has a host start again in the first attempts at a round."""
    run.nodes[host].fails = lambda plan: "the part is gone" if plan.attempt <= attempts and plan.steps else ""
    run.nodes[host].code = "restarted"


def first_steps(run: FederationByHand, name: str) -> list[tuple[int, int]]:
    return [(plan.first_step, plan.resume_attempt) for plan in run.nodes[name].plans if plan.steps]


def test_the_next_attempt_goes_on_from_the_newest_step_that_all_nodes_have(attended: MakeAttended) -> None:
    run, attendance = attended("ab", "e", ONE_ROUND)
    restarts(run, "e")
    waits_in(run, attendance, "ab")
    run.nodes["a"].kept, run.nodes["b"].kept = [(1, 2), (1, 4)], [(1, 4), (1, 6)]
    run.nodes["e"].kept = [(1, 4), (1, 6)]
    run.run()
    assert [first_steps(run, name) for name in "abe"] == [[(0, 0), (4, 1)]] * 3
    assert [event.get("first_step", 0) for event in run.events("plan")] == [0, 4, 0]


@pytest.mark.parametrize("lacks", ["a", "e"])
def test_the_round_begins_again_if_a_node_lacks_the_step(attended: MakeAttended, lacks: str) -> None:
    run, attendance = attended("a", "e", ONE_ROUND)
    restarts(run, "e")
    waits_in(run, attendance, "a")
    for name in "ae":
        run.nodes[name].kept = [] if name == lacks else [(1, 4)]
    run.run()
    assert first_steps(run, "e") == [(0, 0), (0, 0)]


def test_a_device_that_left_early_takes_nobody_back(attended: MakeAttended) -> None:
    run, attendance = attended("abcd", "e", ONE_ROUND, "federation.snapshot_every=1")
    restarts(run, "e")
    waits_in(run, attendance, "abcd")
    for name in "abe":
        run.nodes[name].kept = [(1, 4)]
    run.nodes["c"].kept = [(1, 1)]
    run.run()
    assert first_steps(run, "a") == [(0, 0), (4, 1)]
    assert first_steps(run, "c") == first_steps(run, "d") == [(0, 0)]
    assert run.events("plan")[1]["why"]["d"] == "the others go on from step 4"


def test_an_attempt_that_cannot_go_on_is_followed_by_one_from_the_start(attended: MakeAttended) -> None:
    run, attendance = attended("a", "e", ONE_ROUND)
    waits_in(run, attendance, "a")
    run.nodes["e"].fails = lambda plan: {1: "the part is gone", 2: "no such snapshot"}.get(
        plan.attempt * bool(plan.steps), ""
    )
    run.nodes["e"].code = "restarted"
    for name in "ae":
        run.nodes[name].kept = [(1, 4)]
    work = run.nodes["e"].work

    def refuses(plan: pb.Plan, content: RecordDict) -> tuple[pb.JobReport, list[Adapter]]:
        run.nodes["e"].code = "restarted" if plan.attempt == 1 else "refused"
        return work(plan, content)

    run.nodes["e"].work = refuses  # type: ignore[method-assign]
    run.run()
    assert first_steps(run, "e") == [(0, 0), (4, 1), (0, 0)]


# ---------------------------------------------------------------- who fails again and again


def test_a_device_that_fails_twice_in_a_row_sits_out_with_growing_pauses(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.rounds=9")
    run.nodes["b"].fails = lambda plan: "no memory" if plan.steps else ""
    run.run()
    selected = [event["round"] for event in run.events("plan") if "b" in event["selected"]]
    assert selected == [1, 2, 4, 7, 10], "after two failures one round, then two, then four"
    assert [(e["node"], e["failures"], e["back_in"]) for e in run.events("node_set_aside")] == [
        ("b", 2, 4), ("b", 3, 7), ("b", 4, 12),
    ]  # fmt: skip
    why = run.events("plan")[2]["why"]["b"]
    assert why == "sits out until round 4: failed 2 times in a row: no memory"


def test_a_device_that_a_round_needs_never_sits_out(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.min_nodes=2")
    run.nodes["b"].fails = lambda plan: "no memory"
    with pytest.raises(RunFailed, match="round 1 failed 3 times"):
        run.run()
    assert [event["selected"] for event in run.events("plan")] == [["a", "b"]] * 3


def test_a_failure_that_another_node_is_the_reason_of_is_not_held_against_a_node(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.rounds=4")
    run.nodes["b"].fails = lambda plan: "the link to 'e' broke" if plan.steps else ""
    run.nodes["b"].code = "peer-lost"
    run.run()
    assert run.events("node_set_aside") == []


def test_pauses_end_with_a_delivery_and_outlive_the_server() -> None:
    pauses = NodePauses()
    for number in (1, 2):
        pauses.failed("a", number, "no memory")
    pauses.failed("b", 2, "crash")
    again = NodePauses()
    again.restore(pauses.state())
    assert set(again.sitting_out(2, "abc", 1)) == {"a", "b"}
    assert set(again.sitting_out(2, "abc", 2)) == {"a"}, "who failed most often sits out first"
    assert set(again.sitting_out(3, "abc", 1)) == {"a"}
    again.delivered("a")
    assert again.sitting_out(3, "abc", 1) == {}


# ---------------------------------------------------------------- who is late


ALONE = ("split.hosts=0", "federation.rounds=3")


def is_slow(run: FederationByHand, name: str, number: int, seconds: float) -> None:
    """Has a device take longer than the others in a round, and answer no query until it is through."""
    began = list[float]()

    def loses(plan: pb.Plan | None) -> bool:
        if plan is not None and plan.round == number and not began:
            began.append(run.clock.now_s)
        waits_for_it = bool(began) and run.clock.now_s < began[0] + seconds
        return waits_for_it and (plan is None or plan.round == number)

    run.nodes[name].loses = loses


@pytest.mark.parametrize(
    "rule", [["federation.deadline=percentile"], ["federation.deadline=predicted"], ["federation.enough_nodes=2"]]
)
def test_a_late_device_is_out_of_the_round(attended: MakeAttended, rule: list[str]) -> None:
    """The others took 10 s in round 1; it needs 300 s in round 2."""
    run, attendance = attended("abc", "", *ALONE, *rule)
    for node in run.nodes.values():
        node.seconds, node.moves_bytes = 10.0, 1_000_000
    is_slow(run, "c", 2, 300.0)
    run.run()
    assert [event["node"] for event in run.events("node_lost")] == ["c"]
    assert "federation." in run.events("node_lost")[0]["reason"]
    assert "c" in attendance.told["2/1"]
    assert run.clock.now_s < 60
    assert run.events("node_set_aside") == []


def test_nobody_is_late_while_the_round_has_too_few(attended: MakeAttended) -> None:
    run, _ = attended("abc", "", *ALONE, "federation.deadline=percentile", "federation.min_nodes=3")
    for node in run.nodes.values():
        node.seconds = 10.0
    is_slow(run, "c", 2, 300.0)
    run.run()
    assert lost(run) == []
    assert run.clock.now_s > 300


def late_run(federation: MakeFederation, seconds: float) -> FederationByHand:
    run = federation("abc", "", *ALONE, "federation.enough_nodes=2", "federation.late=next", "federation.rounds=4")
    is_slow(run, "c", 2, seconds)
    run.nodes["a"].loses = lambda plan: plan is not None and plan.round == 3 and run.clock.now_s < 25
    return run


def test_a_late_update_counts_in_the_next_round_with_half_its_weight(federation: MakeFederation) -> None:
    run = late_run(federation, 18.0)
    run.nodes["c"].by = 3.0
    result = run.run()
    (event,) = run.events("late_update")
    assert (event["round"], event["node"], event["used_in"], event["weight"]) == (2, "c", 3, 0.5)
    a, b, c = (LABELS[name] for name in "abc")
    whole = (a + b + 3 * c) / (a + b + c)  # rounds 1 and 4
    with_late = (a + b + 3 * c / 2) / (a + b + c / 2)
    assert set(moves(result, run.start).values()) == {round(2 * whole + 1 + with_late, 4)}


def test_a_late_device_whose_update_may_be_used_is_not_told_to_stop(attended: MakeAttended) -> None:
    run, attendance = attended("abc", "", *ALONE, "federation.enough_nodes=2", "federation.late=next")
    is_slow(run, "c", 2, 300.0)
    run.run()
    assert attendance.told["2/1"] == {}
    assert [event["node"] for event in run.events("node_lost")] == ["c"]


def test_an_update_that_is_later_than_the_next_round_is_dropped(federation: MakeFederation) -> None:
    run = late_run(federation, 900.0)
    run.run()
    (event,) = run.events("late_update")
    assert (event["used_in"], event["weight"]) == (0, 0.0)
    assert event["reason"] == "it has not come by the end of round 3"


def test_a_late_update_far_larger_than_the_others_is_dropped(federation: MakeFederation) -> None:
    run = late_run(federation, 18.0)
    run.nodes["c"].by = 1000.0
    run.nodes["c"].fails = lambda plan: "not now" if plan.round != 2 else ""
    assert set(moves(run.run(), run.start).values()) == {4}
    (event,) = run.events("late_update")
    assert (event["used_in"], "update_factor" in event["reason"]) == (0, True)
