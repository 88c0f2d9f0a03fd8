"""Rounds as the ServerApp runs them, over nodes that answer by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from edgelam_fl.errors import RunFailed
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.carry import is_carry
from edgelam_fl.model.cut import CUT_A, is_cut
from edgelam_fl.model.lora import MAGNITUDE
from edgelam_fl.telemetry.events import EVENTS_FILE, read_events
from edgelam_fl.telemetry.report.incidents import incidents
from edgelam_fl.wire import edgelam_pb2 as pb
from server.replies import KEPT_NODES
from server.state import FederationState
from strategies.aggregation.fedavg import FedAvg
from strategies.api import Aggregated, Contribution, RoundState, Selected, Start
from strategies.registry import with_capabilities
from tests.by_hand import LABELS, ByHand, FederationByHand, moves
from tests.unit.conftest import MakeFederation


def test_two_rounds(federation: MakeFederation) -> None:
    run = federation("ab", "e")
    result = run.run()
    assert moves(result, run.start) == {0: 2, 1: 2, 2: 4, 3: 4, 4: 2, 5: 2}
    assert run.nodes["e"].sent == [True, False, False], "a site's host holds what it needs already"
    assert run.nodes["a"].sent == [True, False, False], "equal updates have an equal mean"
    last = run.events("round_done")[-1]
    assert (last["steps"], [d["metrics"] for d in last["devices"]]) == (0, [{"accuracy": 1 / 2}] * 2)
    assert [event["round"] for event in run.events("shares")] == [1, 2]
    assert [event.round for event in read_events(run.folder.timelines.path)] == [1, 2]  # type: ignore[attr-defined]
    assert run.events("plan")[0]["nodes"]["e"] == {"base": "fp32", "compute": "float32", "rank": 8}
    assert run.events("plan")[0]["sites"] == [
        {"site": "e", "hosts": [{"node": "e", "first": 2, "last": 4}], "devices": ["a", "b"]}
    ]


@pytest.mark.parametrize("rule", ["fedavg", "fedadam", "none"])
def test_magnitudes_and_saved_modules_are_aggregated_and_exported(federation: MakeFederation, rule: str) -> None:
    run = federation("ab", "e", "lora.use_dora=true", "lora.modules_to_save=norm", f"strategy.aggregation={rule}")
    result = run.run()
    own = [name for name in run.start if name.endswith(MAGNITUDE) or "norm" in name]
    assert len(own) == 2 * 6 + 2 * 6 + 1
    assert all((result[name] > run.start[name]).all() for name in own)
    kept = adapters.read_peft_folder(run.folder.path / "adapter")
    assert adapters.digest(kept) == adapters.digest(result)
    config = json.loads((run.folder.path / "adapter/adapter_config.json").read_text("utf-8"))
    assert config["use_dora"]
    assert len(config["modules_to_save"]) == 13


def test_nodes_measure_their_links_again_after_a_round_that_took_far_longer_than_predicted(
    federation: MakeFederation,
) -> None:
    run = federation("ab", "e", "split.cuts=auto", "split.hosts=auto", "federation.rounds=3")
    for node in run.nodes.values():
        node.profile.base_seconds["fp32/fp32"] = 0.01
    run.nodes["a"].step_s = 600.0
    for name, down_bps in (("b", math.nan), ("e", 2e6)):
        profile = run.nodes[name].profile
        profile.round_trip_s, profile.link_up_bps, profile.link_down_bps = 0.25, 1e6, down_bps
    run.run()
    (measured,) = run.events("link_measured")  # a and b sent no usable values
    link = [measured[key] for key in ("node", "link_up_bps", "link_down_bps", "round_trip_s")]
    assert link == ["e", 1e6, 2e6, 0.25]
    told = [" ".join(event["measured"]) for event in run.events("placement")[:3]]
    assert [("links were measured again" in text) for text in told] == [False, True, False]


@pytest.mark.parametrize("rule", ["fedavg", "fedsa", "rolora", "over_the_air"])
def test_a_state_is_all_that_the_next_round_needs_of_earlier_ones(federation: MakeFederation, rule: str) -> None:
    """Another `Rounds` that gets the state after round 2 of 3 sends and computes the same as one that ran all three."""
    settings = ("ab", "e", f"strategy.aggregation={rule}", "federation.rounds=3", "optimizer.schedule=linear")
    whole = federation(*settings)
    expected = whole.state()
    before, after = federation(*settings), federation(*settings)
    state = before.rounds.round_after(before.rounds.round_after(FederationState()))
    after.grid.nodes = before.grid.nodes
    state = after.rounds.round_after(state)
    assert adapters.digest(state.adapter) == adapters.digest(expected.adapter)
    assert (state.round, state.step_offset) == (expected.round, expected.step_offset)
    assert state.exports().keys() == expected.exports().keys()
    for name, node in before.nodes.items():
        digests = [[adapters.digest(got) for got in n.received] for n in (node, whole.nodes[name])]
        assert digests[0] == digests[1][: len(digests[0])]
        assert node.sent == whole.nodes[name].sent[:3]
        rates = [[list(plan.optimizer.lrs) for plan in n.plans[:3]] for n in (node, whole.nodes[name])]
        assert rates[0] == rates[1]


def test_an_attempt_that_fails_changes_holdings_alone(federation: MakeFederation) -> None:
    """At the second attempt, the nodes that replied are sent only what they lack."""
    run = federation("ab", "e", "federation.rounds=1")
    run.nodes["e"].fails = lambda plan: "no memory" if plan.steps and plan.attempt == 1 else ""
    assert moves(run.run(), run.start) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1, 5: 1}
    assert run.nodes["a"].sent[:2] == run.nodes["e"].sent[:2] == [True, True], "a has trained; of e nothing is known"
    assert [event["attempt"] for event in run.events("plan")] == [1, 2, 1]


@pytest.mark.parametrize("overrides", [[], ["strategy.aggregation=fedsa"], ["split.sites=2"]])
def test_jobs_that_are_handed_over_and_asked_for_later_come_to_the_same(
    federation: MakeFederation, overrides: list[str]
) -> None:
    results = []
    for wait in ("block", "park"):
        run = federation("abc", "ef", f"federation.wait={wait}", *overrides)
        run.nodes["c"].fails = lambda plan: "crash" if plan.round == 1 else ""
        results.append((adapters.digest(run.run()), run.events("plan"), run.events("node_lost")))
        (run.folder.path / EVENTS_FILE).unlink()
    for event in (event for _, plans, lost in results for event in plans + lost):
        del event["time"]
    assert results[0] == results[1]
    assert results[0][2], "a ClientApp that crashes at the hand-over is lost as usual"


def test_unlike_ends_are_averaged_with_the_host_by_labels(federation: MakeFederation) -> None:
    run = federation("ab", "e", "split.fronts={'a'=1}", "federation.rounds=1")
    b, site = LABELS["b"], LABELS["a"] + LABELS["b"]
    expected = (b * 1 + site * 2) / (b + site)  # layer 1: device b's own, and on the host
    assert moves(run.run(), run.start)[1] == round(expected, 4)


def test_a_device_that_hosts(federation: MakeFederation) -> None:
    run = federation("ab", "", "split.host_on=any", "federation.rounds=1")
    assert moves(run.run(), run.start) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1, 5: 1}
    done = run.events("round_done")[0]
    assert [[node["name"] for node in done[kind]] for kind in ("devices", "hosts")] == [["a", "b"], ["a"]]


def test_the_other_sites_results_count(federation: MakeFederation) -> None:
    """Round 1: host e fails, so devices a and c have no middle; b's site goes on alone."""
    run = federation("abc", "ef", "split.sites=2", "federation.rounds=1")
    run.nodes["e"].fails = lambda plan: "no memory" if plan.steps else ""
    assert moves(run.run(), run.start) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1, 5: 1}
    (lost,) = run.events("site_lost")
    assert (lost["round"], lost["site"], lost["missing"]) == (1, "e", ["e"])
    assert [event["attempt"] for event in run.events("plan")] == [1, 1]


