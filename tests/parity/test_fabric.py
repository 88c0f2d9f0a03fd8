"""All nodes in one process, as `edgelam bench` plays them: the same bits as stage hosts of their own, split and unsplit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgelam_fl.model.adapter import Adapter, initial_adapter, slice_of
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.plan.reading import spans_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.simulation.fabric import Fabric
from edgelam_fl.simulation.nodes_file import SimulatedNode, write_federation
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import FABRIC_SEPARATOR
from edgelam_fl.wireless.channels.sectors import Sector
from server.global_adapter import first_adapter
from tests.fleet import Fleet, check_done, joined, memory_fleet, same_bits
from tests.support import run_config

STEPS = 3


class Node:
    """A node of a fabric, by the name that a ClientApp would use."""

    def __init__(self, fabric: Fabric, folder: Path, number: int) -> None:
        handlers = fabric.node(f"{folder}{FABRIC_SEPARATOR}{number}")
        self._submit, self._wait = handlers["Submit"], handlers["Wait"]

    def submit(self, request: pb.SubmitRequest) -> pb.SubmitReply:
        return self._submit(request)

    def wait(self, request: pb.WaitRequest) -> pb.JobReport:
        return self._wait(request)


def fabric_fleet(
    source: ModelSource, settings: list[str], files: list[Path], folder: Path, attack: str = "", held_out: str = ""
) -> Fleet:
    config, fabric = run_config(source.name, *settings), Fabric(seats=2)
    edges = [f"edge-{number}" for number in range(1, config.split.least_hosts + 1)]
    devices = {f"device-{number}": file for number, file in enumerate(files, 1)}
    facts = [SimulatedNode(name=name) for name in edges]
    facts += [
        SimulatedNode(name=name, data=os.path.relpath(file, folder), attack=attack, held_out=held_out)
        for name, file in devices.items()
    ]
    write_federation(folder, facts)
    nodes = {fact.name: Node(fabric, folder, number) for number, fact in enumerate(facts)}
    return Fleet(source, config, {d: nodes[d] for d in devices}, {edge: (nodes[edge], edge) for edge in edges})


def trained(fleet: Fleet) -> tuple[Adapter, dict[str, float]]:
    lora = fleet.config.lora
    reports = fleet.run(initial_adapter(fleet.source, lora.targets, lora.rank, fleet.config.run.seed), STEPS)
    check_done(reports)
    return joined(reports), {name: reports[name].eval_loss_sum for name in fleet.devices}


@pytest.mark.parametrize("mode", ["joint", "copies"])
def test_a_fabrics_nodes_train_like_stage_hosts_of_their_own(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path, mode: str
) -> None:
    settings = ["split.hosts=1", f"split.host_mode={mode}"]
    files = data_files[:1] if mode == "copies" else data_files
    got, losses = trained(fabric_fleet(tiny, settings, files, tmp_path))
    with memory_fleet(tiny, run_config(tiny.name, *settings), files) as fleet:
        expected, expected_losses = trained(fleet)
    assert same_bits(got, expected)
    assert losses == expected_losses


def test_a_split_cell_is_its_unsplit_twin(tiny: ModelSource, data_files: list[Path], tmp_path: Path) -> None:
    split, _ = trained(fabric_fleet(tiny, ["split.hosts=1"], data_files[:1], tmp_path / "split"))
    whole, _ = trained(fabric_fleet(tiny, ["split.hosts=0"], data_files[:1], tmp_path / "whole"))
    assert same_bits(split, whole)


@pytest.mark.parametrize("hosts", [0, 1])
def test_an_attacker_trains_like_any_device_and_sends_something_else(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path, hosts: int
) -> None:
    """A device that flips the sign of its update measures the same loss; what a host trained for it is left alone."""
    settings = [f"split.hosts={hosts}"]
    honest = fabric_fleet(tiny, settings, data_files[:1], tmp_path / "honest")
    start = initial_adapter(tiny, honest.config.lora.targets, honest.config.lora.rank, honest.config.run.seed)
    expected, losses = trained(honest)
    sent, same_losses = trained(fabric_fleet(tiny, settings, data_files[:1], tmp_path / "attack", "sign-flip"))
    plan = honest.plans(RoundFacts("r", 1, 1, 0, 1))["device-1"]
    own = slice_of(start, spans_of(plan)).keys()
    assert own
    assert (own < start.keys()) == bool(hosts)
    assert same_bits(sent, {name: 2 * start[name] - a if name in own else a for name, a in expected.items()})
    assert losses == same_losses


@pytest.mark.parametrize("measured", [3, 0])
def test_a_network_learns_from_arrays_and_is_measured_on_a_file_of_its_own(tmp_path: Path, measured: int) -> None:
    test, files = tmp_path / "test.npz", [tmp_path / "one.npz"]
    np.savez(files[0], channels=Sector(4, 3).draw(8, seed=1))
    test.touch()
    if measured:
        np.savez(test, channels=Sector(4, 3).draw(measured, seed=2))
    settings = ["task.kind=beamforming", "split.hosts=0", "radio.beam_snrs_db=[0.0, 10.0]", "data.held_out=0.25"]
    fleet = fabric_fleet(find_model("beamformer"), settings, files, tmp_path, held_out=test.name)
    reports = fleet.run(first_adapter(RunSpec(fleet.config, fleet.source)), 1)
    check_done(reports)
    (report,) = reports.values()
    assert (report.examples, report.eval_labels) == (2 * 8, 2 * measured)
