from __future__ import annotations

import pytest

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.source import ModelSource
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.checks import check_cuts
from server.plans import RoundFacts, held_spans, make_plan, make_routes
from tests.support import run_config

HOST = pb.Profile(name="edge-1", address="10.0.0.1:7000")
TOKENS = {"b": b"B", "a": b"A"}
FACTS = RoundFacts("run", 3, 2, 20, 10)


@pytest.mark.parametrize(("front", "back", "hosts"), [(2, 2, 1), (0, 0, 1), (5, 0, 1), (3, 3, 0), (0, 6, 0)])
def test_cuts_inside_the_model(tiny: ModelSource, front: int, back: int, hosts: int) -> None:
    check_cuts(run_config("x", f"split.front={front}", f"split.back={back}", f"split.hosts={hosts}"), tiny)


@pytest.mark.parametrize(
    ("front", "back", "hosts", "rest"),
    [
        (3, 3, 1, "6 layers, and 1 hosts need at least one each; together they may be at most 5"),
        (40, 0, 1, "6 layers, and 1 hosts need at least one each; together they may be at most 5"),
        (4, 3, 0, "6 layers; together they may be at most 6"),
    ],
)
def test_a_cut_outside_the_model(tiny: ModelSource, front: int, back: int, hosts: int, rest: str) -> None:
    config = run_config("x", f"split.front={front}", f"split.back={back}", f"split.hosts={hosts}")
    with pytest.raises(ConfigError) as caught:
        check_cuts(config, tiny)
    assert str(caught.value) == (
        f"split.front + split.back = {front} + {back} is outside the model: {tiny.name} has {rest}"
    )


def test_routes_over_a_host(tiny: ModelSource) -> None:
    one, two = make_routes(run_config("x", "split.front=1"), tiny, ["b", "a"], [HOST], TOKENS)
    assert (one.device, one.device_index, one.token) == ("a", 0, b"A")
    assert (two.device, two.device_index, two.token) == ("b", 1, b"B")
    assert (one.front, one.back_first) == (1, 6 - 2)
    assert list(one.hops) == [pb.Hop(node="edge-1", first=1, last=4, address="10.0.0.1:7000")]


@pytest.mark.parametrize(
    ("node", "role", "host", "expected"),
    [
        ("a", pb.DEVICE, HOST, [Span(0, 2, embed=True), Span(4, 6, head=True)]),
        ("edge-1", pb.EDGE, HOST, [Span(2, 4)]),
        ("a", pb.DEVICE, None, [Span(0, 6, embed=True, head=True)]),
    ],
)
def test_held_spans(tiny: ModelSource, node: str, role: int, host: pb.Profile | None, expected: list[Span]) -> None:
    config = run_config("x", f"split.hosts={int(host is not None)}")
    plan = make_plan(
        config, tiny, FACTS, node, role, make_routes(config, tiny, ["a"], [host] if host else [], TOKENS), 0.0
    )
    assert held_spans(plan) == expected


def test_a_plan_says_what_the_run_file_says(tiny: ModelSource) -> None:
    config = run_config(
        "m", "lora.train=['front', 'back']", "lora.rank=4", "optimizer.lr=0.5", "federation.min_nodes=3",
        "federation.step_deadline_s=7", "task.max_tokens=33", "data.fields.answer=reply", "run.seed=9",
    )  # fmt: skip
    plan = make_plan(config, tiny, FACTS, "a", pb.DEVICE, make_routes(config, tiny, ["a", "b"], [HOST], TOKENS), 1e6)
    assert (plan.run, plan.round, plan.attempt, plan.steps, plan.optimizer.step_offset) == ("run", 3, 2, 10, 20)
    assert (plan.model.name, plan.model.digest, plan.model.num_layers) == ("m", tiny.digest, 6)
    assert (plan.lora.rank, plan.lora.train_front, plan.lora.train_hosts, plan.lora.train_back) == (
        4,
        True,
        False,
        True,
    )
    assert (plan.optimizer.lr, plan.seed, plan.share_bps, plan.protocol_version) == (0.5, 9, 1e6, PROTOCOL_VERSION)
    assert plan.min_devices == min(3, 2)
    assert (plan.deadlines.step_s, plan.task.max_tokens, plan.task.answer_field) == (7.0, 33, "reply")
