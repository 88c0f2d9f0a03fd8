"""A task of values over a split model: equal to the whole to the bit, and to a plain loop of transformers and peft."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import PREFIX, Adapter, from_bytes, initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.value_ends import ValueEnds, is_of_module, is_of_values
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.split.driver import evaluation_batches
from edgelam_fl.tasks.base import Unit
from edgelam_fl.tasks.data import batch_indices
from edgelam_fl.tasks.kinds import TASKS, device_data, make_task
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wireless.channels.paths import Paths
from tests.fleet import (
    check_done,
    is_of_peft,
    joined,
    memory_fleet,
    plain_adapter,
    plain_base,
    plain_model,
    plain_optimizer,
    same_bits,
)
from tests.support import run_config
from tests.toy_values import KIND, SETTINGS, TOY, write_series

STEPS = 4


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, KIND, TOY)


@pytest.fixture(scope="module")
def series_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("series")
    return [write_series(folder / f"cell-{number}.npz", 10 + 3 * number, seed=number) for number in range(3)]


def values_config(source: ModelSource, *more: str) -> RunConfig:
    return run_config(source.name, *SETTINGS, "data.held_out=0.2", "optimizer.lr=0.01", *more)


def start_of(source: ModelSource, config: RunConfig) -> Adapter:
    """The adapter that a run begins with, but for a last map that gives zeros, behind which nothing would learn in the first step."""
    adapter = initial_adapter(
        source, config.lora.targets, config.lora.rank, config.run.seed, values=RunSpec(config, source).values
    )
    rng = np.random.default_rng(0)
    last = f"{PREFIX}output_module.maps.0.weight"
    assert not adapter[last].any()
    return adapter | {last: rng.normal(0, 0.1, adapter[last].shape).astype(np.float32)}


def trained(
    source: ModelSource, config: RunConfig, files: Sequence[Path], steps: int = STEPS
) -> tuple[Adapter, Mapping[str, pb.JobReport]]:
    with memory_fleet(source, config, files) as fleet:
        reports = fleet.run(start_of(source, config), steps)
    check_done(reports)
    return joined(reports), reports


# ---------------------------------------------------------------- the plain loop


def units_of(source: ModelSource, config: RunConfig, file: Path, steps: int) -> list[list[Unit]]:
    """The micro-batches that device-1 draws."""
    settings = task_settings(config)
    task = make_task(settings, source.folder)
    examples = task.examples(device_data(file, settings).training).examples
    drawn = (
        batch_indices(len(examples), config.step_examples, step, config.run.seed, "device-1") for step in range(steps)
    )
    return [task.units([examples[i] for i in indices], config.step_micro_batches) for indices in drawn]


def plain_values(body: Any, modules: Mapping[str, torch.Tensor], ends: ValueEnds, unit: Unit) -> torch.Tensor:
    """The predictions at the real tokens, by transformers and torch alone."""

    def mapped(states: torch.Tensor, module: str) -> torch.Tensor:
        weights = [name for name in modules if name.startswith(module) and name.endswith("weight")]
        for number, name in enumerate(weights):
            states = functional.gelu(states) if number else states
            states = functional.linear(states, modules[name], modules[name.replace("weight", "bias")])
        return states

    states_BTD = mapped(unit.inputs[..., : ends.features], "input_module.maps")
    states_BTD = states_BTD + modules["input_module.places.0"][unit.inputs[..., -1].long()]
    mask_BT = (torch.arange(unit.shape[1]) < torch.tensor(unit.row_lengths)[:, None]).long()
    normed_BTD = body(inputs_embeds=ends.scale * states_BTD, attention_mask=mask_BT, use_cache=False).last_hidden_state
    return mapped(normed_BTD[mask_BT.bool()], "output_module.maps")


def plain_loop(source: ModelSource, config: RunConfig, file: Path) -> Adapter:
    start, ends = start_of(source, config), RunSpec(config, source).values
    assert isinstance(ends, ValueEnds)
    model = plain_model(source, config, {name: array for name, array in start.items() if not is_of_values(name)})
    modules = {
        name.removeprefix(PREFIX): torch.nn.Parameter(torch.from_numpy(array.copy()))
        for name, array in start.items()
        if is_of_values(name)
    }
    body = model.get_base_model().model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_peft(name))
    learned = [*(p for p in model.parameters() if p.requires_grad), *modules.values()]
    optimizer = plain_optimizer(learned, config)
    for units in units_of(source, config, file, STEPS):
        for unit in units:
            wanted = unit.labels[~unit.labels[..., 0].isnan()]
            error = (plain_values(body, modules, ends, unit) - wanted).square().sum()
            (error / sum(one.count for one in units)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain_adapter(model) | {f"{PREFIX}{name}": p.detach().numpy().copy() for name, p in modules.items()}


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("hosts", [0, 1, 2])
def test_one_device_trains_like_the_plain_loop(tiny: ModelSource, series_files: list[Path], hosts: int) -> None:
    config = values_config(tiny, f"split.hosts={hosts}", "split.front=1")
    found, reports = trained(tiny, config, series_files[:1])
    assert same_bits(found, plain_loop(tiny, config, series_files[0]))
    start = start_of(tiny, config)
    assert all(not np.array_equal(found[name], start[name]) for name in found if is_of_values(name)), (
        "all of it learned"
    )
    assert reports["device-1"].eval_sums.keys() == {"nmse", "samples"}


def test_the_first_layers_of_a_model_are_a_model_of_so_many(
    tiny: ModelSource, series_files: list[Path], tmp_path: Path
) -> None:
    """As a folder that holds no other layer, over one host and unsplit."""
    whole = plain_base(tiny.folder, None, "fp32")
    shallow = copy.deepcopy(whole)
    shallow.model.layers, shallow.config.num_hidden_layers = shallow.model.layers[:3], 3
    shallow.save_pretrained(tmp_path)
    shutil.copyfile(tiny.folder / "tokenizer.json", tmp_path / "tokenizer.json")
    found = []
    for source, more in (
        (find_model(str(tmp_path)), ["split.hosts=0"]),
        (tiny.first(3), ["model.layers=3"]),
    ):
        config = values_config(source, "split.front=1", "split.back=1", *more)
        found.append(trained(source, config, series_files[:1], 2)[0])
    assert same_bits(*found)


@pytest.mark.parametrize(
    ("mode", "other"), [("joint", "split.hosts=2"), ("sequential", "split.hosts=2"), ("joint", "split.host_on=any")]
)
def test_how_many_and_which_hosts_there_are_changes_no_bit(
    tiny: ModelSource, series_files: list[Path], mode: str, other: str
) -> None:
    settings = ["split.hosts=1", "split.front=0", "split.back=1", f"split.host_mode={mode}"]
    each = [trained(tiny, values_config(tiny, *settings, *more), series_files) for more in ([], [other])]
    (one, first), (two, second) = each
    assert same_bits(one, two)
    for device in ("device-1", "device-2", "device-3"):
        assert [step.loss_sum for step in first[device].steps] == [step.loss_sum for step in second[device].steps]
        assert first[device].eval_sums == second[device].eval_sums


def test_three_devices_with_copies_train_as_each_does_alone(tiny: ModelSource, series_files: list[Path]) -> None:
    def by_device(config: RunConfig) -> dict[str, Adapter]:
        found: dict[str, Adapter] = {f"device-{number}": {} for number in (1, 2, 3)}
        for report in trained(tiny, config, series_files, 2)[1].values():
            for one in report.contributions:
                found[one.source] |= from_bytes(one.adapter)
        return found

    alone = by_device(values_config(tiny, "split.hosts=0"))
    split = by_device(values_config(tiny, "split.host_mode=copies", "split.back=0"))
    assert all(same_bits(split[name], alone[name]) for name in alone)


@pytest.mark.parametrize(
    ("back", "more", "item_bytes"),
    [(0, [], 4), (1, [], 4), (1, ["model.base=bf16"], 2)],
    ids=["no back", "back", "bf16"],
)
def test_hidden_states_travel_and_no_values(
    tiny: ModelSource, series_files: list[Path], back: int, more: list[str], item_bytes: int
) -> None:
    config = values_config(tiny, "split.front=0", f"split.back={back}", *more)
    _, reports = trained(tiny, config, series_files[:1])
    check_payloads(tiny, config, series_files[0], reports, item_bytes)


def test_channel_prediction_splits_to_the_bit_and_its_bytes_follow_from_its_micro_batches(
    tiny: ModelSource, tmp_path: Path
) -> None:
    links = Paths(9, seed=3).draw()
    np.savez(tmp_path / "links.npz", up=links.up_NTFM, speed_kmh=links.speed_kmh)
    settings = ["task.kind=channel-prediction", "radio.series=8", "data.held_out=0.2", "split.back=0"]
    found = []
    for hosts in (0, 1):
        config = run_config(tiny.name, *settings, "split.front=0", f"split.hosts={hosts}")
        adapter, reports = trained(tiny, config, [tmp_path / "links.npz"], 2)
        found.append((adapter, reports["device-1"].eval_sums, [step.loss_sum for step in reports["device-1"].steps]))
    check_payloads(tiny, config, tmp_path / "links.npz", reports, 4, steps=2)
    (whole, *measured), (split, *measured_split) = found
    assert same_bits(whole, split)
    assert measured == measured_split


def check_payloads(
    source: ModelSource,
    config: RunConfig,
    file: Path,
    reports: Mapping[str, pb.JobReport],
    item_bytes: int,
    steps: int = STEPS,
) -> None:
    """Compares all payloads of one device over one host with the states of its micro-batches, to the byte, at both ends of the links.

    There: rows x tokens of each micro-batch, padding too. Back: as many, or the real tokens' alone if there are no layers at the back. In
    training the gradients of both, the other way.
    """
    learned = [unit for units in units_of(source, config, file, steps) for unit in units]
    measured = measured_units(source, config, file)

    def of(units: Sequence[Unit], positions: Callable[[Unit], int]) -> tuple[int, int]:
        return item_bytes * source.hidden_size * sum(map(positions, units)), len(units)

    def padded(unit: Unit) -> int:
        return unit.shape[0] * unit.shape[1]

    def needed(unit: Unit) -> int:
        return padded(unit) if config.split.back else sum(unit.row_lengths)

    wanted = {
        ("entry edge-1", "sent", "ACT"): of([*learned, *measured], padded),
        ("exit edge-1", "received", "ACT"): of([*learned, *measured], needed),
        ("exit edge-1", "sent", "GRAD"): of(learned, needed),
        ("entry edge-1", "received", "GRAD"): of(learned, padded),
    }
    device, host = reports["device-1"].bytes, reports["edge-1"].host.bytes
    at_device, at_host = (
        {(one.link, one.direction, one.kind): (one.payload_bytes, one.messages) for one in some if one.payload_bytes}
        for some in (device, host)
    )
    assert at_device == wanted, "nothing else has a payload: no labels, no masks"
    others = {"sent": "received", "received": "sent"}
    assert sorted((others[way], kind, found) for (_, way, kind), found in at_host.items()) == sorted(
        (way, kind, found) for (_, way, kind), found in wanted.items()
    )


def measured_units(source: ModelSource, config: RunConfig, file: Path) -> list[Unit]:
    """The micro-batches of the held-out samples."""
    settings = task_settings(config)
    task = make_task(settings, source.folder)
    examples = task.examples(device_data(file, settings).held_out).examples
    rows = -(-config.federation.batch_size // config.pieces.micro_batches)
    batches = evaluation_batches(examples, 2 * rows * config.task.max_tokens, config.pieces.window)
    return [unit for batch in batches for unit in task.units(batch, 1)]


def test_values_may_meet_a_base_in_bf16(tiny: ModelSource, series_files: list[Path]) -> None:
    found = [
        trained(tiny, values_config(tiny, "model.base=bf16", f"split.hosts={hosts}"), series_files[:1], 2)[0]
        for hosts in (0, 1)
    ]
    assert same_bits(*found)
    assert all(array.dtype == np.float32 for array in found[0].values())


@pytest.mark.parametrize("kept", [["input"], ["input", "output"]])
def test_a_private_module_learns_and_never_leaves(tiny: ModelSource, series_files: list[Path], kept: list[str]) -> None:
    """To the bit as if it were shared, as long as one device has it; the server gets all but it."""
    shared = values_config(tiny, "split.front=0")
    config = values_config(tiny, "split.front=0", f"task.private_modules={kept}")
    first = dict(start_of(tiny, config))
    drawn = initial_adapter(
        tiny, config.lora.targets, config.lora.rank, config.run.seed, values=RunSpec(config, tiny).values
    )
    first |= {name: drawn[name] for name in drawn if is_of_values(name)}  # what a device draws for itself
    known = {name: array for name, array in first.items() if not is_of_module(name, kept)}
    found = []
    for one, start in ((shared, first), (config, known)):
        with memory_fleet(tiny, one, series_files[:1]) as fleet:
            reports = fleet.run(start, 2)
            check_done(reports)
            more = fleet.run(start | joined(reports), 2, step_offset=2)
            check_done(more)
            found.append(joined(more))
    whole, sent = found
    assert not any(is_of_module(name, kept) for name in sent)
    assert same_bits(sent, {name: whole[name] for name in sent})
    assert {name for name in whole if name not in sent} == {name for name in whole if is_of_module(name, kept)}
