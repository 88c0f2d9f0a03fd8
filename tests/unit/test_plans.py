from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.layout import make_layout, who_may_host
from edgelam_fl.plan.making import ClientSettings, RoundFacts, learning_rates, make_plans, own_steps, planned_steps
from edgelam_fl.plan.reading import end_spans, hosted_span, job_id, part_id, spans_of, unit_rows
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import DIAL, LISTEN, make_token, read_token
from tests.support import run_config

FACTS = RoundFacts("run", 3, 2, 20, 10)


def device(name: str, address: str = "", **other: Any) -> pb.Profile:
    return pb.Profile(name=name, role=pb.DEVICE, address=address, **other)


def edge(name: str) -> pb.Profile:
    return pb.Profile(name=name, role=pb.EDGE, address=f"{name}:7000")


def plans_of(
    config: RunConfig, source: ModelSource, *profiles: pb.Profile, facts: RoundFacts = FACTS
) -> dict[str, pb.Plan]:
    """Makes the plans of a round, without profiles for one device "a" and one host "edge-1"."""
    known = {profile.name: profile for profile in profiles or (device("a"), edge("edge-1"))}
    devices = [profile for profile in known.values() if profile.role == pb.DEVICE]
    spec = RunSpec(config, source)
    layout = make_layout(spec, devices, who_may_host(config, known.values()))
    tokens = {profile.name: profile.name.encode() for profile in devices}
    return make_plans(spec, facts, known, layout, {d.name: 1 / len(devices) for d in devices}, tokens)


# ---------------------------------------------------------------- who holds what


def test_a_device_and_its_host(tiny: ModelSource) -> None:
    plans = plans_of(
        run_config("x", "split.front=1", "wire.capacity='8 Mbit/s'"), tiny, device("b"), device("a"), edge("e")
    )
    assert list(plans) == ["e", "a", "b"], "hosts first: they listen when devices dial"
    (route,) = plans["b"].routes
    hop = pb.Hop(node="e", first=1, last=4, address="e:7000")
    assert route == pb.Route(
        device="b", device_index=1, front=1, back_first=6 - 2, hops=[hop], token=b"b", share_bps=8e6 / 2
    )
    assert list(plans["e"].serves) == [*plans["a"].routes, *plans["b"].routes]
    assert (plans["e"].hosted, plans["e"].site) == (pb.Slice(first=1, last=4), "e")
    assert (plans["e"].role, plans["a"].role, list(plans["e"].routes), list(plans["a"].serves)) == (
        pb.EDGE,
        pb.DEVICE,
        [],
        [],
    )
    assert (job_id(plans["e"]), part_id(plans["e"])) == ("run/3/2", "run/3/2/e")


@pytest.mark.parametrize(
    ("overrides", "ends", "hosted"),
    [
        ([], [Span(0, 2, embed=True), Span(4, 6, head=True)], Span(2, 4)),
        (["split.hosts=0"], [Span(0, 6, embed=True, head=True)], None),
        (["split.labels=last-stage", "split.back=0"], [Span(0, 2, embed=True)], Span(2, 6, head=True)),
    ],
)
def test_spans(tiny: ModelSource, overrides: list[str], ends: list[Span], hosted: Span | None) -> None:
    plans = plans_of(run_config("x", *overrides), tiny)
    assert (end_spans(plans["a"]), hosted_span(plans["a"])) == (ends, None)
    if hosted is None:
        assert "edge-1" not in plans
    else:
        assert (end_spans(plans["edge-1"]), hosted_span(plans["edge-1"])) == ([], hosted)


def test_only_the_last_host_has_the_head_for_labels_at_the_last_stage(tiny: ModelSource) -> None:
    config = run_config("x", "split.labels=last-stage", "split.back=0", "split.hosts=2")
    plans = plans_of(config, tiny, device("a"), edge("e"), edge("f"))
    assert [spans_of(plans[name]) for name in ("e", "f")] == [[Span(2, 4)], [Span(4, 6, head=True)]]
    assert plans["a"].routes[0].back_first == 6


def test_a_device_that_hosts_holds_its_ends_and_its_slice(tiny: ModelSource) -> None:
    config = run_config("x", "split.host_on=any", "split.hosts=2", "split.front=1", "split.back=1")
    plans = plans_of(config, tiny, device("a", "a:1"), device("b"), edge("e"))
    assert list(plans) == ["e", "a", "b"]
    assert spans_of(plans["a"]) == [Span(0, 1, embed=True), Span(5, 6, head=True), Span(3, 5)]
    assert (plans["a"].role, plans["a"].site, len(plans["a"].routes), len(plans["a"].serves)) == (
        pb.DEVICE,
        "e+a",
        1,
        2,
    )


