"""Beamforming as a task of a run: its examples and losses, cells that are drawn, and what its run file refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.model.value_ends import OwnNetwork
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.resolved import resolve
from edgelam_fl.tasks.base import Task
from edgelam_fl.tasks.kinds import device_data, make_task
from edgelam_fl.tasks.points import points_of
from edgelam_fl.wireless.beamforming.downlink import downlink_at, noise_at, sum_rates
from edgelam_fl.wireless.beamforming.precoders import rzf
from edgelam_fl.wireless.beamforming.values import BeamModel, beams_of, channels_of
from edgelam_fl.wireless.channels.sectors import Sector
from server.checks import check_config
from tests.support import run_config

OF_BEAMS = ("beamformer", "task.kind=beamforming", "split.hosts=0")


def task(*overrides: str) -> Task:
    return make_task(task_settings(run_config(*OF_BEAMS, "radio.beam_snrs_db=[0.0, 10.0]", *overrides)), Path())


def cell_file(folder: Path, channels: np.ndarray) -> Path:
    np.savez(folder / "cell.npz", channels=channels)
    return folder / "cell.npz"


def test_a_sample_is_an_example_at_each_snr_and_its_labels_say_what_beams_are_worth(tmp_path: Path) -> None:
    config, channels = run_config(*OF_BEAMS), Sector(4, 3).draw(5, seed=1)
    samples = device_data(cell_file(tmp_path, channels), task_settings(config)).training
    made = task().examples(samples).examples
    assert len(made) == 2 * len(samples)
    (unit,) = task().units(made, 1)
    found, noise, error = channels_of(unit.labels)
    assert not error.any()
    numbers = [sample.number for sample in samples for _ in range(2)]
    assert np.array_equal(found.numpy(), channels[numbers])
    assert noise.tolist() == pytest.approx([noise_at(0), noise_at(10)] * len(samples))
    beams = BeamModel()(unit.inputs)  # untrained: RZF
    loss, sums = task().loss(beams, unit.labels)
    rates = [
        sum_rates(found[at::2], rzf(found[at::2], downlink_at(snr)), noise_at(snr)) for at, snr in ((0, 0), (1, 10))
    ]
    points = {(point.who, point.at): point.value for point in points_of(sums)}
    assert [points["", 0], points["", 10]] == pytest.approx([float(rate.mean()) for rate in rates], rel=1e-5)
    assert {who for who, _ in points} == {"", "MRT", "ZF", "RZF", "WMMSE"}
    alone = torch.log2(1 + found.abs().square().sum(2) / noise[:, None]).sum()
    assert float(loss.detach()) == pytest.approx(float(alone - sum(rate.sum() for rate in rates)), rel=1e-5)
    assert task().loss(beams, unit.labels, training=True)[1] == {}
    assert beams_of(beams).abs().square().sum((1, 2)).tolist() == pytest.approx([1.0] * len(made), rel=1e-5)


def test_pilots_are_all_that_is_seen_and_true_channels_judge_the_beams(tmp_path: Path) -> None:
    channels = Sector(4, 3).draw(40, seed=1)
    samples = device_data(cell_file(tmp_path, channels), task_settings(run_config(*OF_BEAMS))).training
    own = task("radio.pilot_snrs_db=[0.0, 60.0]")
    made = own.examples(samples).examples
    assert len(made) == 2 * 2 * len(samples)
    assert own.seen(made[0])[0][0].startswith(
        "3 users x 4 antennas, pilots at 0 dB, pilots at 60 dB, at each of 2 SNRs"
    )
    (unit,) = own.units(made, 1)
    seen, noise, error = channels_of(unit.inputs)
    known, estimates = unit.labels.chunk(2, dim=2)
    true, noise_of_labels, none = channels_of(known)
    assert torch.equal(estimates, unit.inputs), "what other methods start from"
    assert np.array_equal(true.numpy(), channels[[sample.number for sample in samples for _ in range(4)]])
    assert torch.equal(noise, noise_of_labels)
    assert not none.any()
    loud, quiet = (torch.isclose(error, torch.tensor(noise_at(snr_db) / 3)) for snr_db in (0, 60))
    assert int(loud.sum()) == int(quiet.sum()) == 2 * len(samples)
    for chosen in (loud, quiet):
        missed = (seen[chosen] - true[chosen]).abs().square().mean()
        assert float(missed / error[chosen].mean()) == pytest.approx(1.0, abs=0.1), "noise / pilot symbols"
    _, sums = own.loss(BeamModel()(unit.inputs), unit.labels)
    points = {(point.who, point.at): point.value for point in points_of(sums)}
    at = (noise == noise.max()).nonzero().flatten()  # 0 dB
    rates = sum_rates(true[at], rzf(seen[at], downlink_at(0)), noise_at(0))
    assert points["LS, then RZF", 0] == pytest.approx(float(rates.mean()), rel=1e-5)
    beams = beams_of(BeamModel()(unit.inputs[at])).detach()
    assert points["", 0] == pytest.approx(float(sum_rates(true[at], beams, noise_at(0)).mean()), rel=1e-5)
    assert {who for who, _ in points} == {
        "", "LS, then RZF", "MMSE, then RZF", "RZF, channels known", "WMMSE, channels known",
    }  # fmt: skip
    assert points["WMMSE, channels known", 0] > points["RZF, channels known", 0] > points["MMSE, then RZF", 0]


def test_noise_of_pilots_follows_from_the_content_and_the_seed(tmp_path: Path) -> None:
    file = cell_file(tmp_path, Sector(4, 3).draw(5, seed=1))
    samples = device_data(file, task_settings(run_config(*OF_BEAMS))).training
    made = task("radio.pilot_snrs_db=[5.0]").examples(samples).examples
    turned = task("radio.pilot_snrs_db=[5.0]").examples(samples[::-1]).examples
    other = task("radio.pilot_snrs_db=[5.0]", "run.seed=2").examples(samples).examples
    assert all(np.array_equal(one.inputs, again.inputs) for one, again in zip(made[:2], turned[-2:], strict=True))
    assert not np.array_equal(made[0].inputs[:, :8], made[1].inputs[:, :8]), "heard once per SNR of the beams"
    assert not np.array_equal(made[0].inputs, other[0].inputs)


def test_more_users_than_antennas_are_measured_without_zero_forcing(tmp_path: Path) -> None:
    samples = device_data(
        cell_file(tmp_path, Sector(2, 3).draw(2, seed=1)), task_settings(run_config(*OF_BEAMS))
    ).training
    (unit,) = task().units(task().examples(samples).examples, 1)
    _, sums = task().loss(BeamModel()(unit.inputs), unit.labels)
    assert {point.who for point in points_of(sums)} == {"", "MRT", "RZF", "WMMSE"}


def test_channels_with_other_axes_are_refused_with_those_that_are_meant(tmp_path: Path) -> None:
    file = cell_file(tmp_path, Sector(4, 3).draw(5, seed=1)[0])
    with pytest.raises(DataError, match=r"channels.*samples.*users.*antennas"):
        device_data(file, task_settings(run_config(*OF_BEAMS)))


# ---------------------------------------------------------------- cells


def test_a_cell_is_the_same_for_the_same_seed_and_its_users_have_its_power_and_directions() -> None:
    cell = Sector(antennas=16, users=2, sector_deg=30, spread_deg=0, shadow_db=0)
    channels = cell.draw(400, seed=3)
    assert np.array_equal(channels, cell.draw(400, seed=3))
    assert not np.array_equal(channels, cell.draw(400, seed=4))
    assert np.mean(np.abs(channels) ** 2) == pytest.approx(1.0, abs=0.1)
    phases = np.angle(
        channels[..., 1:] / channels[..., :-1]
    )  # without spread, all waves of a user leave in one direction
    assert np.abs(phases).max() <= np.pi * np.sin(np.deg2rad(30)) + 1e-4
    assert np.ptp(phases, axis=2).max() < 1e-3


@pytest.mark.parametrize("wrong", [{"users": 0}, {"sector_deg": 91.0}, {"spread_deg": -1.0}, {"shadow_db": np.nan}])
def test_a_cell_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"users|must be"):
        Sector(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the run file


def test_a_plan_counts_as_many_parameters_as_the_network_has() -> None:
    spec = check_config(run_config("beamformer", "task.kind=beamforming", "split.hosts=0"))
    assert isinstance(spec.values, OwnNetwork)
    assert spec.value_weights == sum(tensor.numel() for tensor in spec.values.make().parameters())
    words = list(resolve(spec).in_words())
    assert words[0] == "beamformer: a network of 50,056 parameters, whole on each device"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["split.hosts=1"], "split.hosts = 1 cannot be combined with task.kind = 'beamforming'"),
        (["split.hosts=0", "task.max_tokens=128"], "of [task], task.kind"),
        (["split.hosts=0", "lora.rank=4"], "lora.rank = 4 has no effect with task.kind = 'beamforming'"),
        (["split.hosts=0", "wire.activation_codec=fp16"], "wire.activation_codec = \"fp16\" has no effect"),
        (["split.hosts=0", "split.front=1"], "of [split], split.hosts, split.micro_batches"),
        (["split.hosts=0", "radio.history_slots=4"], "which does not use it. Allowed: leave it out, or task.kind = 'channel-prediction'"),
        (["split.hosts=0", "strategy.aggregation=ffa"], "strategy.aggregation = 'ffa' is about the factors of LoRA"),
        (["split.hosts=0", "model.name=smollm2-135m"], "Allowed: model.name = 'beamformer'"),
        (["split.hosts=0", "task.kind=causal-lm"], "Allowed: task.kind = 'beamforming', or another model.name"),
        (["split.hosts=0", "radio.beam_snrs_db=[0.0, 0.0]"], "must be SNRs of -30 to 60 dB, each once"),
        (["split.hosts=0", "radio.pilot_snrs_db=[61.0]"], "radio.pilot_snrs_db = [61.0] must be SNRs of -30 to 60 dB, each once"),
        (["split.hosts=0", "radio.pilot_snrs_db=[nan]"], "radio.pilot_snrs_db = nan must be a finite number"),
        (
            ["split.hosts=0", "model.name=smollm2-135m", "task.kind=channel-prediction", "radio.pilot_snrs_db=[5.0]"],
            "radio.pilot_snrs_db = [5.0] has no effect with task.kind = 'channel-prediction', which does not use it. Allowed: leave it out, or task.kind = 'beamforming'",
        ),
    ],
)  # fmt: skip
def test_what_a_network_does_not_have_is_refused_by_name(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(run_config("beamformer", "task.kind=beamforming", *overrides))
    assert says in str(refused.value)
