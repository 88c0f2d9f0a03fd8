"""Between the rounds and the strategies: what is measured, estimated, filtered and refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from edgelam_fl.bounds import Bounds
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import RunFailed
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from server.replies import Reply
from server.schedule import Schedule, check_shares, estimated_payload_bytes, measured, send_rate_bps, unfit
from strategies.api import Bandwidth, Demand, RoundOutcome, RoundState, Selected, Selection
from tests.support import run_config

SOURCE: Any = SimpleNamespace(hidden_size=64, digest="0" * 64, leakage_key="0" * 64)
HERE = __name__


class Told(Selection, Bandwidth):
    """Chooses the given devices, and remembers what it saw."""

    names: Sequence[str] = ()
    shares: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.states: list[RoundState] = []
        self.demands: list[Demand] = []
        self.outcomes: list[RoundOutcome] = []

    def select(self, state: RoundState) -> Selected:
        self.states.append(state)
        return Selected(Told.names, {"a": "because"})

    def allocate(self, demands: Sequence[Demand], capacity_bps: float) -> Mapping[str, Any]:
        self.demands = list(demands)
        return Told.shares

    def observe(self, outcome: RoundOutcome) -> None:
        self.outcomes.append(outcome)


def schedule(*overrides: str) -> Any:
    own = [f"strategy.selection={HERE}:Told", f"strategy.bandwidth={HERE}:Told"]
    return Schedule(RunSpec(run_config("any", *own, *overrides), SOURCE), Bounds(packages=(HERE,)))


def profile(name: str, examples: int = 9, memory: int = 4_000_000_000, tags: Sequence[str] = ()) -> pb.Profile:
    return pb.Profile(name=name, role=pb.DEVICE, examples=examples, memory_available_bytes=memory, tags=tags)


def report(seconds: float = 2.0, size: int = 1000, **other: Any) -> pb.JobReport:
    sent = pb.KindBytes(direction="sent", kind="ACT", payload_bytes=size - 10, framing_bytes=10)
    fields = {"bytes": [sent], "compute_seconds": seconds / 2, "train_seconds": seconds, "examples": 9}
    return pb.JobReport(**{**fields, **other})


def plan(share_bps: float) -> pb.Plan:
    return pb.Plan(routes=[pb.Route(share_bps=share_bps)])


# ---------------------------------------------------------------- before a round


def test_tags_and_memory_decide_who_is_a_candidate() -> None:
    config: RunConfig = run_config(
        "any", 'strategy.require_tags=["gpu", "fast"]', "strategy.min_memory_bytes=2000000000"
    )
    assert unfit(config, profile("a", tags=["fast", "gpu", "red"])) == ""
    assert unfit(config, profile("b", tags=["gpu"])) == "has no tag fast (strategy.require_tags)"
    assert unfit(config, profile("c", memory=1_500_000_000, tags=["fast", "gpu"])) == (
        "has 1500 MB of free memory, 2000 are required (strategy.min_memory_bytes)"
    )


def test_who_is_left_out_is_no_candidate_and_has_a_reason() -> None:
    Told.names = ["a"]
    own = schedule("strategy.require_tags=gpu", "federation.devices_per_round=3", "wire.capacity=8 Mbit/s")
    selected = own.select(4, [profile("a", tags=["gpu"]), profile("b")])
    assert selected.why == {"a": "because", "b": "has no tag gpu (strategy.require_tags)"}
    (state,) = own.selection.rule.states
    assert [c.name for c in state.candidates] == ["a"]
    assert (state.round, state.wanted, state.least, state.capacity_bps) == (4, 3, 1, 8e6)


def test_the_result_is_measured_by_all_who_may_take_part() -> None:
    selected = schedule("strategy.require_tags=gpu").everyone(
        [profile("a", tags=["gpu"]), profile("b"), profile("c", tags=["gpu"])]
    )
    assert selected.names == ["a", "c"]
    assert selected.why["b"] == "has no tag gpu (strategy.require_tags)"


def test_chance_comes_from_the_runs_seed_and_the_round() -> None:
    Told.names = ["a"]
    drawn = []
    for seed, round_ in ((1, 1), (1, 1), (1, 2), (2, 1)):
        own = schedule(f"run.seed={seed}")
        own.select(round_, [profile("a")])
        drawn.append(own.selection.rule.states[0].random.random())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "x"], "chose a, x; x is not among the candidates (a, b)"),
        (["a", "a"], "chose a, a; each device may be named once"),
        (["a"], "chose a of 2 candidates; a round needs 2 (federation.min_nodes)"),
        ([], "chose none of 2 candidates; a round needs 2 (federation.min_nodes)"),
    ],
)
def test_a_choice_of_no_use(names: list[str], words: str) -> None:
    Told.names = names
    with pytest.raises(RunFailed) as caught:
        schedule("federation.min_nodes=2").select(1, [profile("a"), profile("b")])
    assert str(caught.value) == f"strategy.selection = '{HERE}:Told' {words}"


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"a": -0.1, "b": 0.5}, "{'a': -0.1, 'b': 0.5}: each must be a finite number, 0 to 1"),
        ({"a": math.nan, "b": 0.5}, "{'a': nan, 'b': 0.5}: each must be a finite number, 0 to 1"),
        ({"a": math.inf, "b": 0.5}, "{'a': inf, 'b': 0.5}: each must be a finite number, 0 to 1"),
        ({"a": "much", "b": 0.5}, "{'a': 'much', 'b': 0.5}: each must be a finite number, 0 to 1"),
        ({"a": 0.75, "b": 0.5}, "{'a': 0.75, 'b': 0.5}: together they are 1.25, and must be at most 1"),
        ({"a": 0.5}, "{'a': 0.5}: they must be of the chosen devices, a, b"),
        ({"a": 1.0, "b": 0.0}, "{'a': 1.0, 'b': 0.0}: with wire.capacity each must be above 0, or the device would never be through"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_enforced(shares: dict[str, Any], words: str) -> None:
    Told.shares = shares
    with pytest.raises(RunFailed) as caught:
        schedule("wire.capacity=8 Mbit/s").shares([profile("a"), profile("b")])
    assert str(caught.value) == f"strategy.bandwidth = '{HERE}:Told' gave the shares {words}"


def test_a_device_without_a_part_of_the_band_would_never_be_through() -> None:
    config = run_config("any", "wireless.bandwidth_hz=1e6")
    with pytest.raises(RunFailed, match=r"with wireless.bandwidth_hz each must be above 0"):
        check_shares(config, {"a": 1.0, "b": 0.0}, {"a", "b"})


def test_shares_that_add_up_to_one_but_for_rounding_are_taken() -> None:
    Told.shares = {"a": 0.1, "b": 0.9 + 1e-9}
    assert schedule().shares([profile("a"), profile("b")]) == Told.shares


@pytest.mark.parametrize(("edges", "expected"), [(0, ["c", "a", "b"]), (1, ["c", "a"]), (2, ["c"])])
def test_devices_are_added_where_hosts_are_missing(edges: int, expected: list[str]) -> None:
    """Device c was chosen and does not listen."""
    Told.names = ["c"]
    here = [profile("c"), profile("b"), profile("a"), profile("d")]
    for device in here[1:]:
        device.address = "1.2.3.4:5"
    selected = schedule("split.hosts=2", "split.host_on=any").select(1, here, edges)
    assert selected.names == expected
    assert [
        name for name, why in selected.why.items() if why == "takes part because a host is needed (split.host_on)"
    ] == ([name for name in expected if name != "c"])
    assert schedule("split.hosts=2").select(1, here, edges).names == ["c"]


# ---------------------------------------------------------------- what is known


def test_a_payload_is_estimated_from_above_until_it_is_measured() -> None:
    config = run_config("any", "federation.local_steps=5")
    device = profile("a")
    device.held_out = 3
    tensors = (
        4 * 5 * config.federation.batch_size + 2 * 3
    )  # to the hosts and back, gradients too; held-out ones without
    assert estimated_payload_bytes(RunSpec(config, SOURCE), device) == tensors * config.task.max_tokens * 64 * 4
    assert estimated_payload_bytes(RunSpec(run_config("any", "split.hosts=0"), SOURCE), device) == 0
    of_rank_4 = run_config("any", "federation.local_steps=5", "wire.gradients=lowrank", "lora.rank=4")
    low = estimated_payload_bytes(RunSpec(of_rank_4, SimpleNamespace(hidden_size=64, num_layers=6)), device)  # type: ignore[arg-type]
    values = 2 * 5 * config.federation.batch_size + 3  # there and back, as gradients; held-out ones only there
    assert low == ((tensors - 2 * 5 * config.federation.batch_size) + values * 4 / 64) * config.task.max_tokens * 64 * 4


def test_a_device_with_nothing_to_move_still_gets_a_share() -> None:
    own = schedule("federation.epochs=1", "wire.capacity=1 Mbit/s", "strategy.bandwidth=proportional")
    shares = own.shares([profile("a", examples=0), profile("b", examples=32)])
    assert 0 < shares["a"] < 0.05 < shares["b"]


def test_unmeasured_devices_are_guessed_from_the_measured_ones() -> None:
    own = schedule("federation.epochs=1", "federation.batch_size=4")
    small, large = profile("a", examples=8), profile("b", examples=32)
    own.observe(1, ["a"], {"a": plan(0)}, {"a": Reply(report(seconds=6.0, size=1000))})
    a, b = own.candidates([small, large])
    assert (a.payload_bytes, a.compute_s, a.last_round, a.last_seconds) == (1000, 3.0, 1, 6.0)
    assert (b.payload_bytes, b.compute_s, b.last_round, b.last_seconds) == (1000 * 32 / 8, 3.0, 0, None)
    assert (b.examples, b.memory_bytes) == (32, 4_000_000_000)


def test_a_device_that_was_left_out_of_steps_is_not_starved() -> None:
    own = schedule()
    replies = {"a": Reply(report(size=1_000_000)), "b": Reply(report(size=10))}
    own.observe(1, ["a", "b"], {"a": plan(0), "b": plan(0)}, replies)
    a, b = own.candidates([profile("a"), profile("b")])
    assert a.payload_bytes == 1_000_000
    assert b.payload_bytes == pytest.approx(0.1 * (1_000_000 + 10) / 2)


def test_what_a_round_shows_of_a_device() -> None:
    steps = [
        pb.StepReport(step=0, loss_sum=6.0, labels=3, counted=True),
        pb.StepReport(step=1, loss_sum=100.0, labels=5),
        pb.StepReport(step=2, loss_sum=17.0, labels=17, counted=True),
    ]
    facts = measured("a", 7, report(eval_seconds=0.5, steps=steps, eval_loss_sum=6.0, eval_labels=4))
    assert facts.last_loss == (6 + 17) / (3 + 17)
    assert facts.squared_loss == pytest.approx((3 * (6 / 3) ** 2 + 17 * (17 / 17) ** 2) / (3 + 17))
    assert (facts.last_round, facts.last_seconds, facts.payload_bytes) == (7, 2.5, 1000)
    assert facts.metric == math.exp(-6 / 4)
    assert measured("a", 7, report(eval_labels=4, eval_sums={"correct": 3})).metric == 3 / 4
    values = report(eval_loss_sum=4 * 1000.0, eval_labels=4)
    assert measured("a", 7, values, of_values=True).metric == pytest.approx(1 / 1001)


def test_nonsense_in_a_report_is_not_believed() -> None:
    steps = [pb.StepReport(loss_sum=math.nan, labels=1, counted=True)]
    facts = measured("a", 1, report(seconds=math.inf, steps=steps, eval_loss_sum=math.nan, eval_labels=1))
    assert (facts.last_loss, facts.squared_loss, facts.last_seconds, facts.compute_s, facts.metric) == (
        None,
        None,
        0,
        0,
        None,
    )


def test_the_rate_of_a_link_is_bytes_over_the_time_in_which_any_were_under_way() -> None:
    send = [
        pb.Interval(kind="send", role="device", start_s=0.0, seconds=2.0, tensor_bytes=300),
        pb.Interval(kind="send", role="device", start_s=1.0, seconds=2.0, tensor_bytes=300),
        pb.Interval(kind="send", role="host", start_s=9.0, seconds=2.0, tensor_bytes=300),
        pb.Interval(kind="forward", role="device", start_s=9.0, seconds=2.0),
    ]
    assert send_rate_bps(report(timeline=send)) == 8 * 600 / 3
    assert send_rate_bps(report()) is None
    assert (
        send_rate_bps(report(timeline=[pb.Interval(kind="send", role="device", seconds=math.nan, tensor_bytes=9)]))
        is None
    )


@pytest.mark.parametrize(("share_bps", "limit"), [(1600.0, None), (4000.0, 1600.0), (0.0, 1600.0)])
def test_a_link_slower_than_its_share_is_its_own_limit(share_bps: float, limit: float | None) -> None:
    own = schedule()
    send = pb.Interval(kind="send", role="device", seconds=1.0, tensor_bytes=200)
    own.observe(1, ["a"], {"a": plan(share_bps)}, {"a": Reply(report(timeline=[send]))})
    (a,) = own.candidates([profile("a")])
    assert (a.rate_bps, a.limit_bps) == (1600.0, limit)
    Told.shares = {"a": 1.0}
    own.shares([profile("a")])
    assert own.bandwidth.rule.demands == [Demand("a", 1000, 1.0, limit)]


def test_strategies_that_remember_are_told_what_became_of_a_round() -> None:
    own = schedule()
    replies = {"a": Reply(report(seconds=3.0)), "c": Reply(report(seconds=5.0)), "edge": Reply(pb.JobReport())}
    own.observe(2, ["a", "b", "c"], {name: plan(0) for name in "abc"}, replies)
    (outcome,) = own.selection.rule.outcomes
    assert own.bandwidth.rule.outcomes == [outcome]
    assert (outcome.round, outcome.seconds, list(outcome.lost)) == (2, 5.0, ["b"])
    assert [replace(c, limit_bps=None) for c in outcome.devices] == [measured(n, 2, replies[n].report) for n in "ac"]
