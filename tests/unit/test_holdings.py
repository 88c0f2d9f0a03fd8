"""What nodes are known to hold, and what has to be sent to them."""

from __future__ import annotations

import numpy as np
import pytest

from edgelam_fl.model.adapter import Adapter, digest, tensor_digest
from edgelam_fl.wire import edgelam_pb2 as pb
from server.global_adapter import StartingPoint, is_frozen
from server.holdings import Holdings, NodeHoldings, holdings_after
from server.replies import Reply

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight" for factor in "AB")
START: Adapter = {A: np.ones((2, 4), np.float32), B: np.zeros((4, 2), np.float32)}
TRAINED: Adapter = {name: array + np.float32(1) for name, array in START.items()}


def held(tensors: Adapter) -> NodeHoldings:
    return NodeHoldings(digest(tensors), {name: tensor_digest(name, array) for name, array in tensors.items()})


def reply(adapter_digest: str, **trained: np.ndarray) -> Reply:
    return Reply(pb.JobReport(state="done", adapter_digest=adapter_digest), ({{"a": A, "b": B}[k]: t for k, t in trained.items()},))  # fmt: skip


def lacking(holdings: Holdings, node: str = "n", needed: Adapter = TRAINED) -> list[str] | None:
    found = holdings.lacking(node, StartingPoint(needed, frozenset()))
    if found is not None:
        assert all(found[name] is needed[name] for name in found), "the needed tensors themselves"
    return None if found is None else sorted(found)


def test_an_unknown_node_is_sent_everything() -> None:
    assert lacking(Holdings()) == [A, B]
    assert lacking(Holdings({"other": held(TRAINED)})) == [A, B]


def test_a_node_that_holds_what_is_needed_is_sent_nothing() -> None:
    assert lacking(Holdings({"n": held(TRAINED)})) is None
    whole_alone = NodeHoldings(digest(TRAINED))
    assert lacking(Holdings({"n": whole_alone})) is None, "no tensor has to be known"


def test_changed_tensors_alone_are_sent() -> None:
    assert lacking(Holdings({"n": held({A: TRAINED[A], B: START[B]})})) == [B]
    assert lacking(Holdings({"n": held(START)})) == [A, B]


def test_a_node_that_holds_more_is_sent_an_empty_adapter() -> None:
    """So that it drops what it does not need any more."""
    more = {**TRAINED, A.replace("layers.0", "layers.1"): START[A]}
    assert lacking(Holdings({"n": held(more)})) == []


def test_shape_and_dtype_are_part_of_a_tensor() -> None:
    other = {A: TRAINED[A].reshape(4, 2), B: TRAINED[B].astype(np.float64)}
    assert lacking(Holdings({"n": held(other)})) == [A, B]


def test_a_round_brings_news_of_some_nodes() -> None:
    before = Holdings({"a": held(START), "b": held(START), "c": held(START)})
    after = before.after({"a": held(TRAINED), "b": None, "d": held(START)})
    assert after.by_node == {"a": held(TRAINED), "c": held(START), "d": held(START)}
    assert before.by_node == {name: held(START) for name in "abc"}, "values do not change"


def test_what_a_node_trained_is_what_it_holds() -> None:
    start = StartingPoint(START, frozenset())
    found = holdings_after(start, reply(digest(TRAINED), a=TRAINED[A], b=TRAINED[B]))
    assert found == held(TRAINED)
    kept = {A: START[A], B: TRAINED[B]}
    assert holdings_after(start, reply(digest(kept), b=TRAINED[B])) == held(kept), "the rest stays"


@pytest.mark.parametrize(("frozen", "known"), [("a", [A]), ("b", [B]), ("", [])])
def test_of_a_digest_that_fits_nothing_the_frozen_factor_alone_is_known(frozen: str, known: list[str]) -> None:
    """As in a large round, whose replies are kept without their tensors."""
    plan = pb.Plan(lora=pb.Lora(freeze_a=frozen == "a", freeze_b=frozen == "b"))
    start = StartingPoint(START, frozenset(name for name in START if is_frozen(plan, name)))
    found = holdings_after(start, reply(digest(TRAINED)))
    assert found == NodeHoldings(digest(TRAINED), {name: tensor_digest(name, START[name]) for name in known})
