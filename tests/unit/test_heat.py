"""What a machine tells of its heat: temperatures of the kernel, and why the processor is slowed down."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelam_fl.doctor.checks import check_heat
from edgelam_fl.machine import Heat, heat


def shown(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True)
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n", encoding="ascii")


def test_the_hottest_part_of_the_processor_counts(tmp_path: Path) -> None:
    thermal = tmp_path / "class" / "thermal"
    shown(thermal / "thermal_zone0", type="acpitz", temp="90000")
    shown(thermal / "thermal_zone1", type="cpu-thermal", temp="61500")
    shown(thermal / "thermal_zone2", type="soc-thermal", temp="58000")
    shown(thermal / "thermal_zone3", type="cpu-broken", temp="-274000")
    shown(thermal / "thermal_zone4", type="cpu-asleep")
    assert heat(tmp_path) == Heat(61.5, "")


def test_a_machine_that_names_no_processor_tells_its_hottest_zone(tmp_path: Path) -> None:
    shown(tmp_path / "class" / "thermal" / "thermal_zone0", type="acpitz", temp="45000")
    assert heat(tmp_path) == Heat(45.0, "")


def test_a_machine_that_tells_nothing_is_no_problem(tmp_path: Path) -> None:
    assert heat(tmp_path) == Heat(None, "")
    assert check_heat(heat(tmp_path)) == []


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        ("50005", ["too little voltage", "it is throttled"]),
        ("8", ["it is at its limit of temperature"]),
        ("f0000", []),  # all of it was so once, and is over
    ],
)
def test_a_raspberry_pi_says_what_holds_now(tmp_path: Path, bits: str, says: list[str]) -> None:
    shown(tmp_path / "devices/platform/soc/soc:firmware", get_throttled=bits)
    slowed = heat(tmp_path).slowed
    assert [words.partition(":")[0] for words in filter(None, slowed.split("; "))] == says


def test_any_other_board_is_seen_by_its_cooling_device(tmp_path: Path) -> None:
    thermal = tmp_path / "class" / "thermal"
    shown(thermal / "cooling_device0", type="pwm-fan", cur_state="3")
    shown(thermal / "cooling_device1", type="thermal-cpufreq-0", cur_state="0")
    assert heat(tmp_path).slowed == ""
    (thermal / "cooling_device1" / "cur_state").write_text("4\n", encoding="ascii")
    assert "keeps its frequency down" in heat(tmp_path).slowed


def test_doctor_names_the_temperature_and_a_way_out() -> None:
    (cool,) = check_heat(Heat(48.2, ""))
    assert (cool.state, cool.found) == ("ok", "48 °C, not slowed down")
    (hot,) = check_heat(Heat(84.0, "it is throttled"))
    assert (hot.state, hot.found) == ("note", "84 °C, it is throttled")
    assert "cool it" in hot.fix