# ---------------------------------------------------------------- what the run file says


def test_a_plan_says_what_the_run_file_says(tiny: ModelSource) -> None:
    config = run_config(
        "m", "lora.train=['front', 'back']", "lora.rank=4", "lora.dropout=0.25", "optimizer.lr=0.5", "optimizer.clip=global",
        "optimizer.max_norm=3", "optimizer.keep=always", "federation.step_deadline_s=7", "task.max_tokens=33",
        "data.fields.answer=reply", "run.seed=9", "split.host_mode=copies", "split.checkpointing=true",
        "task.weighting=examples", "task.kind=classification", "task.classes=['yes', 'no']",
    )  # fmt: skip
    plan = plans_of(config, tiny)["a"]
    assert (plan.run, plan.round, plan.attempt, plan.steps, plan.optimizer.step_offset) == ("run", 3, 2, 10, 20)
    assert (plan.model.name, plan.model.digest, plan.model.num_layers) == ("m", tiny.digest, 6)
    assert plan.lora == pb.Lora(
        rank=4, alpha=16.0, targets=["q_proj", "v_proj"], train_front=True, train_back=True, dropout=0.25
    )
    assert (plan.optimizer.clip, plan.optimizer.max_norm, plan.optimizer.keep) == ("global", 3.0, "always")
    assert (plan.host_mode, plan.labels, plan.checkpointing) == ("copies", "device", True)
    assert (plan.seed, plan.protocol_version, plan.deadlines.step_s) == (9, PROTOCOL_VERSION, 7.0)
    assert (plan.task.max_tokens, plan.task.answer_field, plan.task.weighting) == (33, "reply", "examples")
    assert list(plan.task.classes) == ["yes", "no"]


@pytest.mark.parametrize(
    ("min_nodes", "sites", "expected"), [(3, 1, 3), (1, 1, 1), (3, 2, 3 - 2), (4, 2, 2), (9, 1, 4)]
)
def test_a_site_needs_the_devices_without_which_the_round_has_too_few(
    tiny: ModelSource, min_nodes: int, sites: int, expected: int
) -> None:
    config = run_config("x", f"federation.min_nodes={min_nodes}", f"split.sites={sites}")
    plans = plans_of(config, tiny, *(device(name) for name in "abcd"), edge("e"), edge("f"))
    assert plans["e"].min_devices == expected


# ---------------------------------------------------------------- steps and rates


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5 / 2, 1.0 / 2, 0.5, 0.5, 0.5, 0.5]),
        ("linear", [0.5 / 2, 1.0 / 2, *(0.5 * (1 - done / 4) for done in range(4))]),
        ("cosine", [0.5 / 2, 1.0 / 2, *(0.5 * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(4))]),
    ],
)
def test_rates_over_all_planned_steps(schedule: str, rates: list[float]) -> None:
    config = run_config(
        "x", "optimizer.lr=0.5", f"optimizer.schedule={schedule}", "optimizer.warmup_steps=2", "federation.rounds=3"
    )
    found = [
        rate for round_ in (1, 2, 3) for rate in learning_rates(config, RoundFacts("r", round_, 1, 2 * (round_ - 1), 2))
    ]
    assert found == pytest.approx(rates, rel=1e-12)


def test_a_rise_that_never_ends_is_refused_once_the_steps_are_known() -> None:
    config = run_config("x", "optimizer.warmup_steps=6", "federation.rounds=3", "federation.epochs=1")
    assert learning_rates(config, RoundFacts("r", 1, 1, 0, 3))[-1] == pytest.approx(1e-3 * 3 / 6)
    with pytest.raises(ConfigError, match=r"warmup_steps = 6 must be below 6, the steps of the run \(3 rounds of 2\)"):
        learning_rates(config, RoundFacts("r", 1, 1, 0, 2))


def test_a_plan_contains_the_rates_of_its_steps(tiny: ModelSource) -> None:
    plan = plans_of(run_config("x", "optimizer.lr=0.5"), tiny)["edge-1"]
    assert list(plan.optimizer.lrs) == [0.5] * 10


