"""Modes, unlike cuts, sites, devices that host: stage hosts in one process against one plain loop."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from edgelam_fl.config import RunConfig
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.split.inbox import Inbox
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Link
from strategies.aggregation.fedavg import FedAvg
from strategies.aggregation.fedprox import FedProx
from strategies.aggregation.ffa import FfaLora
from strategies.aggregation.rolora import RoLora
from strategies.api import Aggregation
from tests.fleet import averaged, check_done, device_batches, memory_fleet, relative_distance, same_bits
from tests.parity.reference import Reference
from tests.support import run_config

STEPS = 4  # each device begins its data for the second time, and optimizers' moments count
Reports = dict[str, pb.JobReport]


def start_of(source: ModelSource, config: RunConfig) -> Adapter:
    return initial_adapter(source, config.lora.targets, config.lora.rank, config.run.seed)


def batches_of(source: ModelSource, config: RunConfig, files: Sequence[Path], steps: int) -> dict:
    return {
        f"device-{n}": device_batches(source, config, file, f"device-{n}", steps) for n, file in enumerate(files, 1)
    }


def by_source(reports: Reports, scope: str) -> dict[str, Adapter]:
    """Returns the tensors that each source trained; the hosts of a chain share a source."""
    found: dict[str, Adapter] = {}
    for report in reports.values():
        for contribution in report.contributions:
            if contribution.scope == scope:
                found.setdefault(contribution.source, {}).update(adapters.from_bytes(contribution.adapter))
    return found


def run_rounds(
    source: ModelSource,
    config: RunConfig,
    files: Sequence[Path],
    rounds: int = 1,
    steps: int = STEPS,
    rule: Aggregation | None = None,
) -> tuple[Reports, Adapter]:
    """Runs rounds; returns the last round's reports, and the adapter after its aggregation."""
    adapter = start_of(source, config)
    with memory_fleet(source, config, files) as fleet:
        for number in range(rounds):
            fleet.settings = (rule or FedAvg()).client_settings(number + 1)
            reports = fleet.run(adapter, steps, step_offset=number * steps)
            check_done(reports)
            adapter = averaged(adapter, reports)
    return reports, adapter


