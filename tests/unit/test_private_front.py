"""A front's adapter that never leaves its device: in no report, in no parcel, and there again after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgelam_fl.config import RunConfig
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.held import Held
from edgelam_fl.node.part import Part
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.private_fronts import FOLDER, PrivateFronts
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.split.route import memory_dial
from edgelam_fl.wire import edgelam_pb2 as pb
from server.privacy import start_of_updates
from tests.fleet import Fleet, check_done, joined
from tests.support import run_config

FRONT = 2
KEYS = ("privacy.private_front=true", f"split.front={FRONT}", "optimizer.lr=0.01")


def fleet_of(source: ModelSource, config: RunConfig, data: Path, state: Path, seen: list[Adapter]) -> Fleet:
    """One device over one host; `seen` gets the device's adapter before each part."""

    @contextmanager
    def look(part: Part, held: Held) -> Iterator[None]:
        seen.append(held.ends_trainee.adapter())
        yield

    nodes: dict[str, StageHost] = {}
    fleet = Fleet(source, config, {}, {})
    nodes["edge-1"] = StageHost("edge-1", memory_dial(nodes), fleet.emit, address="edge-1")
    nodes["device-1"] = StageHost(
        "device-1", memory_dial(nodes), fleet.emit,
        examples=DeviceExamples(data), state=state, hooks=NodeHooks(around_play=look),
    )  # fmt: skip
    fleet.hosts["edge-1"], fleet.devices["device-1"] = (nodes["edge-1"], "edge-1"), nodes["device-1"]
    return fleet


def of_front(adapter: Adapter) -> Adapter:
    return {name: array for name, array in adapter.items() if (layer_number(name) or 0) < FRONT}


def test_a_private_front_learns_and_never_leaves(tiny: ModelSource, data_files: list[Path], tmp_path: Path) -> None:
    config, seen = run_config(tiny.name, *KEYS), list[Adapter]()
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    shared = {name: array for name, array in start.items() if name not in of_front(start)}
    fleet = fleet_of(tiny, config, data_files[0], tmp_path, seen)
    reports = fleet.run(shared, 2)
    check_done(reports)
    trained = joined(reports)
    assert trained
    assert not of_front(trained)
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.stat().st_mode & 0o077 == 0
    own = load_file(file)
    assert own.keys() == of_front(start).keys()
    moved = [name for name in own if not np.array_equal(own[name], seen[0][name])]
    assert moved
    assert not any(np.array_equal(own[name], start[name]) for name in own if name.endswith("lora_A.weight"))
    sent = b"".join(report.SerializeToString() for report in reports.values())
    assert any(array.tobytes()[:64] in sent for array in trained.values()), "the search finds what is in a report"
    assert not any(array.tobytes()[:64] in sent for array in own.values() if array.any())

    reports = fleet.run(shared | trained, 1, step_offset=2, send_to=[])
    check_done(reports)
    assert reports["device-1"].moments == "warm"
    assert all(np.array_equal(seen[-1][name], own[name]) for name in own), "it goes on from its own front"

    newest = load_file(file)
    again = fleet_of(tiny, config, data_files[0], tmp_path, seen)
    again.round = fleet.round
    check_done(again.run(shared | joined(reports), 1, step_offset=3))
    assert all(np.array_equal(seen[-1][name], newest[name]) for name in newest), "also after a restart"


def test_a_new_front_has_the_magnitudes_and_norms_of_the_base(tmp_path: Path) -> None:
    like = {
        name: np.full((4, 4) if "lora_B" in name else 4, 3, np.float32)
        for name in ("x.layers.0.lora_B.weight", "x.layers.0.lora_magnitude_vector", "layers.0.norm.weight")
    }
    front = PrivateFronts(tmp_path).of("run", like)
    assert [float(front[name].mean()) for name in like] == [0, 3, 3]


def test_fronts_of_two_runs_are_two(tmp_path: Path) -> None:
    like: Adapter = {"x.layers.0.lora_A.weight": np.zeros((2, 8)), "x.layers.0.lora_B.weight": np.zeros((8, 2))}
    fronts = PrivateFronts(tmp_path)
    first, second = fronts.of("../run", like), fronts.of("other", like)
    fronts.keep("../run", first)
    fronts.keep("other", second)
    assert not np.array_equal(first["x.layers.0.lora_A.weight"], second["x.layers.0.lora_A.weight"])
    assert adapters.digest(PrivateFronts(tmp_path).of("../run", like)) == adapters.digest(first)
    assert {file.parent for file in tmp_path.rglob("*.safetensors")} == {tmp_path / FOLDER}
    wider = {"x.layers.0.lora_A.weight": np.zeros((4, 8), np.float32)}
    assert fronts.of("other", wider)["x.layers.0.lora_A.weight"].shape == (4, 8)


def test_a_disk_that_does_not_take_a_front_costs_no_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like: Adapter = {"x.layers.0.lora_A.weight": np.zeros((2, 8)), "x.layers.0.lora_B.weight": np.zeros((8, 2))}
    (tmp_path / FOLDER).touch()
    fronts = PrivateFronts(tmp_path)
    front = fronts.of("run", like)
    fronts.keep("run", front)
    assert "could not be written" in capsys.readouterr().err
    assert adapters.digest(fronts.of("run", like)) == adapters.digest(front)


@pytest.mark.parametrize("private", [True, False])
def test_a_defended_cut_still_learns(tiny: ModelSource, data_files: list[Path], tmp_path: Path, private: bool) -> None:
    keys = (f"privacy.private_front={str(private).lower()}", "privacy.cut_clip=2.0", "privacy.cut_noise=0.1")
    config = run_config(tiny.name, "optimizer.lr=0.01", "privacy.disguise=0.5", *keys)
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    shared = {name: array for name, array in start.items() if not (private and name in of_front(start))}
    fleet = fleet_of(tiny, config, data_files[0], tmp_path, [])
    reports = fleet.run(shared, 6)
    check_done(reports)
    steps = reports["device-1"].steps
    assert all(step.counted for step in steps)
    assert steps[-1].loss_sum / steps[-1].labels < steps[0].loss_sum / steps[0].labels
    assert bool(of_front(joined(reports))) != private


def test_hosts_do_not_hear_of_the_defence(tiny: ModelSource, data_files: list[Path], tmp_path: Path) -> None:
    config = run_config(tiny.name, *KEYS, "privacy.cut_clip=2.0")
    fleet = fleet_of(tiny, config, data_files[0], tmp_path, [])
    plans = fleet.plans(RoundFacts("run", 1, 1, 0, 1))
    assert plans["device-1"].cut == pb.Cut(clip=2.0, private_front=True)
    assert not plans["edge-1"].HasField("cut")


def test_an_update_with_differential_privacy_is_whole_without_it(tiny: ModelSource) -> None:
    config = run_config(tiny.name, *KEYS, "privacy.mode=central")
    names = start_of_updates(RunSpec(config, tiny))
    assert names
    assert not of_front(names)
