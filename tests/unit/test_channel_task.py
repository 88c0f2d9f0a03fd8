"""Channel prediction as a task: what is made of a base station's links, and what a prediction's loss is."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from edgelam_fl.config import parse_run_file
from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.federation import demo_channel
from edgelam_fl.federation.demos import DEMOS
from edgelam_fl.model.value_ends import ValueEnds
from edgelam_fl.plan.making import task_settings
from edgelam_fl.tasks.arrays import Sample
from edgelam_fl.tasks.base import ValueExample
from edgelam_fl.tasks.channel_prediction import ChannelPrediction
from edgelam_fl.tasks.kinds import device_data, values_of
from edgelam_fl.tasks.points import MODEL, points_of
from edgelam_fl.wireless.channels.paths import Paths
from server.checks import check_config
from tests.support import run_config

KIND = "channel-prediction"
WHO = (MODEL, "last value", "AR(8)", "mean of subspace ARs", "last value of each series")


def task(*overrides: str) -> ChannelPrediction:
    config = run_config("tiny", f"task.kind={KIND}", "radio.series=12", *overrides)
    return ChannelPrediction(Path(), task_settings(config))


@cache
def samples() -> list[Sample]:
    links = Paths(6, seed=3).draw()
    each = zip(links.up_NTFM, links.down_NTFM, links.speed_kmh, strict=True)
    return [
        Sample(number, {"up": up, "down": down, "speed_kmh": np.asarray(speed)}, f"content {number}")
        for number, (up, down, speed) in enumerate(each)
    ]


def examples(*overrides: str) -> list[ValueExample]:
    return task(*overrides).examples(samples()).examples


@pytest.mark.parametrize("base", ["autoregressions", "last"])
def test_examples_have_the_sizes_that_the_model_is_made_for(base: str) -> None:
    values = values_of(KIND)
    assert values is not None
    config = run_config("tiny", f"task.kind={KIND}", "radio.series=12", "radio.history_slots=12", f"radio.base={base}")
    ends = values.ends(config.radio)
    assert isinstance(ends, ValueEnds)
    made = examples("radio.history_slots=12", f"radio.base={base}")
    assert {one.inputs.shape for one in made} == {(12, ends.features + len(ends.places))}
    for table, rows in enumerate(ends.places, ends.features):
        column = np.concatenate([one.inputs[:, table] for one in made])
        assert np.array_equal(column, column.astype(int))
        assert 0 <= column.min() <= column.max() < rows


@pytest.mark.parametrize("duplex", ["tdd", "fdd"])
def test_without_a_correction_a_model_has_the_error_of_what_it_corrects(duplex: str) -> None:
    made, own = examples(f"radio.duplex={duplex}"), task(f"radio.duplex={duplex}")
    (unit,) = own.units(made, 1)
    rows = own.loss_rows(unit.labels)
    assert rows is not None
    loss, sums = own.loss(torch.zeros(len(rows), 8), unit.labels, rows)
    found = points_of(sums)
    assert unit.count == len(made) == sum(point.values for point in found if point.who == MODEL)
    of_model = {point.at: point.value for point in found if point.who == MODEL}
    corrected = "mean of carried ARs" if duplex == "fdd" else "mean of subspace ARs"
    assert of_model == pytest.approx({point.at: point.value for point in found if point.who == corrected}, rel=1e-4)
    assert float(loss) == pytest.approx(sum(point.values * (point.value or 0) for point in found if point.who == MODEL))
    of_last = {point.at: point.value for point in found if point.who == "last value"}
    if duplex == "fdd":
        assert all((of_model[at] or 0) < 1 < (of_last[at] or 0) for at in of_last)
    assert {point.who for point in found} == {MODEL, "last value", "AR(8)", corrected}


def test_from_the_last_value_a_model_sees_the_series_alone_and_has_more_to_gain() -> None:
    of_last, of_mean = examples("radio.base=last"), examples()
    for one, other in zip(of_last, of_mean, strict=True):
        assert np.array_equal(one.inputs[:, :33], other.inputs[:, :33])
        assert np.array_equal(one.inputs[:, 33:], other.inputs[:, -2:]), "the places alone"
    own = task("radio.base=last")
    (unit,) = own.units(of_last, 1)
    rows = own.loss_rows(unit.labels)
    assert rows is not None
    wanted = unit.labels.flatten(0, 1)[rows][:, :8]
    sums = own.loss(0 * wanted, unit.labels, rows)[1]
    found = {who: sum(p.values * (p.value or 0) for p in points_of(sums) if p.who == who) for who in WHO}
    assert set(found) == {point.who for point in points_of(sums)}
    assert found[MODEL] == pytest.approx(found["last value of each series"], rel=1e-4)
    assert found["mean of subspace ARs"] < 0.7 * found[MODEL], "the best method stays beside it"
    assert float(own.loss(wanted, unit.labels, rows)[0]) < 0.7 * found[MODEL]
    mean = task()
    (unit,) = mean.units(of_mean, 1)
    uncorrected, _ = mean.loss(0 * wanted, unit.labels, rows)
    assert found["mean of subspace ARs"] == pytest.approx(float(uncorrected), rel=1e-4)


def test_over_time_a_perfect_correction_is_the_true_channel_and_none_the_last_value() -> None:
    own, sample = task("radio.base=last", "radio.snr_db=40"), samples()[0]
    (example,) = own.examples([sample]).examples
    heard, true, before, after = own.over_time(sample, example.labels[:, :8])
    assert [len(part) for part in (heard, true, before, after)] == [16, 20, 4, 4]
    assert np.allclose(after, true[16:], atol=1e-4)
    assert np.allclose(before, heard[-1])
    assert np.abs(heard - true[:16]).max() < 0.1, "little noise"


def test_the_last_value_of_the_band_that_is_heard_is_no_base_of_the_other_one() -> None:
    with pytest.raises(ConfigError, match=r"radio\.base = 'last' cannot be combined with radio\.duplex = 'fdd'"):
        check_config(run_config("tiny", f"task.kind={KIND}", "radio.base=last", "radio.duplex=fdd"))


def test_a_loss_adds_up_over_rows_and_is_least_for_what_is_wanted() -> None:
    own, made = task(), examples()
    (unit,) = own.units([*made[:2], *task("radio.series=5").examples(samples()[2:4]).examples], 1)  # unequal lengths
    rows = own.loss_rows(unit.labels)
    assert rows is not None
    assert len(rows) == 12 + 12 + 5 + 5
    wanted = unit.labels.flatten(0, 1)[rows][:, :8]
    best, none = (float(own.loss(output, unit.labels, rows)[0]) for output in (wanted, 0 * wanted))
    assert best < none
    parts = [own.loss(0 * wanted[some], unit.labels, rows[some])[0] for some in (slice(20), slice(20, None))]
    assert float(sum(parts)) == pytest.approx(none, rel=1e-5)
    assert own.loss(0 * wanted, unit.labels, rows, training=True)[1] == {}


def test_noise_follows_from_the_content_and_the_seed_and_is_on_what_is_seen_alone() -> None:
    first, turned = examples(), task().examples(samples()[::-1]).examples[::-1]
    other = examples("run.seed=2")
    for one, again, unlike in zip(first, turned, other, strict=True):
        assert np.array_equal(one.inputs, again.inputs)
        assert not np.array_equal(one.inputs[:, :32], unlike.inputs[:, :32])
    quiet, loud = (examples(f"radio.snr_db={snr_db}")[0].labels[0] for snr_db in (60.0, 0.0))
    assert quiet[-1] < loud[-1]  # the error of what is corrected


@pytest.mark.parametrize(
    ("arrays", "overrides", "words"),
    [
        ({}, ["radio.future_slots=5"], "has 20 slots; radio.history_slots \\+ radio.future_slots = 21 are needed"),
        ({"down": None}, ["radio.duplex=fdd"], "'fdd' predicts the array 'down', which the data lacks"),
        ({"up": np.ones((20, 49, 32), np.complex64), "down": None}, [], "has 49 subcarriers; at most 48 are allowed"),
    ],
)
def test_links_that_do_not_fit_are_refused_by_their_place(
    arrays: dict[str, np.ndarray | None], overrides: list[str], words: str
) -> None:
    given = {name: array for name, array in {**samples()[0].arrays, **arrays}.items() if array is not None}
    with pytest.raises(DataError, match=f"sample 7.*{words}"):
        task(*overrides).examples([Sample(7, given, "one")])


def test_one_band_alone_is_enough_within_the_band() -> None:
    arrays = {name: array for name, array in samples()[0].arrays.items() if name != "down"}
    (example,) = task().examples([Sample(0, arrays, "one")]).examples
    assert np.isfinite(example.inputs).all()


def test_the_demo_draws_links_that_its_run_file_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_channel, "LINKS", 8)
    demo = DEMOS["channel"]
    config = parse_run_file(demo.run_file, source="test", overrides=[])
    check_config(config)
    files, _ = demo.write_data(tmp_path / "data", 2)
    read = [device_data(file, task_settings(config)) for file in files]
    assert [(len(one.training), len(one.held_out)) for one in read] == [(6, 2)] * 2
    own = ChannelPrediction(Path(), task_settings(config))
    inputs = [own.examples(one.held_out).examples[0].inputs for one in read]
    assert not np.array_equal(*(each[:, :32] for each in inputs)), "each station has links of its own"