def assert_same_as(reports: Reports, reference: Reference) -> None:
    site = by_source(reports, "site")
    assert len(site) == 1
    assert same_bits(next(iter(site.values())), reference.site_adapter())
    ends = by_source(reports, "ends")
    for device in reference.devices:
        own = reference.own_adapter(device)
        assert same_bits(ends.get(device, {}), own)
        assert not own or any(array.any() for name, array in own.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def undisturbed(tiny: ModelSource, data_files: list[Path]) -> Callable[[str, int, str], Reports]:
    """Plays a round of all devices in a mode, over so many hosts and with a base, once each."""

    @cache
    def played(mode: str, hosts: int, base: str) -> Reports:
        return run_rounds(tiny, shared_front(tiny, mode, hosts, base), data_files)[0]

    return played


def shared_front(source: ModelSource, mode: str, hosts: int, base: str = "fp32") -> RunConfig:
    settings = (f"split.host_mode={mode}", f"split.hosts={hosts}", "split.front=1", f"model.base={base}")
    return run_config(source.name, *settings)


@pytest.fixture(scope="module")
def shared_middle(tiny: ModelSource, data_files: list[Path]) -> Callable[[str, str], Reference]:
    """Trains the plain loop in a mode and a base, once each: the number of hosts is nothing to it."""

    @cache
    def trained(mode: str, base: str) -> Reference:
        config = shared_front(tiny, mode, 1, base)
        kept = dict.fromkeys(["device-1", "device-2", "device-3"], (1, 4))
        reference = Reference(tiny, config, start_of(tiny, config), kept)
        getattr(reference, mode)(batches_of(tiny, config, data_files, STEPS), STEPS)
        return reference

    return trained


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_three_devices_train_like_one_loop_with_a_shared_middle(
    undisturbed: Callable[..., Reports],
    shared_middle: Callable[[str, str], Reference],
    mode: str,
    hosts: int,
    base: str,
) -> None:
    assert_same_as(undisturbed(mode, hosts, base), shared_middle(mode, base))


def test_a_device_does_not_wait_for_decisions_about_others(
    tiny: ModelSource,
    data_files: list[Path],
    undisturbed: Callable[..., Reports],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device finds the close of another's turn in its inbox when its own step begins."""
    expected_reports = undisturbed("sequential", 1, "fp32")
    monkeypatch.setattr(Inbox, "empty", lambda inbox: False)
    reports, _ = run_rounds(tiny, shared_front(tiny, "sequential", 1), data_files)
    for source in ("site", "ends"):
        got, expected = by_source(reports, source), by_source(expected_reports, source)
        assert got.keys() == expected.keys() != set()
        assert all(same_bits(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_a_host_waits_for_a_table_that_is_later_than_the_totals(
    tiny: ModelSource,
    data_files: list[Path],
    undisturbed: Callable[..., Reports],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each device's frames go along the chain on a link of their own, and one of the links is slow."""
    expected_reports = undisturbed(mode, 2, "fp32")
    line = ThreadPoolExecutor(1)  # keeps the order of what the slow link brings, its end included

    def slowly(put_in: Callable[..., None], due: float, *arguments: object) -> None:
        time.sleep(max(0.0, due - time.monotonic()))
        put_in(*arguments)

    def delayed(put_in: Callable[..., None]) -> Callable[..., None]:
        def arrives(inbox: Inbox, link: Link, *rest: object) -> None:
            if link.name == "entry edge-2 for device-3":
                line.submit(slowly, put_in, time.monotonic() + 0.05, inbox, link, *rest)
            else:
                put_in(inbox, link, *rest)

        return arrives

    monkeypatch.setattr(Inbox, "on_lost", delayed(Inbox.on_lost))
    monkeypatch.setattr(Inbox, "on_frame", delayed(Inbox.on_frame))
    reports, _ = run_rounds(tiny, shared_front(tiny, mode, 2), data_files)
    got, expected = by_source(reports, "site"), by_source(expected_reports, "site")
    assert got.keys() == expected.keys() != set()
    assert all(same_bits(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_devices_with_unlike_cuts_share_the_layers_that_their_routes_cross(
    tiny: ModelSource, data_files: list[Path], mode: str
) -> None:
    """Layers 1 to 3 of device-2 are its own, and a host's for the others: per-layer label counts decide the step."""
    config = run_config(
        tiny.name, f"split.host_mode={mode}", "split.fronts={ device-1 = 1, device-2 = 4 }", "split.back=1",
        "split.backs={ device-3 = 0 }",
    )  # fmt: skip
    reports, _ = run_rounds(tiny, config, data_files)
    kept = {"device-1": (1, 5), "device-2": (4, 5), "device-3": (2, 6)}
    reference = Reference(tiny, config, start_of(tiny, config), kept)
    getattr(reference, mode)(batches_of(tiny, config, data_files, STEPS), STEPS)
    assert_same_as(reports, reference)


def test_unlike_cuts_are_averaged_per_module_by_its_own_sources(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name, "split.fronts={ device-1 = 1, device-2 = 4 }", "split.back=1")
    reports, adapter = run_rounds(tiny, config, data_files[:2])
    ends, (site,) = by_source(reports, "ends"), by_source(reports, "site").values()
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"
    assert (name in ends["device-1"], name in ends["device-2"], name in site) == (False, True, True)
    labels = {
        device: sum(unit.count for step in steps for unit in step)
        for device, steps in batches_of(tiny, config, data_files[:2], STEPS).items()
    }
    expected = (ends["device-2"][name] * labels["device-2"] + site[name] * labels["device-1"]) / sum(labels.values())
    np.testing.assert_allclose(adapter[name], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("rule", "learned", "last"), [(FfaLora(), "B", "B"), (RoLora(), "AB", "A"), (FedProx(mu=20.0), "AB", "AB")]
)
def test_what_an_aggregation_asks_of_nodes_is_done_split_as_unsplit(
    tiny: ModelSource, data_files: list[Path], rule: Aggregation, learned: str, last: str
) -> None:
    """Two rounds: the factors that moved, and those that the second round contributed."""
    split, whole = (run_config(tiny.name, mode) for mode in ("split.host_mode=copies", "split.hosts=0"))
    reports, got = run_rounds(tiny, split, data_files[:2], rounds=2, steps=2, rule=rule)
    assert same_bits(got, run_rounds(tiny, whole, data_files[:2], rounds=2, steps=2, rule=rule)[1])
    start = start_of(tiny, split)
    assert {name[-8] for name in got if not np.array_equal(got[name], start[name])} == set(learned)
    for scope in ("ends", "site"):
        for tensors in by_source(reports, scope).values():
            assert {name[-8] for name in tensors} == set(last)
    if isinstance(rule, FedProx):
        plain = run_rounds(tiny, split, data_files[:2], rounds=2, steps=2)[1]
        near, far = (sum(float(np.sum((a[n] - start[n]) ** 2)) for n in start) for a in (got, plain))
        assert near < far


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_copies_averaged_are_unsplit_federated_lora(tiny: ModelSource, data_files: list[Path], base: str) -> None:
    settings = [f"model.base={base}", "split.front=1"]
    split = run_config(tiny.name, "split.host_mode=copies", "split.hosts=2", *settings)
    whole = run_config(tiny.name, "split.hosts=0", *settings)
    _, got = run_rounds(tiny, split, data_files, rounds=2, steps=3)
    _, expected = run_rounds(tiny, whole, data_files, rounds=2, steps=3)
    assert same_bits(got, expected)
    assert not same_bits(got, start_of(tiny, split))


def test_sites_train_apart_and_are_averaged(tiny: ModelSource, data_files: list[Path]) -> None:
    """device-1 and device-3 at the first site, device-2 at the second: each site is a run of its own."""
    config = run_config(tiny.name, "split.sites=2")
    reports, adapter = run_rounds(tiny, config, data_files)
    sites = by_source(reports, "site")
    assert set(sites) == {"edge-1", "edge-2"}
    batches = batches_of(tiny, config, data_files, STEPS)
    for site, members in (("edge-1", ["device-1", "device-3"]), ("edge-2", ["device-2"])):
        reference = Reference(tiny, config, start_of(tiny, config), dict.fromkeys(members, (2, 4)))
        reference.joint(batches, STEPS)
        assert same_bits(sites[site], reference.site_adapter())
    weights = {c.source: c.weight for r in reports.values() for c in r.contributions if c.scope == "site"}
    for name, array in sites["edge-1"].items():
        mean = (array * weights["edge-1"] + sites["edge-2"][name] * weights["edge-2"]) / sum(weights.values())
        np.testing.assert_allclose(adapter[name], mean, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_devices_that_each_host_a_slice_train_the_same(tiny: ModelSource, data_files: list[Path], mode: str) -> None:
    """No edge server: device-1 hosts layer 2, device-2 layer 3, and both train over their own and each other's."""
    config = run_config(tiny.name, f"split.host_mode={mode}", "split.host_on=any", "split.hosts=2")
    reports, _ = run_rounds(tiny, config, data_files)
    assert [reports[f"device-{n}"].host.first_layer for n in (1, 2)] == [2, 3]
    reference = Reference(
        tiny, config, start_of(tiny, config), dict.fromkeys(["device-1", "device-2", "device-3"], (2, 4))
    )
    getattr(reference, mode)(batches_of(tiny, config, data_files, STEPS), STEPS)
    assert_same_as(reports, reference)


@pytest.fixture(scope="module")
def unsplit(tiny: ModelSource, data_files: list[Path]) -> Callable[[str, int, bool, float], Adapter]:
    """Trains the plain loop in a mode, with so many devices, with or without hosts, below a norm (0: any), once each."""

    @cache
    def trained(mode: str, devices: int, split: bool, most: float) -> Adapter:
        clip = ("optimizer.clip=global", f"optimizer.max_norm={most}") if most else ()
        config = run_config(tiny.name, f"split.hosts={int(split)}", f"split.host_mode={mode}", "split.front=1", *clip)
        batches = batches_of(tiny, config, data_files[:devices], STEPS)
        made = Reference(tiny, config, start_of(tiny, config), dict.fromkeys(batches, (1, 4) if split else (0, 6)))
        getattr(made, mode)(batches, STEPS)
        return {**made.own_adapter("device-1"), **made.site_adapter()}

    return trained


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize(("hosts", "devices"), [(0, 1), (1, 1), (3, 1), (2, 3)])
def test_a_global_norm_is_clipped_over_all_stages(
    tiny: ModelSource,
    data_files: list[Path],
    unsplit: Callable[[str, int, bool, float], Adapter],
    hosts: int,
    devices: int,
    mode: str,
) -> None:
    config = run_config(
        tiny.name, f"split.hosts={hosts}", f"split.host_mode={mode}", "split.front=1", "optimizer.clip=global",
        "optimizer.max_norm=0.05",
    )  # fmt: skip
    reports, _ = run_rounds(tiny, config, data_files[:devices])
    start = start_of(tiny, config)
    ends, sites = by_source(reports, "ends"), by_source(reports, "site")
    got = {**ends["device-1"], **next(iter(sites.values()), {})}
    assert relative_distance(got, unsplit(mode, devices, hosts > 0, 0.05), start) < 1e-5
    assert relative_distance(got, unsplit(mode, devices, hosts > 0, 0.0), start) > 1e-3, "the limit was never reached"


@pytest.fixture(scope="module")
def alone(tiny: ModelSource, data_files: list[Path]) -> Adapter:
    """Trains one device that holds the whole model."""
    return run_rounds(tiny, run_config(tiny.name, "split.hosts=0"), data_files[:1])[1]


@pytest.mark.parametrize(
    "settings",
    [["lora.dropout=0.2"], ["split.checkpointing=true"], ["lora.dropout=0.2", "split.checkpointing=true"]],
    ids=["dropout", "checkpointing", "both"],
)
def test_dropout_and_checkpointing_do_not_depend_on_the_split(
    tiny: ModelSource, data_files: list[Path], alone: Adapter, settings: list[str]
) -> None:
    whole = run_config(tiny.name, "split.hosts=0", *settings)
    split = run_config(tiny.name, "split.hosts=2", *settings)
    _, expected = run_rounds(tiny, whole, data_files[:1])
    _, got = run_rounds(tiny, split, data_files[:1])
    assert same_bits(got, expected)
    assert same_bits(expected, alone) == ("lora.dropout=0.2" not in settings)


def test_the_models_own_dropout_does_not_depend_on_the_split(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny.folder, tmp_path / "drops")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}), encoding="utf-8")
    source, found = find_model(str(folder)), []
    for settings in (["split.hosts=0"], ["split.hosts=2"], ["split.hosts=0", "model.dropout=off"]):
        run = run_config(str(folder), "model.dropout=own", *settings)
        found.append(run_rounds(source, run, data_files[:1], steps=4)[1])
    whole, split, without = found
    assert same_bits(split, whole)
    assert not same_bits(without, whole)


@pytest.mark.parametrize("mode", ["joint", "sequential", "copies"])
def test_a_last_stage_that_sees_the_labels_trains_the_same(
    tiny: ModelSource, data_files: list[Path], mode: str
) -> None:
    """SplitLoRA's route: the head on the last host. The same numbers as with the head, and no LoRA, on the device."""
    settings = ["split.hosts=2", "split.back=0", f"split.host_mode={mode}"]
    last_stage = run_config(tiny.name, "split.labels=last-stage", *settings)
    with_labels, adapter = run_rounds(tiny, last_stage, data_files)
    own, expected = run_rounds(tiny, run_config(tiny.name, *settings), data_files)
    assert same_bits(adapter, expected)
    for name in ("device-1", "device-2", "device-3"):
        assert with_labels[name].eval_loss_sum == own[name].eval_loss_sum
        assert [step.loss_sum for step in with_labels[name].steps] == [step.loss_sum for step in own[name].steps]


def test_a_device_with_fewer_batches_sits_out_the_rest_of_an_epoch(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name, "federation.epochs=1", "federation.batch_size=4")
    own = {"device-1": 2, "device-2": 3}
    adapter = start_of(tiny, config)
    with memory_fleet(tiny, config, data_files[:2]) as fleet:
        assert {name: -(-count // 4) for name, count in fleet.examples.items()} == own
        reports = fleet.run(adapter, 3)
    check_done(reports)
    assert {name: len(reports[name].steps) for name in own} == own
    assert all(step.counted for name in own for step in reports[name].steps)
    batches = batches_of(tiny, config, data_files[:2], 3)
    site = sum(unit.count for name, steps in own.items() for step in batches[name][:steps] for unit in step)
    assert next(c.weight for c in reports["edge-1"].contributions) == site


def test_a_learning_rate_of_its_own_for_each_step(tiny: ModelSource, data_files: list[Path]) -> None:
    settings = ["optimizer.schedule=linear", "federation.rounds=1", f"federation.local_steps={STEPS}"]
    _, got = run_rounds(tiny, run_config(tiny.name, *settings), data_files[:1])
    _, whole = run_rounds(tiny, run_config(tiny.name, "split.hosts=0", *settings), data_files[:1])
    _, constant = run_rounds(tiny, run_config(tiny.name), data_files[:1])
    assert same_bits(got, whole)
    assert relative_distance(got, constant, start_of(tiny, run_config(tiny.name))) > 0.1