def test_a_run_starts_with_the_sites_that_came(federation: MakeFederation) -> None:
    run = federation("ab", "e", "split.sites=2", "federation.rounds=1")
    run.run()
    assert [[site["devices"] for site in event["sites"]] for event in run.events("plan")] == [[["a", "b"]]] * 2


def test_cuts_are_chosen_and_chosen_again_when_a_host_is_gone(federation: MakeFederation) -> None:
    """Without measurements, hosts count as alike. In round 2, host e leaves; at the second attempt f holds the middle alone."""
    run = federation("ab", "ef", "split.cuts=auto", "split.hosts=auto", "split.front=1", "split.back=1")
    run.nodes["e"].leaves = lambda plan: plan.round == 2
    assert moves(run.run(), run.start) == {0: 2, 1: 4, 2: 4, 3: 4, 4: 4, 5: 2}
    held = [{h["node"]: h["last"] - h["first"] for h in e["sites"][0]["hosts"]} for e in run.events("placement")]
    assert held == [{"e": 2, "f": 2}, {"e": 2, "f": 2}, {"f": 4}, {"f": 4}]
    assert [event["round"] for event in run.events("placement")] == [1, 2, 2, 3]
    assert run.events("placement")[2]["reason"] == "the old plan is no longer possible"


def test_a_round_without_a_whole_site_is_tried_again(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.rounds=1")
    run.nodes["e"].fails = lambda plan: "crash" if plan.attempt == 1 and plan.steps else ""
    assert moves(run.run(), run.start)[2] == 2
    assert [event["attempt"] for event in run.events("plan")] == [1, 2, 1]
    run.nodes["e"].fails = lambda plan: "no memory"
    with pytest.raises(RunFailed, match="round 1 failed 3 times: e: no memory"):
        run.run()


def test_too_few_devices(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.min_nodes=2")
    run.nodes["b"].fails = lambda plan: "unplugged"
    with pytest.raises(RunFailed, match="round 1 failed 3 times: b: unplugged"):
        run.run()


def test_alone_each_goes_on_with_its_own(federation: MakeFederation) -> None:
    run = federation("ab", "ef", "split.sites=2", "strategy.aggregation=none")
    run.run()
    assert all(node.sent == [True, False, False] for node in run.nodes.values())
    exports = run.folder.path / "adapters"
    assert sorted(path.name for path in exports.iterdir()) == ["a", "b"]
    own = adapters.from_bytes((exports / "b" / "adapter_model.safetensors").read_bytes())
    assert moves(own, run.start) == {0: 2, 1: 2, 2: 4, 3: 4, 4: 2, 5: 2}


@pytest.mark.parametrize(("name", "trained"), [("ffa", "BB"), ("rolora", "BA")])
def test_a_frozen_factor_is_kept(federation: MakeFederation, name: str, trained: str) -> None:
    run = federation("ab", "e", f"strategy.aggregation={name}")
    result = run.run()
    for tensor, array in result.items():
        rounds = trained.count("A" if "lora_A" in tensor else "B")
        by = rounds * (2 if ".layers.2." in tensor or ".layers.3." in tensor else 1)
        np.testing.assert_allclose(array, run.start[tensor] + by, atol=1e-5)
    frozen = [(p.lora.freeze_a, p.lora.freeze_b) for p in run.nodes["a"].plans[:2]]
    assert frozen == [(factor == "B", factor == "A") for factor in trained]
    assert [event["aggregation_error"] for event in run.events("round_done")][:2] == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("name", ["fedavg", "ffa", "flexlora", "hetlora", "fedsa"])
def test_a_cut_adapter_is_averaged_over_sites_and_its_b_stays_on_devices(federation: MakeFederation, name: str) -> None:
    """Whatever the rule for LoRA's factors: A is one matrix of its own. Site of e: a and c; site of f, which moves further: b."""
    settings = ["wire.gradients=lowrank", "lora.train=back", f"strategy.aggregation={name}"]
    run = federation("abc", "ef", "split.sites=2", *settings)
    moved = run.nodes["f"].trained
    run.nodes["f"].trained = lambda spans, by: moved(spans, 5 * by)  # type: ignore[method-assign]
    result = run.run()
    assert run.spec.cut is not None
    for tensor, start in adapters.initial_cut(run.spec.source, run.spec.cut, run.config.run.seed).items():
        learns, of_sites = tensor.endswith(CUT_A), LABELS["a"] + LABELS["c"]
        mean = 2 * (of_sites * 2 + LABELS["b"] * 10) / (of_sites + LABELS["b"]) if learns else 0
        np.testing.assert_allclose(result[tensor], start + mean, rtol=1e-6)
        for node, by_hand in run.nodes.items():
            rounds = [tensor in received for received in by_hand.received]
            if learns:
                assert rounds == ([True, True, True] if node in "ef" else [False] * len(rounds))
            else:
                assert rounds == ([False] * len(rounds) if node in "ef" else [True] + [False] * (len(rounds) - 1))
    kept = adapters.read_peft_folder(run.folder.path / "adapter")
    assert all(np.array_equal(kept[tensor], result[tensor]) for tensor in result if is_cut(tensor))


def test_a_factor_that_a_node_holds_as_it_was_frozen_is_not_sent_again(federation: MakeFederation) -> None:
    """Device b takes no part in round 2, in which A changes: b lacks both factors in round 3, the others only the trained one."""

    class AllButBInRound2:
        def select(self, state: RoundState) -> Selected:
            return Selected([c.name for c in state.candidates if c.name != "b" or state.round != 2])

    run = federation("abc", "e", "strategy.aggregation=rolora", "federation.rounds=3")
    run.rounds.schedule.selection = with_capabilities(AllButBInRound2())
    moved = run.nodes["c"].trained
    run.nodes["c"].trained = lambda spans, by: moved(spans, 5 * by)  # type: ignore[method-assign]
    run.run()
    factors = {name: [{tensor[-8] for tensor in received} for received in run.nodes[name].received] for name in "abe"}
    assert factors == {
        "a": [{"A", "B"}, {"B"}, {"A"}, {"B"}],
        "b": [{"A", "B"}, {"A", "B"}, {"B"}],
        "e": [{"A", "B"}],
    }


def test_a_personal_factor_stays_where_it_is(federation: MakeFederation) -> None:
    """FedSA: the mean of A is sent to a and b, whose steps are 1 and 5; each keeps its own B."""
    run = federation("ab", "e", "strategy.aggregation=fedsa")
    moved = run.nodes["b"].trained
    run.nodes["b"].trained = lambda spans, by: moved(spans, 5 * by)  # type: ignore[method-assign]
    result = run.run()
    for name, sent in (("a", ["AB", "A", "A"]), ("b", ["AB", "A", "A"]), ("e", ["AB"])):
        assert ["".join(sorted({t[-8] for t in got})) for got in run.nodes[name].received] == sent, name
    mean = 2 * (LABELS["a"] * 1 + LABELS["b"] * 5) / (LABELS["a"] + LABELS["b"])
    for tensor, start in run.start.items():
        hosted = ".layers.2." in tensor or ".layers.3." in tensor
        own = {
            name: (4 if hosted else 2 * by) if "lora_B" in tensor else 4 if hosted else mean
            for name, by in (("a", 1), ("b", 5))
        }
        np.testing.assert_allclose(result[tensor], start + (4 if hosted else mean), atol=1e-5)
        for name, by in own.items():
            exported = adapters.from_bytes(
                (run.folder.path / "adapters" / name / "adapter_model.safetensors").read_bytes()
            )
            np.testing.assert_allclose(exported[tensor], start + by, atol=1e-5)
            if not hosted:
                np.testing.assert_allclose(run.nodes[name].held[tensor], start + by, atol=1e-5)


def test_a_personal_adapter_has_the_newest_shared_factor(federation: MakeFederation) -> None:
    """FedSA: b takes no part in round 2, in which a changes A."""

    class ThenAlone:
        def select(self, state: RoundState) -> Selected:
            return Selected(["a", "b"] if state.round == 1 else ["a"])

    run = federation("ab", "e", "strategy.aggregation=fedsa")
    run.rounds.schedule.selection = with_capabilities(ThenAlone())
    result = run.run()
    exported = adapters.from_bytes((run.folder.path / "adapters/b/adapter_model.safetensors").read_bytes())
    front = {name: array for name, array in exported.items() if ".layers.0." in name}
    assert any("lora_A" in name for name in front)
    assert {name: float(np.mean(array - run.start[name]).round(4)) for name, array in front.items()} == {
        name: 2.0 if "lora_A" in name else 1.0 for name in front
    }
    assert all(np.array_equal(front[name], result[name]) for name in front if "lora_A" in name)


def test_corrections_go_down_beside_the_adapter_where_sources_differ(federation: MakeFederation) -> None:
    settings = ["optimizer.name=sgd", "strategy.aggregation=scaffold", "federation.local_steps=4", "optimizer.lr=0.5"]
    run = federation("ab", "e", *settings)
    run.nodes["b"].by = 3.0
    state = run.state()
    a, b = LABELS["a"], LABELS["b"]
    c_a, c_b = -1 / (4 * 0.5), -3 / (4 * 0.5)  # (x - y) / (K eta)
    common = (a * c_a + b * c_b) / (a + b)
    names = {n for n in run.start if ".layers.2." not in n and ".layers.3." not in n}
    for node, own in (("a", c_a), ("b", c_b)):
        none, (found,), evaluates = run.nodes[node].corrections
        assert none == evaluates == []
        assert set(found) == names, "its ends"
        assert all(np.allclose(array, common - own, atol=1e-5) for array in found.values())
        (named,) = run.nodes[node].plans[1].corrections
        assert (named.scope, named.source, named.digest) == ("ends", node, adapters.digest(found))
        first, second, last = (device_of(event, node)["adapter_bytes_down"] for event in run.events("round_done"))
        assert 0 < first == last < second < 2.01 * first
    assert run.nodes["e"].corrections == [[], [], []], "the only source of its layers"
    assert moves(state.adapter, run.start)[2] == 4


def device_of(event: dict[str, Any], name: str) -> dict[str, Any]:
    return next(device for device in event["devices"] if device["name"] == name)


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_carry_factors_go_down_once_and_to_those_that_hold_the_layer(federation: MakeFederation, name: str) -> None:
    """Devices a and b hold layers 0, 1, 4 and 5, and train them together only in round 1; layers 2 and 3 have one source."""

    class BothThenOne:
        def select(self, state: RoundState) -> Selected:
            return Selected(["a", "b"] if state.round == 1 else ["a"] if state.round % 2 == 0 else ["b"])

    run = federation("ab", "e", f"strategy.aggregation={name}", "federation.rounds=4")
    run.rounds.schedule.selection = with_capabilities(BothThenOne())
    for node in run.nodes.values():
        node.trained = partial(uneven, node)  # type: ignore[method-assign]
    result = run.run()
    ends = {0, 1, 4, 5}
    assert carried(result) == ends
    received = {name: [carried(tensors) for tensors in run.nodes[name].received] for name in "abe"}
    assert received == {
        "a": [set(), ends, set()],  # rounds 1 and 2; in round 4 it gets b's factors, and has the carry
        "b": [set(), ends, set()],  # rounds 1 and 3; measures a's factors at the end
        "e": [set()],
    }
    done = run.events("round_done")
    rank = 8 + 8 if name == "flora" else 8
    assert [event["aggregation"].get("carry_rank") for event in done] == [rank] * 4 + [None]
    assert [event["aggregation_error"] for event in done[:4]] == pytest.approx([0] * 4, abs=1e-5)


def uneven(node: ByHand, spans: list[adapters.Span], by: float) -> adapters.Adapter:
    """Returns what a node trained, with a random step per number: equal steps would have products of rank 1."""
    held = {name: array for name, array in adapters.slice_of(node.held, spans).items() if not is_carry(name)}
    seeded = np.random.default_rng([len(node.plans), ord(node.profile.name)])
    return {n: a + np.float32(by) * seeded.normal(size=a.shape).astype(np.float32) for n, a in held.items()}


def carried(tensors: adapters.Adapter) -> set[int]:
    """Returns the layers that have carry factors."""
    return {int(name.split(".layers.")[1].split(".")[0]) for name in tensors if is_carry(name)}


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_a_rank_per_node(federation: MakeFederation, name: str) -> None:
    run = federation("abc", "e", f"strategy.aggregation={name}", "lora.ranks={'b'=2, 'c'=3}", "lora.rank=4")
    result = run.run()
    assert {array.shape[0] for tensor, array in result.items() if "lora_A" in tensor} == {4}
    for node, rank in (("a", 4), ("b", 2), ("c", 3), ("e", 4)):
        ranks = {len(array) for tensor, array in run.nodes[node].held.items() if "lora_A" in tensor}
        assert (ranks, run.events("plan")[0]["nodes"][node]["rank"]) == ({rank}, rank)
    errors = [event["aggregation_error"] for event in run.events("round_done")]
    assert all(error is not None and 0 < error < 1 for error in errors[:2])
    assert errors[2] is None, "nothing was aggregated after the last round"
    exported = json.loads((run.folder.path / "adapter" / "adapter_config.json").read_text())
    assert (exported["r"], exported["rank_pattern"]) == (4, {})


def test_a_device_with_values_that_are_not_finite_is_left_out_with_an_event(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.rounds=1")
    moved = run.nodes["b"].trained
    run.nodes["b"].trained = lambda spans, by: {n: a * np.nan for n, a in moved(spans, by).items()}  # type: ignore[method-assign]
    assert moves(run.run(), run.start) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1, 5: 1}
    (lost,) = [event for event in run.events("node_lost") if event["round"] == 1]
    assert lost["node"] == "b"
    assert "holds values that are not finite, or beyond 10000" in lost["reason"]


@pytest.mark.parametrize("kept", [KEPT_NODES, 0])
def test_s11_an_update_far_larger_than_the_others_is_left_out_and_named(federation: MakeFederation, kept: int) -> None:
    """A stranger's adapter of 1000s, at the largest weight that the plan allows, moves nobody."""
    run = federation("abcd", "", "split.hosts=0", "federation.rounds=1", kept_nodes=kept)
    run.nodes["d"].by = 1000.0
    assert set(moves(run.run(), run.start).values()) == {1}
    (left,) = run.events("contribution_left_out")
    assert (left["round"], left["source"]) == (1, "d")
    assert left["reason"] == "an update of 1000 times the median of 4 (federation.update_factor = 12)"
    assert ("left out of the aggregate of round 1", "d", left["reason"]) in [
        incident[1:] for incident in incidents(list(read_events(run.folder.path / EVENTS_FILE)))
    ]


def test_s11_an_update_against_the_others_is_left_out_and_named(federation: MakeFederation) -> None:
    """A flipped sign has an honest size."""
    run = federation("abcd", "", "split.hosts=0", "federation.rounds=1")
    run.nodes["d"].by = -1.0
    assert set(moves(run.run(), run.start).values()) == {1}
    (left,) = run.events("contribution_left_out")
    assert (left["source"], left["reason"]) == (
        "d",
        "an update against the direction in which the others agree (federation.update_factor = 0 would allow it)",
    )


def test_s11_half_of_the_devices_against_the_other_half_are_all_counted(federation: MakeFederation) -> None:
    run = federation("abcd", "", "split.hosts=0", "federation.rounds=1")
    run.nodes["c"].by = run.nodes["d"].by = -1.0
    run.run()
    assert not run.events("contribution_left_out")


@pytest.mark.parametrize("what", ["its own update", "its gradients at the host"])
def test_s7_a_round_that_a_device_has_spoiled_is_done_again_without_it(federation: MakeFederation, what: str) -> None:
    """The host's layers have learned from its gradients; a device that is out of line in the end is not trusted with those."""
    run = federation("abcd", "e", "federation.rounds=1")
    if what == "its own update":
        run.nodes["d"].by = -1.0
    else:
        run.nodes["e"].reports_opposed = "d"
    run.run()
    plans = [event for event in run.events("plan") if event["round"] == 1]
    assert [event["selected"] for event in plans] == [["a", "b", "c", "d"], ["a", "b", "c"]]
    (refused,) = run.events("aggregate_refused")
    assert refused["reason"].startswith("d: ")
    assert refused["reason"].endswith("and the round is done again without it")
    (done,) = [event for event in run.events("round_done") if event["round"] == 1]
    assert [device["name"] for device in done["devices"]] == ["a", "b", "c"]


def test_s7_a_spoiled_round_counts_if_the_others_are_too_few_for_another(federation: MakeFederation) -> None:
    run = federation("abcd", "e", "federation.rounds=1", "federation.min_nodes=4")
    run.nodes["e"].reports_opposed = "d"
    run.run()
    assert not run.events("aggregate_refused")


def test_s11_any_size_counts_if_the_factor_is_off(federation: MakeFederation) -> None:
    run = federation("abcd", "", "split.hosts=0", "federation.rounds=1", "federation.update_factor=0")
    run.nodes["d"].by = 1000.0
    assert min(moves(run.run(), run.start).values()) > 1
    assert not run.events("contribution_left_out")


def test_s11_values_beyond_all_measure_make_a_reply_unusable(federation: MakeFederation) -> None:
    """With two devices there is no median; there is a limit."""
    run = federation("ab", "", "split.hosts=0", "federation.rounds=1")
    run.nodes["b"].by = 1e30
    assert set(moves(run.run(), run.start).values()) == {1}
    assert "not finite, or beyond 10000" in run.events("node_lost")[0]["reason"]


def test_s11_an_unlike_device_is_not_left_out(federation: MakeFederation) -> None:
    """Ten times as far as the others is still within the default."""
    run = federation("abcd", "", "split.hosts=0", "federation.rounds=1")
    run.nodes["d"].by = 10.0
    run.run()
    assert not run.events("contribution_left_out")


class Overflows(FedAvg):
    """A rule whose result is not finite in one round."""

    broken = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        new = super().aggregate(contributions, start)
        factor = np.float32(np.inf if self.broken else 1)
        return Aggregated({name: array * factor for name, array in new.tensors.items()})


def test_s11_an_aggregate_that_is_not_finite_does_not_replace_the_adapter(federation: MakeFederation) -> None:
    run = federation("abc", "", "split.hosts=0", "federation.rounds=1")
    rule = Overflows()
    run.rounds.aggregation = with_capabilities(rule)
    with pytest.raises(
        RunFailed, match=r"round 1 failed 3 times: the aggregate of .* is not finite; the adapter before"
    ):
        run.run()
    refused = run.events("aggregate_refused")
    assert [(event["round"], event["attempt"]) for event in refused] == [(1, 1), (1, 2), (1, 3)]
    assert not (run.folder.path / "adapter").exists()
    rule.broken = False
    assert set(moves(run.run(), run.start).values()) == {1}


def test_the_devices_that_a_host_left_out_are_named_in_its_part_of_the_round(federation: MakeFederation) -> None:
    run = federation("abc", "e", "federation.rounds=1")
    work = run.nodes["e"].work

    def with_one_left_out(plan: pb.Plan, content: Any) -> Any:
        report, parts = work(plan, content)
        if plan.steps:
            report.host.left_out.add(device="c", steps=3, reason="a gradient of norm 1e+06, more than 10000", out=True)
        return report, parts

    run.nodes["e"].work = with_one_left_out  # type: ignore[method-assign]
    run.run()
    (host,) = run.events("round_done")[0]["hosts"]
    assert host["left_out"] == [
        {"device": "c", "steps": 3, "reason": "a gradient of norm 1e+06, more than 10000", "out": True}
    ]
    told = [incident[1:3] for incident in incidents(list(read_events(run.folder.path / EVENTS_FILE)))]
    assert ("out of round 1, by host e", "c") in told


def test_too_few_sources_for_the_rule(federation: MakeFederation) -> None:
    run = federation("abc", "e", "strategy.aggregation=fedmedian")
    assert set(moves(run.run(), run.start).values()) == {2, 4}
    run.nodes["c"].fails = lambda plan: "unplugged"
    with pytest.raises(
        RunFailed, match=r"round 1 failed 3 times: .*FedMedian\) needs at least 3 sources, .* has 2: a, b"
    ):
        run.run()


# ---------------------------------------------------------------- a large round


def with_losses(run: FederationByHand) -> FederationByHand:
    """Loses host f in round 2, and device b with it; device c trains three times as far in round 1, and to NaN in round 2."""
    moved = run.nodes["c"].trained
    factors = {1: 3.0, 2: np.nan}
    run.nodes["f"].fails = lambda plan: "no memory" if plan.round == 2 else ""
    run.nodes["c"].trained = lambda spans, by: moved(spans, by * factors[run.nodes["c"].plans[-1].round])  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("rule", ["fedavg", "rolora", "fedadam"])
def test_a_large_round_is_summed_up_as_it_arrives(federation: MakeFederation, rule: str) -> None:
    """Sums give the same numbers as kept replies. A site without its host and a device with NaN count in neither."""
    results = []
    for kept in (KEPT_NODES, 0):
        settings = ("split.sites=2", f"strategy.aggregation={rule}", "split.fronts={'c'=1}")
        run = with_losses(federation("abc", "ef", *settings, kept_nodes=kept))
        results.append(run.run())
        done = run.events("round_done")
        assert [event["aggregation_error"] is None for event in done[:2]] == [kept == 0] * 2
        assert all(event["devices"] for event in done[:2])
        assert all(device["adapter_bytes_up"] > 0 for event in done[:2] for device in event["devices"])
        assert {event["node"] for event in run.events("node_lost")} == {"c", "f"}
        (run.folder.path / EVENTS_FILE).unlink()
    for name, array in results[0].items():
        np.testing.assert_allclose(results[1][name], array, rtol=1e-6, atol=1e-7)
        assert np.isfinite(array).all()


def test_a_rule_that_needs_every_reply_has_them_in_a_large_round(federation: MakeFederation) -> None:
    run = federation("abc", "e", "strategy.aggregation=fedmedian", kept_nodes=0)
    assert set(moves(run.run(), run.start).values()) == {2, 4}


def test_steps_by_epochs(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.epochs=3", "federation.batch_size=4")
    run.nodes["b"].profile.examples = 4
    run.run()
    steps = -(-3 * 9 // 4)
    assert [(plan.steps, plan.optimizer.step_offset) for plan in run.nodes["e"].plans] == [
        (steps, 0), (steps, steps), (0, 2 * steps),
    ]  # fmt: skip
    assert [(plan.own_steps, plan.cursor) for plan in run.nodes["b"].plans[:2]] == [(3, 0), (3, 3)]


# ---------------------------------------------------------------- who takes part, with which share


def test_some_devices_take_part_in_turn_and_all_measure_the_result(federation: MakeFederation) -> None:
    run = federation(
        "abc", "e", "strategy.selection=round_robin", "federation.devices_per_round=1", "federation.rounds=4",
        "strategy.aggregation=none",
    )  # fmt: skip
    state = run.state()
    plans = run.events("plan")
    assert [event["selected"] for event in plans] == [["a"], ["b"], ["c"], ["a"], ["a", "b", "c"]]
    assert plans[1]["why"] == {
        "a": "last took part in round 1: 3 of 3, 1 wanted",
        "b": "never took part: 1 of 3, 1 wanted",
        "c": "never took part: 2 of 3, 1 wanted",
    }
    assert run.nodes["b"].plans[-1].steps == 0
    assert sorted(state.personal) == ["a", "b", "c", "site e"], "who took no part keeps its own"


def test_devices_without_held_out_examples_train_and_the_others_measure(federation: MakeFederation) -> None:
    run = federation("ab", "e")
    run.nodes["b"].profile.held_out = 0
    run.run()
    for done in run.events("round_done"):
        assert {device["name"]: device["perplexity"] for device in done["devices"]} == {
            "a": pytest.approx(math.exp(2)),
            "b": None,
        }


def test_a_run_whose_devices_hold_nothing_out_is_done_and_says_so(
    federation: MakeFederation, capsys: pytest.CaptureFixture[str]
) -> None:
    run = federation("ab", "e")
    for name in "ab":
        run.nodes[name].profile.held_out = 0
    run.run()
    assert capsys.readouterr().out.count("nothing held out was measured") == 3
    assert all(d["perplexity"] is None for done in run.events("round_done") for d in done["devices"])


def test_an_evaluation_that_nobody_delivers_fails_the_run(federation: MakeFederation) -> None:
    run = federation("ab", "e")
    for name in "ab":
        run.nodes[name].fails = lambda plan: "" if plan.steps else "no memory"
    with pytest.raises(RunFailed, match="the evaluation after the last round failed"):
        run.run()


def test_shares_follow_what_was_measured(federation: MakeFederation) -> None:
    run = federation("ab", "e", "strategy.bandwidth=equalise", "wire.capacity=8 Mbit/s")
    moved = {"a": 1_000_000, "b": 3_000_000}
    for name, size in moved.items():
        run.nodes[name].moves_bytes = size
    run.run()
    first, second, _ = run.events("plan")
    assert first["shares"] == {"a": pytest.approx(1 / 2), "b": pytest.approx(1 / 2)}, "alike as far as is known"
    assert second["shares"] == {name: pytest.approx(size / sum(moved.values())) for name, size in moved.items()}
    assert run.nodes["b"].plans[1].routes[0].share_bps == pytest.approx(8e6 * 3 / 4)


def test_a_device_without_the_tag_is_not_asked(federation: MakeFederation) -> None:
    run = federation("ab", "e", "strategy.require_tags=lab", "federation.rounds=1")
    run.nodes["b"].profile.tags.append("lab")
    run.run()
    assert [event["selected"] for event in run.events("plan")] == [["b"], ["b"]]
    assert run.events("plan")[0]["why"]["a"] == "has no tag lab (strategy.require_tags)"
    assert [event["unfit"] for event in run.events("plan")] == [{"a": "has no tag lab (strategy.require_tags)"}] * 2
    assert run.nodes["a"].plans == []


def test_strategies_observe_rounds_and_lost_devices(federation: MakeFederation) -> None:
    run = federation("ab", "e", "strategy.selection=oort")
    run.nodes["b"].fails = lambda plan: "unplugged" if plan.round == 2 else ""
    run.run()
    assert run.rounds.schedule.selection.rule._rounds == {"a": 2, "b": 1}


def test_the_events_of_a_round_are_small(federation: MakeFederation) -> None:
    """Three devices, 16 steps of four micro-batches, six intervals each: at most 3 kB per round and device."""
    run = federation("abc", "e", "federation.rounds=4", "federation.local_steps=16", "federation.wait=block")
    for node in run.nodes.values():
        node.work = partial(with_much_to_tell, node, node.work)  # type: ignore[method-assign]
    run.run()
    lines = (run.folder.path / EVENTS_FILE).read_bytes().splitlines(keepends=True)
    of_rounds = [line for line in lines if json.loads(line).get("round") in range(2, 5)]
    assert sum(map(len, of_rounds)) <= 3 * 3 * 3000
    assert run.folder.timelines.path.stat().st_size > 10 * sum(map(len, of_rounds))
    assert len(run.events("shares")[0]["nodes"]) == 4


def with_much_to_tell(
    node: ByHand, work: Callable[..., tuple[pb.JobReport, list[adapters.Adapter]]], plan: pb.Plan, content: RecordDict
) -> tuple[pb.JobReport, list[adapters.Adapter]]:
    report, parts = work(plan, content)
    del report.steps[:]
    for step in range(plan.steps):
        if plan.routes:
            report.steps.add(step=step, counted=True, seconds=1.23456789, labels=512, loss_sum=1234.56789 / (step + 1))
        for number in range(24):
            at = step + number / 24
            report.timeline.add(
                kind="forward",
                role="device" if plan.routes else "host",
                start_s=at,
                seconds=0.0123456,
                step=step,
                peer="edge-1",
            )
    for kind in ("ACT", "GRAD", "PING", "HELLO"):
        for direction in ("sent", "received"):
            report.bytes.add(link="entry e", direction=direction, kind=kind, payload_bytes=12345678, framing_bytes=1234)
    return report, parts
