"""What counts of nodes' replies, and the adapter that a round starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from edgelam_fl.errors import RunFailed
from edgelam_fl.flower import from_record, packed_record, record_bytes, to_record
from edgelam_fl.model.adapter import Adapter, digest, initial_adapter, slice_of, to_bytes, views
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.layout import Layout, make_layout, who_may_host
from edgelam_fl.plan.making import RoundFacts, make_plans
from edgelam_fl.plan.reading import Span, end_spans, hosted_span, spans_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from server import replies
from server.global_adapter import StartingPoints, as_start, starting_point, with_missing_modules
from server.judging import UpdateJudge
from server.replies import MOST_VALUE, Reply, broken_sites, contributions_of, read_reply
from strategies.aggregation.fedavg import FedAvg
from strategies.api import Start
from tests.support import run_config

STEPS, BATCH, TOKENS = 2, 4, 128
NODES = [pb.Profile(name=name, role=pb.DEVICE, address=f"{name}:1") for name in "abc"]
NODES += [pb.Profile(name=name, role=pb.EDGE, address=f"{name}:1") for name in "ef"]


class Planned:
    """A planned round of devices a, b, c over hosts e, f. `moved` makes what a node trained: its start plus a number."""

    def __init__(
        self,
        source: ModelSource,
        *overrides: str,
        nodes: Sequence[pb.Profile] = NODES,
        unequal_ranks: bool = False,
    ) -> None:
        config = run_config(source.name, *overrides)
        spec = RunSpec(config, source)
        self.layout: Layout = make_layout(spec, nodes[:3], who_may_host(config, nodes))
        profiles = {profile.name: profile for profile in nodes}
        facts = RoundFacts("run", 1, 1, 0, STEPS, unequal_ranks=unequal_ranks)
        self.plans = make_plans(spec, facts, profiles, self.layout, {}, dict.fromkeys("abc", b"t"))
        self.start = with_missing_modules({}, self.plans, spec, unequal_ranks)

    def moved(self, spans: list[Span], by: float) -> Adapter:
        return {name: array + np.float32(by) for name, array in slice_of(self.start, spans).items()}

    def ends(self, name: str, weight: float, by: float) -> tuple[pb.Contribution, Adapter]:
        return pb.Contribution(scope="ends", source=name, weight=weight), self.moved(end_spans(self.plans[name]), by)

    def site(self, name: str, weight: float, by: float, source: str = "") -> tuple[pb.Contribution, Adapter]:
        plan = self.plans[name]
        spans = [hosted_span(plan)]
        if source:
            spans = [Span(h.first, h.last) for r in plan.serves if r.device == source for h in r.hops if h.node == name]
        return pb.Contribution(scope="site", source=source or plan.site, weight=weight), self.moved(spans, by)

    def layer(self, number: int) -> str:
        """Returns the name of one tensor of a layer."""
        return next(name for name in self.start if f".layers.{number}." in name and "lora_A" in name)


def reply(*parts: tuple[pb.Contribution, Adapter]) -> Reply:
    return Reply(pb.JobReport(state="done", contributions=[p for p, _ in parts]), tuple(t for _, t in parts))


def why_unusable(found: Reply, plan: pb.Plan, adapter: Adapter) -> str:
    """Also holds that it is the same for tensors as they arrive, and if a judge measures them afterwards."""
    said = replies.why_unusable(found, plan, StartingPoints(adapter))
    arrived = replace(found, tensors=tuple(views(to_bytes(tensors)) for tensors in found.tensors))
    for judge in (None, UpdateJudge(adapter, {}, frozenset(), 0)):
        assert bool(replies.why_unusable(arrived, plan, StartingPoints(adapter), judge)) == bool(said)
    return said


# ---------------------------------------------------------------- reading


def test_tensors_come_beside_the_report() -> None:
    report = pb.JobReport(state="done", contributions=[pb.Contribution(source="x"), pb.Contribution(source="y")])
    content = RecordDict({"report": ConfigRecord({"report": report.SerializeToString()})})
    for number in (1, 0):
        content[f"adapter-{number}"] = to_record({"m": np.full(3, number, np.float32)})
    found = read_reply(content)
    assert [part.source for part in found.report.contributions] == ["x", "y"]
    assert [tensors["m"].tolist() for tensors in found.tensors] == [[0.0] * 3, [1.0] * 3]


ONE_PART = ConfigRecord({"report": pb.JobReport(contributions=[pb.Contribution()]).SerializeToString()})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"report": ConfigRecord({"report": b"\xff\xff\xff"})}),
        RecordDict({}),
        RecordDict({"report": ONE_PART}),
        RecordDict({"report": ONE_PART, "adapter-0": ConfigRecord({"0": b"x"})}),
        RecordDict({"report": ONE_PART, "adapter-0": MetricRecord({"0": 1})}),
        RecordDict({"report": ONE_PART, "adapter-0": ArrayRecord({"m": Array(np.ones(3, np.float32))})}),
        RecordDict({"report": ONE_PART, "adapter-0": packed_record(b"no tensors")}),
        RecordDict({"report": ONE_PART, "adapter-0": packed_record(bytes(8))}),
    ],
)
def test_garbage_is_a_failed_report(content: RecordDict) -> None:
    report = read_reply(content).report
    assert report.state == "failed"
    assert report.error.startswith("its reply cannot be read: ")


def test_good_contributions(tiny: ModelSource) -> None:
    planned = Planned(tiny)
    assert why_unusable(reply(planned.ends("a", 3, 1)), planned.plans["a"], planned.start) == ""
    assert why_unusable(reply(planned.site("e", 21, 1)), planned.plans["e"], planned.start) == ""
    copies = Planned(tiny, "split.host_mode=copies")
    parts = [copies.site("e", 3, 1, source=name) for name in "abc"]
    assert why_unusable(reply(*parts), copies.plans["e"], copies.start) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.steps.add(step=STEPS), f"a step {STEPS}; its plan has {STEPS}"),
        (lambda r: r.steps.extend([pb.StepReport()] * (STEPS + 1)), f"{STEPS + 1} steps"),
        (lambda r: r.timeline.extend([pb.Interval()] * 1001), "1001 intervals"),
        (lambda r: r.bytes.extend([pb.KindBytes()] * 401), "401 rows of bytes"),
        (lambda r: r.bytes.add(kind="x" * 2001), "kind has 2001 characters"),
        (lambda r: r.steps.add(seconds=math.nan), "seconds is nan"),
        (lambda r: r.steps.add(loss_sum=-1.0), "loss_sum is -1.0"),
        (lambda r: setattr(r, "compute_seconds", math.inf), "compute_seconds is inf"),
        (lambda r: r.eval_sums.update({"correct": -1.0}), "eval_sums is -1.0"),
        (lambda r: r.host.left_out.add(device="b"), "1 devices left out"),
        (lambda r: setattr(r, "eval_loss_sum", math.nan), ""),
        (lambda r: r.steps.add(loss_sum=math.inf, seconds=1.0), ""),
    ],
)
def test_s7_a_report_holds_nothing_that_its_plan_does_not_lead_to(
    tiny: ModelSource, change: Callable[[pb.JobReport], None], words: str
) -> None:
    """Losses may be infinite or not a number, since training can diverge."""
    planned = Planned(tiny)
    given = reply(planned.ends("a", 3, 1))
    change(given.report)
    wrong = why_unusable(given, planned.plans["a"], planned.start)
    assert words in wrong
    assert bool(words) == bool(wrong)


def test_a_site_may_have_unlike_weights_but_no_tensor_twice(tiny: ModelSource) -> None:
    planned = Planned(tiny)
    part, tensors = planned.site("e", 3, 1)
    one, other = (planned.layer(n) for n in (2, 3))
    split = [(part, {one: tensors[one]}), (part, {other: tensors[other]})]
    assert why_unusable(reply(*split), planned.plans["e"], planned.start) == ""
    assert (
        why_unusable(reply(*split, split[0]), planned.plans["e"], planned.start) == f"it contributes {one} of 'e' twice"
    )


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_learning_rates_sum_to_what_the_plan_has(tiny: ModelSource, mode: str) -> None:
    """A source makes one step at least and all at most; a sequential host makes them once per device."""
    planned = Planned(tiny, f"split.host_mode={mode}", "optimizer.schedule=linear")
    for node, (part, tensors) in (("a", planned.ends("a", 3, 1)), ("e", planned.site("e", 21, 1))):
        rates = planned.plans[node].optimizer.lrs
        most = sum(rates) * (len(planned.plans[node].serves) if (node, mode) == ("e", "sequential") else 1)
        for lr_sum in (0.0, min(rates), most):
            part.lr_sum = lr_sum
            assert why_unusable(reply((part, tensors)), planned.plans[node], planned.start) == ""
        for lr_sum in (-min(rates), min(rates) / 2, most * 1.01, math.nan, math.inf):
            part.lr_sum = lr_sum
            assert "which its plan's cannot" in why_unusable(reply((part, tensors)), planned.plans[node], planned.start)


@pytest.mark.parametrize(
    ("node", "scope", "source", "words"),
    [
        ("a", "ends", "b", "its contribution 'ends' of 'b' is none of its plan's"),
        ("a", "site", "e", "none of its plan's"),
        ("e", "ends", "e", "none of its plan's"),
        ("e", "site", "a", "none of its plan's"),  # a device's copy, in joint mode
        ("e", "all", "e", "none of its plan's"),
    ],
)
def test_a_source_that_is_not_the_nodes(tiny: ModelSource, node: str, scope: str, source: str, words: str) -> None:
    planned = Planned(tiny)
    got = reply((pb.Contribution(scope=scope, source=source, weight=1), {}))
    assert words in why_unusable(got, planned.plans[node], planned.start)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, STEPS * BATCH * TOKENS + 1])
def test_a_weight_that_the_plan_does_not_allow(tiny: ModelSource, weight: float) -> None:
    planned = Planned(tiny)
    got = why_unusable(reply(planned.ends("a", weight, 1)), planned.plans["a"], planned.start)
    assert f"the plan allows 0 to {STEPS * BATCH * TOKENS} labels" in got


def test_tensors_that_the_plan_does_not_hold(tiny: ModelSource) -> None:
    planned = Planned(tiny)
    part, tensors = planned.ends("a", 3, 1)
    hosted, own = planned.layer(3), planned.layer(0)
    wrong = {
        hosted: (planned.start[hosted], "which its plan does not let it train"),
        own: (tensors[own][:1], f"is float32 (1, 64), not float32 {tensors[own].shape}"),
    }
    for name, (array, words) in wrong.items():
        assert words in why_unusable(reply((part, {**tensors, name: array})), planned.plans["a"], planned.start)
    for array, words in [
        (tensors[own].astype(np.float64), "is float64"),
        (np.full_like(tensors[own], np.nan), "holds values that are not finite"),
        (np.full_like(tensors[own], -np.inf), "holds values that are not finite"),
        (np.full_like(tensors[own], 1.01 * MOST_VALUE), "or beyond 10000"),
        (np.full_like(tensors[own], 1e30), "or beyond 10000"),
        (np.full_like(tensors[own], MOST_VALUE), ""),
    ]:
        got = why_unusable(reply((part, {own: array})), planned.plans["a"], planned.start)
        assert words in got
        assert bool(words) == bool(got)


def test_a_private_front_is_neither_sent_nor_taken(tiny: ModelSource) -> None:
    planned = Planned(tiny, "privacy.private_front=true")
    plan, (part, tensors) = planned.plans["a"], planned.ends("a", 3, 1)
    sent = starting_point(plan, planned.start, {"a": tensors})
    assert planned.layer(0) not in sent
    assert planned.layer(5) in sent, "the back is everybody's"
    allowed = {name: array for name, array in tensors.items() if name in sent}
    assert why_unusable(reply((part, allowed)), plan, planned.start) == ""
    assert "which its plan does not let it train" in why_unusable(reply((part, tensors)), plan, planned.start)


def test_a_frozen_factor_is_none_of_its_update(tiny: ModelSource) -> None:
    planned = Planned(tiny)
    part, tensors = planned.ends("a", 3, 1)
    planned.plans["a"].lora.freeze_a = True
    b_alone = {name: array for name, array in tensors.items() if not name.endswith("lora_A.weight")}
    assert why_unusable(reply((part, b_alone)), planned.plans["a"], planned.start) == ""
    assert "lora_A.weight, which its plan does not let it train" in why_unusable(
        reply((part, tensors)), planned.plans["a"], planned.start
    )


def test_a_carry_factor_is_none_of_its_update(tiny: ModelSource) -> None:
    planned = Planned(tiny)
    part, tensors = planned.ends("a", 3, 1)
    carry = {planned.layer(0).replace("lora_A", "lora_carry_A"): np.ones((3, 64), np.float32)}
    assert "lora_carry_A.weight, which its plan does not let it train" in why_unusable(
        reply((part, {**tensors, **carry})), planned.plans["a"], {**planned.start, **carry}
    )


def test_an_update_has_its_own_nodes_rank(tiny: ModelSource) -> None:
    planned = Planned(tiny, "lora.ranks={'b'=2}", unequal_ranks=True)
    assert planned.start[planned.layer(0)].shape == (8, 64)
    for node in "ab":
        plan = planned.plans[node]
        part, _ = planned.ends(node, 3, 1)
        own = slice_of(starting_point(plan, planned.start, {}), end_spans(plan))
        assert own[planned.layer(0)].shape == (plan.lora.rank, 64)
        assert why_unusable(reply((part, own)), plan, planned.start) == ""
    (found,) = contributions_of({"b": reply((part, own))}, planned.plans, planned.layout, [])
    assert set(found.scales.values()) == {16.0 / 2}
    assert set(found.scales) == {name.removesuffix(".lora_A.weight") for name in own if "lora_A" in name}
    wide = reply((part, slice_of(planned.start, end_spans(planned.plans["a"]))))
    assert "(8, 64), not float32 (2, 64)" in why_unusable(wide, planned.plans["b"], planned.start)


def test_a_copy_holds_only_what_its_device_crosses(tiny: ModelSource) -> None:
    planned = Planned(tiny, "split.host_mode=copies", "split.fronts={'a'=1}")
    part, tensors = planned.site("e", 3, 1, source="b")
    assert planned.layer(1) not in tensors
    name = planned.layer(1)  # the host holds it for device a only
    got = why_unusable(reply((part, {**tensors, name: planned.start[name]})), planned.plans["e"], planned.start)
    assert got == f"its update has a tensor {name}, which its plan does not let it train"


def test_a_failed_report_says_why(tiny: ModelSource) -> None:
    plan = Planned(tiny).plans["a"]
    assert why_unusable(Reply(pb.JobReport(state="failed", error="no memory")), plan, {}) == "no memory"
    assert why_unusable(Reply(pb.JobReport(state="running")), plan, {}) == "its report says 'running'"


# ---------------------------------------------------------------- a source


def test_a_chain_of_hosts_is_one_source(tiny: ModelSource) -> None:
    planned = Planned(tiny, "split.hosts=2", "split.front=1")
    replies = {"f": reply(planned.site("f", 21, 2)), "e": reply(planned.site("e", 21, 1))}
    (site,) = contributions_of(replies, planned.plans, planned.layout, [])
    assert (site.source, site.weight) == ("site e+f", 21)
    assert set(site.tensors) == set(planned.moved([Span(1, 4)], 0))
    name = planned.layer(3)
    assert np.array_equal(site.tensors[name], planned.start[name] + np.float32(2))


def test_a_devices_ends_and_copies_are_one_source(tiny: ModelSource) -> None:
    planned = Planned(tiny, "split.host_mode=copies")
    hosted = reply(*(planned.site("e", weight, 1, source=name) for name, weight in zip("abc", (3, 17, 1), strict=True)))
    replies = {"e": hosted, "a": reply(planned.ends("a", 3, 1)), "b": reply(planned.ends("b", 17, 1))}
    found = contributions_of(replies, planned.plans, planned.layout, [])
    assert [(c.source, c.weight, len(c.tensors) == len(planned.start)) for c in found] == [
        ("a", 3, True),
        ("b", 17, True),
        ("c", 1, False),  # its own part did not come
    ]


def test_a_device_and_the_site_that_it_hosts_are_two(tiny: ModelSource) -> None:
    """Layer 2 is in its own ends, and in its slice as a host for the other devices."""
    planned = Planned(tiny, "split.host_on=any", "split.fronts={'a'=3}", nodes=NODES[:3])
    both = reply(planned.ends("a", 3, 1), planned.site("a", 21, 2))
    assert why_unusable(both, planned.plans["a"], planned.start) == ""
    found = contributions_of({"a": both}, planned.plans, planned.layout, [])
    assert [(c.source, c.weight) for c in found] == [("a", 3), ("site a", 21)]
    shared = planned.layer(2)
    mean = FedAvg().aggregate(found, Start({})).tensors[shared]
    start = planned.start[shared].astype(np.float64)
    expected = (start + np.float32(1)) * 3 / 24 + (start + np.float32(2)) * 21 / 24
    assert np.allclose(mean, expected, rtol=1e-6, atol=1e-6)


def test_nothing_of_a_broken_site_counts(tiny: ModelSource) -> None:
    planned = Planned(tiny, "split.sites=2")
    replies = {name: reply(planned.ends(name, 3, 1)) for name in "abc"} | {"f": reply(planned.site("f", 3, 1))}
    broken = broken_sites(planned.layout, replies)
    assert broken == {"e": ["e"]}
    assert [c.source for c in contributions_of(replies, planned.plans, planned.layout, broken)] == ["b", "site f"]


def test_no_weight_no_contribution(tiny: ModelSource) -> None:
    planned = Planned(tiny)
    assert contributions_of({"a": reply(planned.ends("a", 0, 1))}, planned.plans, planned.layout, []) == []


# ---------------------------------------------------------------- where a round starts


def test_each_module_starts_in_its_holders_rank(tiny: ModelSource) -> None:
    planned = Planned(tiny, "lora.ranks={'e'=2}")
    expected = initial_adapter(tiny, ["q_proj", "v_proj"], 8, 1)
    hosted = initial_adapter(tiny, ["q_proj", "v_proj"], 2, 1)
    ends, middle = [Span(0, 2), Span(4, 6)], [Span(2, 4)]
    assert digest(planned.start) == digest(slice_of(expected, ends) | slice_of(hosted, middle))


def test_what_was_trained_is_kept_and_another_rank_refused(tiny: ModelSource) -> None:
    planned = Planned(tiny)
    trained = planned.moved([Span(0, 6)], 1)
    config = run_config(tiny.name)
    assert digest(with_missing_modules(trained, planned.plans, RunSpec(config, tiny))) == digest(trained)
    with pytest.raises(
        RunFailed, match=r"was trained as \[8, 64\]; node e, which holds it now, has rank 2 \(lora.ranks\)"
    ):
        with_missing_modules(trained, Planned(tiny, "lora.ranks={'e'=2}").plans, RunSpec(config, tiny))


def test_a_larger_rank_than_before_leaves_the_product_as_it_is(tiny: ModelSource) -> None:
    """A holder of rank 8 after rounds at rank 2: A gets more rows, of the initial values, and B does not use them yet."""
    narrow = Planned(tiny, "lora.ranks={'*'=2}")
    trained = narrow.moved([Span(0, 6)], 1)
    wide = with_missing_modules(trained, Planned(tiny).plans, RunSpec(run_config(tiny.name), tiny), unequal_ranks=True)
    a = narrow.layer(0)
    b = a.replace("lora_A", "lora_B")
    assert (wide[a].shape, wide[b].shape) == ((8, 64), (trained[b].shape[0], 8))
    np.testing.assert_allclose(16 / 8 * wide[b] @ wide[a], 16 / 2 * trained[b] @ trained[a], rtol=1e-5)
    assert np.array_equal(wide[a][2:], initial_adapter(tiny, ["q_proj", "v_proj"], 8, 1)[a][2:])
    assert not wide[b][:, 2:].any()
    again = with_missing_modules(wide, narrow.plans, RunSpec(run_config(tiny.name), tiny), unequal_ranks=True)
    assert digest(again) == digest(wide), "a smaller rank is cut on the way to its node, not here"
    sent = starting_point(narrow.plans["a"], wide, {})
    np.testing.assert_allclose(sent[b] @ sent[a], trained[b] @ trained[a], rtol=1e-5)


def test_nodes_with_the_same_layers_share_one_slice_whose_digest_is_that_of_its_tensors(tiny: ModelSource) -> None:
    planned = Planned(tiny, "lora.ranks={'c'=2}", unequal_ranks=True)
    starts = StartingPoints(planned.start, {"b": {}})
    first = starts.start(planned.plans["a"])
    assert starts.start(planned.plans["b"]) is first
    assert starts.start(planned.plans["c"]) is not first, "another rank"
    assert starts.start(planned.plans["e"]) is not first, "other layers"
    plan = planned.plans["a"]
    assert first.digest == digest(first.tensors) == digest(starting_point(plan, planned.start, {}))
    own = StartingPoints(planned.start, {"b": planned.moved(end_spans(planned.plans["b"]), 1)})
    assert own.start(planned.plans["b"]).digest != own.start(plan).digest == first.digest


def test_the_start_carries_each_modules_scale(tiny: ModelSource) -> None:
    start = as_start(Planned(tiny, "lora.ranks={'e'=2}").start, RunSpec(run_config(tiny.name), tiny), 1)
    assert set(start.scales.values()) == {16 / 8, 16 / 2}
    assert len(start.scales) == 2 * 6


def test_scales_follow_the_kind_of_lora(tiny: ModelSource) -> None:
    """At the start and in what nodes contribute: alpha / sqrt(rank), with a rank of 2 and an alpha of 6 for layer 0's q_proj."""
    module = "model.layers.0.self_attn.q_proj"
    kind = [
        "lora.use_rslora=true",
        f"lora.rank_pattern={{ '{module}' = 2 }}",
        "lora.alpha_pattern={ 'layers.0.*q_proj' = 6.0 }",
    ]
    planned = Planned(tiny, *kind)
    start = as_start(planned.start, RunSpec(run_config(tiny.name, *kind), tiny), 1)
    others = 16 / math.sqrt(8)
    assert {name: scale for name, scale in start.scales.items() if scale != others} == {
        f"base_model.model.{module}": 6 / math.sqrt(2)
    }
    (given,) = contributions_of({"a": reply(planned.ends("a", 1, 1))}, planned.plans, planned.layout, [])
    assert given.scales == {name: start.scales[name] for name in given.scales}
    assert sorted(set(given.scales.values())) == sorted({others, 6 / math.sqrt(2)})
    assert [len(terms.modules) for terms in planned.plans["a"].lora.own] == [1]
    assert not planned.plans["e"].lora.own, "of what a node does not hold, its plan says nothing"


