"""Decides what a run file leaves open of the pieces of a batch; the tiny model has 6 layers, of which hosts get 4."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from edgelam_fl.config import Pieces
from edgelam_fl.errors import ConfigError, DoesNotFit
from edgelam_fl.federation.plan_view import plan_of_profiles
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.footprint import GROWTH_BYTES
from edgelam_fl.plan.pieces import choose_pieces, settled
from edgelam_fl.plan.placement import first_proposal
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from server.app import propose, settle
from server.checks import check_together
from server.resuming import resumption
from server.state import FederationState
from tests.support import run_config
from tests.unit.conftest import MakeFederation

OPEN = ("split.micro_batches=auto", "split.window=auto", "federation.batch_size=8", "split.front=1", "split.back=1")
MIB, GIB = 2**20, 2**30


def spec_of(tiny: ModelSource, *overrides: str) -> RunSpec:
    return RunSpec(run_config(tiny.name, *OPEN, *overrides), tiny)


def node(name: str, *, fixed_s: float = 0.0, token_s: float = 1e-4, free: int = GIB, mbps: float = 0.0) -> pb.Profile:
    """Makes a profile; a layer takes it `fixed_s` and `token_s` for each token."""
    role = pb.EDGE if name == "e" else pb.DEVICE
    profile = pb.Profile(name=name, role=role, address=f"{name}:1", memory_available_bytes=free, cpu_threads=1)
    profile.link_up_bps = profile.link_down_bps = 1e6 * mbps
    for tokens in (128, 512):
        profile.layer_times.add(tokens=tokens, seconds={"fp32/fp32": fixed_s + tokens * token_s})
    return profile


def test_pieces_let_two_nodes_compute_at_once(tiny: ModelSource) -> None:
    spec = spec_of(tiny, "split.front=2", "split.back=1")
    alike = [node("d"), node("e")]
    choice = choose_pieces(spec, alike)
    assert choice.pieces.micro_batches > 1
    assert choice.pieces.window > 1, "with one under way, a node would wait for the other"
    steps_s = choice.event().steps_s
    assert steps_s["1"] > 1.2 * choice.event().step_s
    assert set(steps_s) == {"1", "2", "4", "8"}


def test_small_matrices_that_take_long_make_few_pieces(tiny: ModelSource) -> None:
    slow = [node("d", fixed_s=1.0), node("e", fixed_s=1.0)]
    assert choose_pieces(spec_of(tiny), slow).pieces == Pieces(1, 1, False)


def test_several_devices_need_fewer_pieces_than_one(tiny: ModelSource) -> None:
    """With several, the host computes all the time, and only larger matrices make it faster."""
    alone = choose_pieces(spec_of(tiny), [node("d", fixed_s=0.005), node("e", fixed_s=0.005)])
    many = choose_pieces(spec_of(tiny), [node(name, fixed_s=0.005) for name in "abcde"])
    assert many.pieces.micro_batches < alone.pieces.micro_batches


def test_of_windows_that_are_alike_the_smallest_is_taken(tiny: ModelSource) -> None:
    spec = spec_of(tiny, "split.micro_batches=8")
    choice = choose_pieces(spec, [node("d"), node("e")])
    window = choice.pieces.window
    assert {pieces.window for pieces in choice.steps_s} == {1, 2, 4, 8}
    assert choice.steps_s[choice.pieces] <= 1.02 * min(choice.steps_s.values())
    smaller = [step_s for pieces, step_s in choice.steps_s.items() if pieces.window < window]
    assert all(step_s > 1.02 * min(choice.steps_s.values()) for step_s in smaller)


def test_what_the_run_file_says_stays(tiny: ModelSource) -> None:
    nodes = [node("d"), node("e")]
    assert choose_pieces(spec_of(tiny, "split.micro_batches=4"), nodes).pieces.micro_batches == 4
    assert choose_pieces(spec_of(tiny, "split.window=3"), nodes).pieces.window == 3
    assert choose_pieces(spec_of(tiny, "split.checkpointing=true"), nodes).pieces.checkpointing
    closed = spec_of(tiny, "split.micro_batches=2", "split.window=2")
    assert settled(closed, nodes) == (closed, None)


@pytest.mark.parametrize("hosts", [0, 1])
def test_pieces_and_then_recomputing_make_a_run_fit(tiny: ModelSource, hosts: int) -> None:
    spec = spec_of(tiny, "split.checkpointing=auto", "task.max_tokens=512", f"split.hosts={hosts}")

    def chosen(free: int) -> Pieces:
        nodes = [node("d", fixed_s=1.0, free=GIB if hosts else free), *([node("e", fixed_s=1.0, free=free)] * hosts)]
        return choose_pieces(spec, nodes).pieces

    found = list[Pieces]()
    for free in range(512 * MIB, GROWTH_BYTES, -8 * MIB):
        try:
            found.append(chosen(free))
        except DoesNotFit:
            break
    assert found[0] == Pieces(1, 1, False)
    assert found[-1].checkpointing, "few rows at a time, of which little is kept"
    assert found[-1].micro_batches > 1
    assert all(one.checkpointing <= other.checkpointing for one, other in pairwise(found)), (
        "recomputing is the last way out"
    )
    assert any(one.micro_batches > 1 for one in found if not one.checkpointing)


def test_a_decided_run_is_one_whose_run_file_says_so(tiny: ModelSource) -> None:
    nodes = [node("d"), node("e")]
    spec, choice = settled(spec_of(tiny, "split.checkpointing=auto"), nodes)
    assert choice is not None
    micro_batches, window, _ = choice.pieces
    written = spec_of(
        tiny, f"split.micro_batches={micro_batches}", f"split.window={window}", "split.checkpointing=false"
    )
    assert spec == written
    assert first_proposal(spec, nodes).chains[0].step_s == choice.steps_s[choice.pieces]


def test_until_the_nodes_are_there_the_defaults_count(tiny: ModelSource) -> None:
    config = spec_of(tiny, "split.checkpointing=auto").config
    assert config.pieces == Pieces(2, 2, False)
    assert run_config(tiny.name, "split.micro_batches=auto", "federation.batch_size=1").pieces.micro_batches == 1
    most = run_config(tiny.name, "split.micro_batches=auto", "federation.batch_size=256", "federation.local_steps=4000")
    with pytest.raises(ConfigError, match="of 256 micro-batches each"):
        check_together(most)


def test_the_server_decides_before_the_first_plan_and_a_checkpoint_keeps_it(federation: MakeFederation) -> None:
    run = federation("ab", "e", *OPEN)
    spec = settle(run.roster, run.spec, run.folder)
    (told,) = run.events("pieces")
    assert spec.config.pieces == (told["micro_batches"], told["window"], told["checkpointing"])
    assert not spec.config.has_open_pieces
    run.folder.checkpoint(run.rounds.saved(FederationState(round=1)))
    assert resumption(run.folder.path).config == spec.config


def test_a_plan_alone_tells_what_would_be_chosen(federation: MakeFederation) -> None:
    run = federation("ab", "e", *OPEN)
    propose(run.roster, run.spec, run.folder)
    (pieces,), (placement,) = run.events("pieces"), run.events("placement")
    assert pieces["window"] == placement["window"]
    assert pieces["step_s"] == placement["step_s"]


def test_edgelam_plan_says_what_was_chosen_and_why(tiny: ModelSource, tmp_path: Path) -> None:
    times = [{"tokens": tokens, "seconds": {"fp32/fp32": 1e-4 * tokens}} for tokens in (128, 512)]
    file = tmp_path / "profiles.json"
    file.write_text(
        str([{"name": "d", "layer_times": times}, {"name": "e", "role": "edge", "layer_times": times}]).replace(
            "'", '"'
        )
    )
    plan = plan_of_profiles(spec_of(tiny).config, file)
    assert plan.pieces is not None
    assert plan.pieces.words().startswith(f"split.micro_batches = {plan.pieces.micro_batches}, split.window = ")
    assert f"{plan.pieces.micro_batches}: {plan.pieces.step_s:.3g} s" in plan.pieces.words()
    assert plan.to_json()["pieces"]["micro_batches"] == plan.pieces.micro_batches
