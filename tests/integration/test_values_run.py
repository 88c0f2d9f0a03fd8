"""Channel prediction from the command line to the run's folder, over real processes: as in one process, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgelam_fl.config import read_run_file
from edgelam_fl.model.adapter import read_peft_folder
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.over_time import channel_over_time
from edgelam_fl.telemetry.summary import read_summary
from edgelam_fl.wireless.channels.paths import Paths
from edgelam_fl.wireless.channels.store import kept
from server.global_adapter import first_adapter
from tests.fleet import check_done, joined, memory_fleet, same_bits
from tests.integration.conftest import Edgelam

RUN = [
    "task.kind=channel-prediction", "radio.series=8", "data.held_out=0.2", "federation.rounds=1", "federation.local_steps=2",
    "federation.batch_size=4", "split.front=0", "split.back=1", "strategy.aggregation=none",
]  # fmt: skip


@pytest.mark.processes
def test_a_run_of_values_is_what_one_process_computes(edgelam: Edgelam, tiny: ModelSource, tmp_path: Path) -> None:
    kept(Paths(10, seed=3), tmp_path)
    (links,) = tmp_path.glob("channels-*.safetensors")
    file = links.rename(tmp_path / "device-1.safetensors")  # its name is the device's, which decides what it draws
    sets = [word for key in [f"model.name={tiny.name}", *RUN] for word in ("--set", key)]
    done = edgelam("run", "--data", str(file), "--out", "run", *sets)
    assert done.returncode == 0, done.stderr
    (device,) = read_summary(tmp_path / "run" / "summary.json").devices
    assert device.perplexity_before is None
    assert device.metrics_before["NMSE"] > 0
    config, before = read_run_file(tmp_path / "run" / "config.toml"), torch.get_num_threads()
    torch.set_num_threads(1)
    with memory_fleet(tiny, config, [file]) as fleet:
        start = first_adapter(RunSpec(config, tiny))
        reports = fleet.run(start, 2)
    torch.set_num_threads(before)
    check_done(reports)
    assert same_bits(read_peft_folder(tmp_path / "run" / "adapter"), start | joined(reports))
    shown = channel_over_time(config, tmp_path / "run" / "adapter", file)
    assert shown is not None
    assert [len(part) for part in (shown.true, shown.heard, shown.before, shown.after)] == [20, 16, 4, 4]
    assert shown.before != shown.after
