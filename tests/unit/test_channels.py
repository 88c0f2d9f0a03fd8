"""Radio channels: how alike they are to themselves, that a seed gives them again, and which files are channels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgelam_fl.errors import ConfigError, DataError, EnvironmentProblem
from edgelam_fl.wireless.channels.correlation import clarke, over_frequency, over_time, strongest_directions
from edgelam_fl.wireless.channels.links import (
    PORTS,
    SLOTS,
    SPEEDS_KMH,
    SUBCARRIERS,
    Links,
    doppler_hz,
    station_seed,
    with_noise,
)
from edgelam_fl.wireless.channels.paths import Paths
from edgelam_fl.wireless.channels.store import Scene, kept, read_links
from edgelam_fl.wireless.channels.uma import UrbanMacro


@cache
def ours() -> Links:
    return Paths(160, seed=1).draw()


@cache
def urban_macro() -> Links:
    return UrbanMacro(100, seed=2).draw()


GENERATORS = [ours, urban_macro]

# ---------------------------------------------------------------- correlations


def test_bessel_function_and_doppler_shift() -> None:
    assert clarke(0.0, 1) == pytest.approx(1.0)
    speed_kmh = 30.0
    lag_of_zero = 2.404826 / (2 * np.pi * doppler_hz(speed_kmh) * 0.5e-3)
    assert clarke(speed_kmh * lag_of_zero, 1) == pytest.approx(0.0, abs=1e-6)  # J0's first zero
    assert doppler_hz(100.0) == pytest.approx(222.4, abs=0.1)


@pytest.mark.parametrize("speed_kmh", SPEEDS_KMH)
@pytest.mark.parametrize("links", GENERATORS)
def test_correlation_over_time_follows_clarkes_model(links: Callable[[], Links], speed_kmh: float) -> None:
    """In the mean over all headings; a few dozen links are off by up to 0.2 once they have turned far."""
    drawn = links()
    channels = drawn.up_NTFM[drawn.speed_kmh == speed_kmh]
    assert len(channels) > 15
    off = {lag: abs(over_time(channels, lag) - clarke(speed_kmh, lag)) for lag in (1, 2, 4, 8, 16)}
    assert off[1] < 0.05
    assert max(off.values()) < 0.2


@pytest.mark.parametrize("links", GENERATORS)
def test_correlation_over_frequency_and_directions(links: Callable[[], Links]) -> None:
    """Of the urban macro cell: .92, .71, .56, .51 at these distances; .74, .91, .99, 1.00 of the energy in these directions."""
    channels = links().up_NTFM
    alike = [over_frequency(channels, lag) for lag in (1, 4, 12, 24)]
    share = [strongest_directions(channels, count) for count in (1, 2, 4, 8)]
    within = 0.04 if links is urban_macro else 0.12
    assert alike == pytest.approx([0.92, 0.71, 0.56, 0.51], abs=within)
    assert share == pytest.approx([0.74, 0.91, 0.99, 1.00], abs=within)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("links", GENERATORS)
def test_links_have_power_1_over_both_bands(links: Callable[[], Links]) -> None:
    drawn = links()
    assert drawn.up_NTFM.shape == drawn.down_NTFM.shape == (len(drawn.speed_kmh), SLOTS, SUBCARRIERS, PORTS)
    power = [np.mean(np.abs(band) ** 2, axis=(1, 2, 3)) for band in (drawn.up_NTFM, drawn.down_NTFM)]
    assert np.mean(power, axis=0) == pytest.approx(np.ones(len(drawn.speed_kmh)), abs=1e-4)


@pytest.mark.parametrize("scene", [Paths(3, seed=5), UrbanMacro(3, seed=5)])
def test_a_seed_gives_the_same_links_and_another_one_others(scene: Any) -> None:
    first = scene.draw().up_NTFM
    assert np.array_equal(first, scene.draw().up_NTFM)
    assert not np.allclose(first, replace(scene, seed=6).draw().up_NTFM)


def test_the_package_leaves_torchs_random_numbers_alone() -> None:
    import torch

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    UrbanMacro(1, seed=1).draw()
    assert torch.equal(torch.rand(2), expected)


def test_each_station_has_seeds_of_its_own() -> None:
    seeds = {station_seed(seed, name) for seed in (1, 2) for name in ("station-1", "station-2")}
    assert len(seeds) == 4
    assert station_seed(1, "station-1") == station_seed(1, "station-1")


def test_a_larger_delay_spread_makes_subcarriers_less_alike() -> None:
    near, far = (Paths(20, 1, delay_spread_ns=spread).draw().up_NTFM for spread in (50.0, 1000.0))
    assert over_frequency(near, 4) > over_frequency(far, 4) + 0.2


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_has_the_power_that_was_asked_for(snr_db: float) -> None:
    clean = ours().up_NTFM[:8]
    noise = with_noise(clean, snr_db, seed=1) - clean
    assert np.mean(np.abs(noise) ** 2) == pytest.approx(10 ** (-snr_db / 10), rel=0.02)
    assert np.array_equal(with_noise(clean, float("inf"), seed=1), clean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "0 links cannot be drawn"),
        ({"speeds_kmh": ()}, "at least one speed"),
        ({"speeds_kmh": (10.0, -1.0)}, "from 0 on"),
        ({"speeds_kmh": (float("nan"),)}, "from 0 on"),
        ({"delay_spread_ns": 0.0}, "delay_spread_ns = 0: above 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Paths(**{"count": 1, "seed": 1, **settings})


def test_without_the_package_the_message_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sionna.phy", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'edgelam-fl\[radio\]'"):
        UrbanMacro(1, seed=1).draw()


# ---------------------------------------------------------------- files


class Counting:
    """A scene that counts how often it was drawn."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.draws = scene, 0

    def __repr__(self) -> str:
        return repr(self.scene)

    def draw(self) -> Links:
        self.draws += 1
        return self.scene.draw()


