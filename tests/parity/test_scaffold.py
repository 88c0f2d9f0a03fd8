"""SCAFFOLD over rounds of stage hosts in one process against plain loops that add the paper's correction themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.layout import site_source
from edgelam_fl.wire import edgelam_pb2 as pb
from strategies.aggregation.fedavg import FedAvg
from strategies.aggregation.scaffold import Scaffold
from strategies.api import Contribution, Start
from strategies.registry import with_capabilities
from tests.fleet import check_done, device_batches, memory_fleet, relative_distance, same_bits
from tests.parity.reference import Reference
from tests.support import run_config

STEPS, LR = 3, 0.5
SGD = ("optimizer.name=sgd", f"optimizer.lr={LR}", "strategy.aggregation=scaffold")
Sources = dict[str, tuple[float, Adapter]]  # labels and tensors


def rounds(
    source: ModelSource, files: list[Path], settings: list[str], rule: Scaffold
) -> list[tuple[Adapter, Sources]]:
    """Runs two rounds; returns what each started from and what each source made of it."""
    config = run_config(source.name, *SGD, *settings)
    current, found = initial_adapter(source, config.lora.targets, config.lora.rank, 1), []
    with memory_fleet(source, config, files) as fleet:
        fleet.aggregation = with_capabilities(rule).capabilities
        for number in range(2):
            reports = fleet.run(current, STEPS, step_offset=STEPS * number)
            check_done(reports)
            given = contributions(reports, settings)
            assert {one.lr_sum for one in given} == {STEPS * LR}
            found.append((current, {one.source: (one.weight, dict(one.tensors)) for one in given}))
            current = {**current, **rule.aggregate(given, Start(current)).tensors}
    return found


def contributions(reports: Mapping[str, pb.JobReport], settings: list[str]) -> list[Contribution]:
    """Joins a device's ends and its copy; a joint site is another source."""
    found: dict[str, Contribution] = {}
    for part in (part for report in reports.values() for part in report.contributions):
        joint = part.scope == "site" and "split.host_mode=copies" not in settings
        name = site_source(part.source) if joint else part.source
        tensors = {**(found[name].tensors if name in found else {}), **adapters.from_bytes(part.adapter)}
        found[name] = Contribution(name, part.weight, tensors, lr_sum=part.lr_sum)
    return list(found.values())


def controls(start: Adapter, first: Sources) -> dict[str, Adapter]:
    """Returns c - c_i after the first round, whose c and c_i were 0: c_i = (x - y) / (K eta), c their mean by labels."""
    own = {
        s: {n: (start[n].astype(np.float64) - y) / (STEPS * LR) for n, y in t.items()} for s, (_, t) in first.items()
    }
    found: dict[str, Adapter] = {source: {} for source in own}
    for name in {name for tensors in own.values() for name in tensors}:
        sources = {s: first[s][0] for s in own if name in own[s]}
        common = sum(labels * own[s][name] for s, labels in sources.items()) / sum(sources.values())
        for source in sources:
            found[source][name] = np.asarray(common - own[source][name], np.float32)
    return found


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (["split.hosts=0"], (0, 6)),
        (["split.host_mode=copies"], (0, 6)),
        (["split.host_mode=joint"], (2, 4)),
    ],
    ids=["no host", "copies", "joint"],
)
def test_two_rounds_are_the_plain_loops_with_the_correction(
    tiny: ModelSource, data_files: list[Path], settings: list[str], kept: tuple[int, int]
) -> None:
    files = data_files[:2]
    rule = Scaffold()
    (start, first), (second, got) = rounds(tiny, files, settings, rule)
    config = run_config(tiny.name, *SGD)
    names = [f"device-{n}" for n in range(1, len(files) + 1)]
    batches = {n: device_batches(tiny, config, file, n, 2 * STEPS) for n, file in zip(names, files, strict=True)}
    corrections = controls(start, first)
    whole = kept == (0, 6)  # each device has all layers, split or not: a loop for each
    for devices in [[name] for name in names] if whole else [names]:
        reference = Reference(tiny, config, second, dict.fromkeys(devices, kept))
        for step in range(STEPS, 2 * STEPS):
            reference.corrected_joint(batches, step, corrections)
        for device in devices:
            expected = reference.own_adapter(device) | (reference.site_adapter() if whole else {})
            assert set(expected) == set(got[device][1])
            assert relative_distance(got[device][1], expected, second) < 1e-6
        if not whole:
            (site,) = (name for name in got if name.startswith("site"))
            assert relative_distance(got[site][1], reference.site_adapter(), second) < 1e-6
            assert not rule.correction(site, got[site][1]), "one source: nothing to correct"
    assert all(any(array.any() for array in corrections[name].values()) for name in names)


def test_split_is_unsplit_to_the_bit(tiny: ModelSource, data_files: list[Path]) -> None:
    whole, copies = (
        rounds(tiny, data_files[:2], settings, Scaffold())
        for settings in (["split.hosts=0"], ["split.host_mode=copies"])
    )
    assert all(same_bits(whole[1][1][name][1], copies[1][1][name][1]) for name in ("device-1", "device-2"))


def test_without_its_controls_it_is_fedavg(tiny: ModelSource, data_files: list[Path]) -> None:
    class Uncorrected(Scaffold):
        corrects_sgd = False

    (_, first), (second, other) = rounds(tiny, data_files[:2], ["split.hosts=0"], Scaffold())
    (start, same), (_, uncorrected) = rounds(tiny, data_files[:2], ["split.hosts=0"], Uncorrected())
    given = [Contribution(name, labels, tensors) for name, (labels, tensors) in first.items()]
    assert {"device-1", "device-2"} <= first.keys()
    assert all(same_bits(first[name][1], same[name][1]) for name in first)
    assert same_bits(second, {**start, **FedAvg().aggregate(given, Start(start)).tensors})
    assert all(relative_distance(uncorrected[n][1], other[n][1], second) > 1e-3 for n in first), "it matters in round 2"
