"""Checkpoints: whole or not there, whatever is killed or full; and a run that goes on from one as if it had never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelam_fl.errors import ConfigError
from edgelam_fl.model import adapter as adapters
from edgelam_fl.telemetry.events import EVENTS_FILE, RoundDone, of_kind, read_events
from server.checkpoint import CHECKPOINTS, Saved, load_newest, save
from server.holdings import Holdings, NodeHoldings
from server.run_folder import RunFolder
from server.state import FederationState
from strategies.api import Aggregation, Selected, Selection
from strategies.registry import with_capabilities
from tests.disk_faults import kill_at
from tests.unit.conftest import MakeFederation


def saved_of(number: int, **memory: Any) -> Saved:
    """Returns a checkpoint whose every array is full of its round's number."""
    adapter = {f"m{n}.lora_A.weight": np.full((4, 8), number, np.float32) for n in range(3)}
    holdings = Holdings({"a": NodeHoldings("d" * 8, {"m0.lora_A.weight": "e" * 8})})
    state = FederationState(
        round=number, step_offset=8 * number, adapter=adapter, personal={"a": adapter}, sites={"a": "site e"}, holdings=holdings
    )  # fmt: skip
    return Saved(run="run-1", state=state, memory={"selection": {"queue": 0.1 * number, **memory}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(one: Any, other: Any) -> None:
    """Compares to the last bit."""
    assert type(one) is type(other) or {type(one), type(other)} <= {tuple, list}
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    else:
        assert repr(one) == repr(other), "NaN too"


def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    memory = {
        "none": None, "flag": True, "count": 2**63, "share": 0.1 + 0.2, "never": float("inf"), "unknown": float("nan"),
        "word": "läuft/weiter", "list": [1, [2.5]], "of": {"a": {"b": np.arange(6.0).reshape(2, 3)}}, "empty": np.zeros((0, 3)),
        "tenth": np.float32(0.1), "scalar": np.zeros(()), "turned": np.arange(6, dtype=np.int64).reshape(2, 3).T, "flags": np.array([True]),
        "half": np.array([1e-7], np.float16),
    }  # fmt: skip
    saved = saved_of(3, **memory)
    save(tmp_path, saved)
    found, problem = load_newest(tmp_path)
    assert problem == ""
    assert_same(dict(found.memory["selection"]), dict(saved.memory["selection"]))
    assert_same(dict(found.state.adapter), dict(saved.state.adapter))
    assert (found.run, found.state.round, found.state.step_offset) == ("run-1", 3, 24)
    assert (found.state.sites, found.state.holdings) == (saved.state.sites, saved.state.holdings)


@pytest.mark.parametrize("value", [{1, 2}, b"x", {1: "a"}, np.array(["a"]), object()])
def test_what_would_not_come_back_is_refused_with_its_place(tmp_path: Path, value: object) -> None:
    save(tmp_path, saved_of(1))
    with pytest.raises(ConfigError, match=r"\['mine'\] is a .*Allowed: None, bool"):
        save(tmp_path, saved_of(2, mine=value))
    assert names(tmp_path / CHECKPOINTS) == ["r000001"]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for number in range(1, 5):
        save(tmp_path, saved_of(number))
    assert names(tmp_path / CHECKPOINTS) == ["r000003", "r000004"]
    save(tmp_path, saved_of(4, again=True))
    assert names(tmp_path / CHECKPOINTS) == ["r000003", "r000004"]
    assert load_newest(tmp_path)[0].memory["selection"]["again"]


def _change(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [_change, lambda file: file.write_bytes(b""), Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    save(tmp_path, saved_of(1))
    save(tmp_path, saved_of(2))
    damage(tmp_path / CHECKPOINTS / "r000002" / name)
    found, problem = load_newest(tmp_path)
    assert found.state.round == 1
    assert problem.startswith("checkpoints/r000002 is damaged")
    shutil.rmtree(tmp_path / CHECKPOINTS / "r000001")
    with pytest.raises(ConfigError, match=r"no checkpoint that can be read.*r000002 is damaged"):
        load_newest(tmp_path)


def test_folders_without_a_checkpoint_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has not finished a round"):
        load_newest(tmp_path)
    (tmp_path / "state.json").write_text('{"round": 3}')
    with pytest.raises(ConfigError, match=r"version of edgelam-fl without checkpoints.*edgelam export"):
        load_newest(tmp_path)
    place = save(tmp_path, saved_of(1))
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "format": 99, "versions": {"edgelam-fl": "9.9"}}))
    with pytest.raises(ConfigError, match=r"is in format 99 \(edgelam-fl 9.9\)"):
        load_newest(tmp_path)


# ---------------------------------------------------------------- a run that goes on

SETTINGS = {
    "fedavg": [],
    "fedadam": ["strategy.aggregation=fedadam"],
    "fedavgm": ["strategy.aggregation=fedavgm"],
    "scaffold": ["strategy.aggregation=scaffold", "optimizer.name=sgd", "optimizer.lr=0.5"],
    "fedsa": ["strategy.aggregation=fedsa"],
    "tifl": ["strategy.selection=tifl"],
    "oort": ["strategy.selection=oort", "federation.devices_per_round=1", "federation.min_nodes=1"],
    "lyapunov": ["strategy.selection=lyapunov", "strategy.bandwidth=lyapunov", "wireless.bandwidth_hz=1e6", "federation.min_nodes=1"],
    "auto cuts": ["split.cuts=auto", "split.hosts=auto"],
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_run_that_goes_on_equals_one_that_never_stopped(federation: MakeFederation, settings: Sequence[str]) -> None:
    common = ("ab", "e", "federation.rounds=5", "optimizer.schedule=linear", *settings)
    whole, first, second = (federation(*common) for _ in range(3))
    for run in (whole, first, second):
        run.nodes["b"].by, run.nodes["b"].moves_bytes = 3.0, 1000
    expected = whole.state()
    state = FederationState()
    for _ in range(2):
        state = first.rounds.round_after(state)
    second.go_on(first)
    result = second.state()
    assert_same(dict(result.adapter), dict(expected.adapter))
    assert_same(dict(result.exports()), dict(expected.exports()))
    for name, node in first.nodes.items():
        digests = [[adapters.digest(got) for got in n.received] for n in (node, whole.nodes[name])]
        assert digests[0] == digests[1], "nothing is sent twice"
        assert [list(plan.optimizer.lrs) for plan in node.plans] == [
            list(plan.optimizer.lrs) for plan in whole.nodes[name].plans
        ]
    rounds = [event.round for event in of_kind(read_events(first.folder.path / EVENTS_FILE), RoundDone)]
    assert rounds == [1, 2, 3, 4, 5, 6]
    assert_same(load_newest(first.folder.path)[0].memory, load_newest(whole.folder.path)[0].memory)


def test_a_round_whose_last_event_was_lost_has_it_after_all(federation: MakeFederation) -> None:
    run, again = federation("ab", "e"), federation("ab", "e")
    run.rounds.round_after(FederationState())
    file = run.folder.path / EVENTS_FILE
    lines = file.read_bytes().splitlines(keepends=True)
    assert b'"round_done"' in lines[-1]
    for left, closes in ((lines[-1][:9], 1), (lines[-1], 0), (b"\0\0\n\0", 1)):
        file.write_bytes(b"".join(lines[:-1]) + left)
        folder = RunFolder.reopened(run.folder.path, again.spec, load_newest(run.folder.path)[0])
        assert [done.round for done in of_kind(read_events(folder.path / EVENTS_FILE), RoundDone)] == [1]
        assert len(file.read_bytes().splitlines()) == len(lines), closes


def test_what_a_killed_server_left_half_done_is_swept(federation: MakeFederation) -> None:
    run = federation("ab", "e", "strategy.aggregation=fedsa")
    run.run()
    path = run.folder.path
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    (path / CHECKPOINTS / "r000003.part").mkdir()
    (path / CHECKPOINTS / "r000003.part" / "state.json").write_text("{")
    for name in (".summary.json.12.345", "report.html.part", ".tmpx3"):
        (path / name).touch()
    (path / "adapter").rename(path / "adapter.old.part")
    (path / "adapters.part").mkdir()
    RunFolder.reopened(path, run.spec, load_newest(path)[0])
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_server_killed_at_any_moment_of_a_checkpoint_leaves_one_to_go_on_from(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them take their time
    run = federation("ab", "e", "strategy.aggregation=fedsa")
    first = run.rounds.round_after(FederationState())
    states = {1: first, 2: run.rounds.round_after(first)}
    second = run.rounds.saved(states[2])
    path = run.folder.path
    shutil.rmtree(path / CHECKPOINTS / "r000002")
    RunFolder.reopened(path, run.spec, run.rounds.saved(first))
    number, killed, committed, draw = 0, True, list[int](), random.Random(1)
    while killed:
        number += draw.randint(1, 5)  # `python -m benchmarks.commits` tries more, with real kills
        killed = kill_at(number, lambda: run.folder.checkpoint(second))
        found, problem = load_newest(path)
        assert problem == ""
        assert_same(dict(found.state.adapter), dict(states[found.state.round].adapter))
        assert_adapters(path, [states[1], states[2]][: found.state.round])
        RunFolder.reopened(path, run.spec, found)
        assert_adapters(path, [states[found.state.round]])
        assert not [file for file in path.rglob("*") if ".part" in file.name or file.name.startswith(".")]
        committed.append(found.state.round)
    assert committed == sorted(committed)
    assert set(committed) == {1, 2}


def assert_adapters(path: Path, states: Sequence[FederationState]) -> None:
    """Asserts that `adapter` is that of one of the states, and so is each in `adapters`."""
    found = adapters.digest(adapters.read_peft_folder(path / "adapter"))
    assert found in [adapters.digest(state.adapter) for state in states]
    for name in states[-1].exports():
        own = [adapters.digest({**state.adapter, **state.exports()[name]}) for state in states]
        assert adapters.digest(adapters.read_peft_folder(path / "adapters" / name)) in own


class Forgetful(Selection):
    def select(self, state: Any) -> Selected:
        return Selected([c.name for c in state.candidates])

    def state(self) -> dict[str, Any]:
        return {"seen": {"a"}}


def test_a_strategy_with_a_state_that_is_no_plain_data_is_refused_before_anything_starts(
    federation: MakeFederation,
) -> None:
    run = federation("ab", "e")
    run.rounds.schedule.selection = with_capabilities(Forgetful())
    with pytest.raises(ConfigError, match=r"strategy.selection\['seen'\] is a set"):
        run.rounds.check_memory()
    assert with_capabilities(type("Plain", (Aggregation,), {"aggregate": lambda *_: None})()).capabilities.state() == {}