def test_links_are_drawn_once_and_kept_in_half_precision(tmp_path: Path) -> None:
    scene = Counting(Paths(2, seed=1))
    first, second = kept(scene, tmp_path), kept(scene, tmp_path)
    assert scene.draws == 1
    assert np.array_equal(first.up_NTFM, second.up_NTFM)
    drawn = scene.scene.draw()
    assert np.array_equal(first.speed_kmh, drawn.speed_kmh)
    error = np.mean(np.abs(first.down_NTFM - drawn.down_NTFM) ** 2)
    assert 10 * np.log10(error) < -65
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 2 * 2 * SLOTS * SUBCARRIERS * PORTS * 4 + 1000
    kept(Paths(2, seed=2), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def arrays(**other: np.ndarray) -> dict[str, np.ndarray]:
    links = ours()
    return {"up": links.up_NTFM[:3], "down": links.down_NTFM[:3], "speed_kmh": links.speed_kmh[:3], **other}


def test_a_file_of_ones_own_is_read_and_scaled(tmp_path: Path) -> None:
    own = arrays(up=7 * ours().up_NTFM[:3], down=7 * ours().down_NTFM[:3])
    np.savez(tmp_path / "own.npz", **own)  # type: ignore[arg-type]
    save_file(own, tmp_path / "own.safetensors")
    for name in ("own.npz", "own.safetensors"):
        links = read_links(tmp_path / name)
        assert np.allclose(links.up_NTFM, ours().up_NTFM[:3], atol=1e-5)
        assert np.allclose(links.down_NTFM, ours().down_NTFM[:3], atol=1e-5)


UP = np.ones((3, SLOTS, 4, 2), np.complex64)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"up": UP.transpose(0, 2, 1, 3)}, r"'down' is .* with 4 slots in another array"),
        ({"up": UP[:, 1:], "down": UP[:, 1:]}, r"has 19 slots, .* \[links, 20 slots, subcarriers, antenna ports\]"),
        ({"up": UP.real}, r"'up' is float32 .* complex \(or real, with real and imaginary part as a last axis of 2\)"),
        ({"up": UP[0]}, r"'up' \[links, slots, subcarriers, antenna ports\]"),
        ({"up": UP[:0]}, "with no links"),
        ({"up": UP, "down": UP[:2]}, "with 3 links in another array"),
        ({"up": UP, "down": UP, "speed_kmh": np.ones(2)}, r"'speed_kmh' is \[2\], with 3 links in another array"),
        (
            {"up": UP * np.array([1, 0, 1])[:, None, None, None], "down": UP},
            "link 1: 'up' has no power: all its numbers are 0",
        ),
        ({"up": UP, "down": UP * np.nan}, "link 0: 'down' holds a number that is not finite"),
    ],
)
def test_wrong_axes_and_values_are_named(tmp_path: Path, other: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "own.npz", **arrays(**other))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        read_links(tmp_path / "own.npz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "half.npz", up=UP)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "csi.mat").write_bytes(b"no")
    faults = {"half.npz": "no array 'down'", "broken.npz": "cannot be read", "broken.safetensors": "cannot be read"}
    for name, message in {**faults, "csi.mat": "is no file of arrays", "none.npz": "no data file at"}.items():
        with pytest.raises(DataError, match=message):
            read_links(tmp_path / name)
