"""`edgelam demo --task beamforming` with its user's words: real processes, its own channels, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgelam_fl.telemetry.events import RoundDone, of_kind, read_events
from tests.integration.conftest import Edgelam

SMALL = ("federation.rounds=1", "federation.local_steps=8", "data.held_out=0.1", "radio.beam_snrs_db=[0.0, 10.0]")


@pytest.mark.processes
def test_cells_learn_one_network_and_the_report_draws_their_sum_rates(edgelam: Edgelam, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["demo", "--task", "beamforming", "--devices", "2", "--out", str(run)]
    done = edgelam(*words, *(part for key in SMALL for part in ("--set", key)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["state"], [device["name"] for device in summary["devices"]]) == ("done", ["cell-1", "cell-2"])
    assert all(
        device["metrics_after"]["sum rate"] > device["metrics_before"]["sum rate"] for device in summary["devices"]
    ), "steps help"
    last = list(of_kind(read_events(run / "events.jsonl"), RoundDone))[-1]
    assert {point.who for device in last.devices for point in device.points} == {"", "MRT", "ZF", "RZF", "WMMSE"}
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0].replace("THIS FOLDER", str(run / "adapter"))
    exec(compile(code, "the card's code", "exec"), {})
    assert "LoRA" not in card
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Held-out sum rate by SNR" in page
    assert "sum rates by SNR, beside MRT, ZF, RZF and WMMSE" in done.stdout