def test_accumulated_batches_are_a_larger_step_of_the_same_micro_batches(tiny: ModelSource) -> None:
    """An epoch has fewer steps then, and a host needs memory for no larger micro-batch."""
    found = []
    for batches in (1, 3):
        settings = [
            f"optimizer.gradient_accumulation_steps={batches}",
            "federation.batch_size=4",
            "split.micro_batches=2",
        ]
        config = run_config("x", *settings, "federation.epochs=2")
        plan = plans_of(config, tiny, device("a"), edge("e"))["a"]
        found.append((plan.batch_size, plan.micro_batches, unit_rows(plan), own_steps(config, 31)))
    assert found == [(4, 2, 2, 16), (12, 6, 2, 6)]


def test_a_device_has_its_own_steps_of_an_epoch(tiny: ModelSource) -> None:
    config = run_config("x", "federation.epochs=2", "federation.batch_size=4")
    profiles = [device("a", examples=9), device("b", examples=16), edge("edge-1")]
    steps = planned_steps(config, profiles[:2])
    assert steps == 2 * 16 // 4
    plans = plans_of(config, tiny, *profiles, facts=RoundFacts("run", 3, 1, 2 * steps, steps))
    own = math.ceil(2 * 9 / 4)
    assert (plans["a"].steps, plans["a"].own_steps, plans["a"].cursor) == (steps, own, 2 * own)
    assert (plans["b"].own_steps, plans["b"].cursor) == (steps, 2 * steps)


def test_without_epochs_all_have_the_same_steps(tiny: ModelSource) -> None:
    config = run_config("x", "federation.local_steps=10")
    plan = plans_of(config, tiny)["a"]
    assert planned_steps(config, [device("a", examples=1)]) == 10
    assert (plan.own_steps, plan.cursor) == (10, 20)


# ---------------------------------------------------------------- bases


def measured(name: str, free_bytes: int, role: pb.Role = pb.DEVICE, **seconds: Any) -> pb.Profile:
    """Makes the profile of a node that measured `seconds`, with "_" for the "/" of pairs."""
    pairs = {key.replace("_", "/"): value for key, value in seconds.items()}
    return pb.Profile(name=name, role=role, address="x:1", memory_available_bytes=free_bytes, base_seconds=pairs)


@pytest.mark.parametrize(
    ("base", "compute", "expected"),
    [
        ("fp32", "auto", ("fp32", "float32")),
        ("bf16", "auto", ("bf16", "bfloat16")),
        ("int8", "auto", ("int8", "float32")),
        ("int8", "bf16", ("int8", "bfloat16")),
        ("auto", "auto", ("fp32", "float32")),  # nothing measured
    ],
)
def test_base_and_compute(tiny: ModelSource, base: str, compute: str, expected: tuple[str, str]) -> None:
    plan = plans_of(run_config("x", f"model.base={base}", f"model.compute={compute}"), tiny)["edge-1"]
    assert (plan.model.base, plan.model.compute, plan.model.wire) == (*expected, expected[1])


def test_the_fastest_base_that_fits_half_of_the_memory(tiny: ModelSource) -> None:
    host = (
        2 * 4 * sum(8 * 8 * n for n in (64, 64, 32, 32, 128, 128, 128))
    )  # layers 2 and 3 of tiny in fp32 are about this
    config = run_config("x", "model.base=auto")
    seconds: dict[str, Any] = {"fp32_fp32": 1.0, "int8_bf16": 2.0, "bf16_bf16": 3.0}
    devices = [measured("a", 1 << 40, **seconds), device("b")]
    plans = plans_of(config, tiny, *devices, measured("e", host, pb.EDGE, **seconds))
    chosen = {name: (plan.model.base, plan.model.compute) for name, plan in plans.items()}
    assert chosen == {"a": ("fp32", "float32"), "b": ("fp32", "float32"), "e": ("int8", "bfloat16")}
    assert {plan.model.wire for plan in plans.values()} == {"float32"}, "bfloat16 only where all compute in it"


def test_auto_keeps_to_the_compute_that_is_asked_for(tiny: ModelSource) -> None:
    config = run_config("x", "model.base=auto", "model.compute=bf16", "split.hosts=0")
    plan = plans_of(config, tiny, measured("a", 1 << 40, fp32_fp32=1.0, int8_bf16=3.0, bf16_bf16=2.0))["a"]
    assert (plan.model.base, plan.model.compute, plan.model.wire) == ("bf16", "bfloat16", "bfloat16")


# ---------------------------------------------------------------- ranks