def test_rslora_keeps_a_products_value_in_another_rank(tiny: ModelSource) -> None:
    planned = Planned(tiny, "lora.ranks={'c'=2}", "lora.use_rslora=true", unequal_ranks=True)
    a = planned.layer(0)
    b = a.replace("lora_A", "lora_B")
    trained = planned.start | {b: np.zeros_like(planned.start[b])}
    trained[b][:, :2] = 1  # in a rank that both have
    sent = starting_point(planned.plans["c"], trained, {})
    whole, narrow = trained[b] @ trained[a] * 16 / math.sqrt(8), sent[b] @ sent[a] * 16 / math.sqrt(2)
    np.testing.assert_allclose(narrow, whole, rtol=1e-5)


def test_magnitudes_are_part_of_each_slice(tiny: ModelSource) -> None:
    planned = Planned(tiny, "lora.use_dora=true", "lora.modules_to_save=norm")
    sent = starting_point(planned.plans["e"], planned.start, {})
    ends = [name.rpartition("proj")[2] or name for name in sent if ".layers.2." in name]
    assert sum(end == ".lora_magnitude_vector" for end in ends) == 2
    assert {name for name in sent if "norm" in name} == {
        f"base_model.model.model.layers.{layer}.{norm}.weight"
        for layer in (2, 3)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert "base_model.model.model.norm.weight" in starting_point(planned.plans["a"], planned.start, {})
    again = with_missing_modules(
        planned.start, planned.plans, RunSpec(run_config(tiny.name, "lora.use_dora=true"), tiny)
    )
    assert digest(again) == digest(planned.start)


def test_a_node_starts_from_its_own_where_it_goes_on_alone(tiny: ModelSource) -> None:
    planned = Planned(tiny)
    own = {name: planned.moved([Span(0, 6)], by) for name, by in (("a", 1), ("site e", 2))}
    for node, by in (("a", 1), ("b", 0), ("e", 2)):
        plan = planned.plans[node]
        assert digest(starting_point(plan, planned.start, own)) == digest(planned.moved(spans_of(plan), by))


# ---------------------------------------------------------------- how an adapter travels


def test_an_adapter_is_few_objects_however_many_tensors_it_has() -> None:
    """Each array is objects of its own, and each object a request to Flower's server."""
    tensors = {f"layer.{number}": np.full((2, 3), number, np.float32) for number in range(50)}
    record = to_record(tensors)
    assert len(record) == 1
    read = from_record(record)
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], array) for name, array in tensors.items())
    assert record_bytes(record) < sum(array.nbytes for array in tensors.values()) + 8000
    assert from_record(to_record({})) == {}
    large = {"m": np.arange(400_000, dtype=np.float32), "n": np.ones(5, np.float32)}
    record = to_record(large)
    assert len(record) == 4  # no piece is so large that its receiver would wait long without a sign
    assert max(len(array.data) for array in record.values()) <= 1 << 19
    read = from_record(record)
    assert all(np.array_equal(read[name], array) for name, array in large.items())