def test_codecs_are_in_every_plan_and_snapshots_are_as_rare_as_their_bytes_are_few(tiny: ModelSource) -> None:
    """By default a snapshot is a quarter of the bytes that the same steps send, whatever these are."""
    few = ["task.max_tokens=16", "federation.batch_size=2"]
    raw = plans_of(run_config("x", *few), tiny)
    plans = plans_of(run_config("x", *few, "wire.activation_codec=int8", "wire.gradient_codec=int4"), tiny)
    assert {(plan.activation_codec, plan.gradient_codec) for plan in plans.values()} == {("int8", "int4")}
    times = 2 * 64 * 4 / ((64 + 2) + (64 // 2 + 2 * 2))
    assert plans["a"].snapshot_every == pytest.approx(times * raw["a"].snapshot_every, abs=times)
    assert plans["a"].snapshot_every > 3 * raw["a"].snapshot_every


def test_one_rank_per_node(tiny: ModelSource) -> None:
    config = run_config("x", "lora.ranks={'e*'=2, 'edge-1'=3}", "lora.rank=5")
    plans = plans_of(config, tiny)
    assert {name: plan.lora.rank for name, plan in plans.items()} == {"a": 5, "edge-1": 3}


def test_holders_of_a_layer_need_one_rank_unless_the_aggregation_accepts_others(tiny: ModelSource) -> None:
    config = run_config("x", "lora.ranks={'b'=2}")
    with pytest.raises(ConfigError, match=r"layer 0 is held by a with rank 8, b with rank 2: .*lora.ranks"):
        plans_of(config, tiny, device("a"), device("b"), edge("e"))
    plans = plans_of(config, tiny, device("a"), device("b"), edge("e"), facts=replace(FACTS, unequal_ranks=True))
    assert {name: plan.lora.rank for name, plan in plans.items()} == {"a": 8, "b": 2, "e": 8}


def test_what_the_aggregation_asks_for_is_in_every_plan(tiny: ModelSource) -> None:
    settings = ClientSettings(train_b=False, prox_mu=0.25)
    plans = plans_of(run_config("x"), tiny, facts=replace(FACTS, settings=settings))
    assert {(p.lora.freeze_a, p.lora.freeze_b, p.lora.prox_mu) for p in plans.values()} == {(False, True, 0.25)}
    plain = plans_of(run_config("x"), tiny)
    assert {(p.lora.freeze_a, p.lora.freeze_b, p.lora.prox_mu) for p in plain.values()} == {(False, False, 0.0)}


def test_a_relays_two_tokens_are_of_the_same_part(tiny: ModelSource) -> None:
    """The host listens with one token, others dial it with one each: the hub reads part, holder and links from them."""
    plans = plans_of(run_config("x"), tiny, device("a"), edge("e"), facts=replace(FACTS, relay_key=b"key"))
    part = part_id(plans["e"])
    assert read_token(b"key", LISTEN, plans["e"].relay_token) == pb.RelayPass(part=part, node="e")
    (hop,) = plans["a"].routes[0].hops
    assert read_token(b"key", DIAL, hop.relay_tokens["a"]) == pb.RelayPass(part=part, node="a", links=2)
    assert list(hop.relay_tokens) == ["a"]
    without = plans_of(run_config("x"), tiny, device("a"), edge("e"))
    assert not without["e"].relay_token
    assert not without["a"].routes[0].hops[0].relay_tokens


def test_every_dialler_of_a_chain_gets_a_token_for_its_own_links(tiny: ModelSource) -> None:
    nodes = [device("a"), device("b"), edge("e"), edge("f")]
    plans = plans_of(run_config("x", "split.hosts=2"), tiny, *nodes, facts=replace(FACTS, relay_key=b"key"))
    passes = [
        read_token(b"key", DIAL, token)
        for hop in plans["a"].routes[0].hops
        for _, token in sorted(hop.relay_tokens.items())
    ]
    first, second = (part_id(plans["a"], name) for name in ("e", "f"))
    assert passes == [
        pb.RelayPass(part=first, node="a", links=1),
        pb.RelayPass(part=second, node="a", links=1),
        pb.RelayPass(part=second, node="e", links=2),
    ]


def test_a_token_is_good_for_one_method_and_one_key() -> None:
    token = make_token(b"key", DIAL, "part", "a", 1)
    assert read_token(b"key", DIAL, token) is not None
    for wrong in ((b"key", LISTEN, token), (b"other", DIAL, token), (b"key", DIAL, token[:-1]), (b"key", DIAL, b"")):
        assert read_token(*wrong) is None
