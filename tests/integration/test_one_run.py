"""One real run through Flower and gRPC, seen from outside: what it leaves, what Flower does for it, what crosses the wire."""

from __future__ import annotations

import json
import tomllib
from itertools import combinations

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgelam_fl.config import parse_run_file
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import RoundDone
from tests.integration.federation import Federation, Run, config_of

pytestmark = pytest.mark.processes

DEVICES = ["device-1", "device-2", "device-3"]


def test_the_folder_holds_what_is_documented(averaged: Run) -> None:
    summary = averaged.summary
    assert [device.name for device in summary.devices] == DEVICES
    for device in summary.devices:
        assert device.examples == 15
        assert min(device.perplexity_before, device.perplexity_after) > 1
        assert min(device.tokens_per_s, device.bytes_up, device.bytes_down, device.peak_rss_bytes) > 0
    (host,) = summary.hosts
    assert (host.name, host.layers) == ("edge-1", (2, 4))
    assert min(host.peak_rss_bytes, host.bytes_up, host.bytes_down) > 0
    assert (summary.state, summary.rounds) == ("done", 2)
    assert summary.seconds > 0
    assert {"edgelam-fl", "flwr", "torch", "transformers", "peft"} <= summary.versions.keys()

    config = (averaged.path / "config.toml").read_text(encoding="utf-8")
    assert parse_run_file(config, source="config.toml").federation.rounds == 2
    assert tomllib.loads(config)["federation"]["local_steps"] == 3
    assert [done.round for done in averaged.of_kind(RoundDone)] == [1, 2, 3]
    assert "<html" in (averaged.path / "report.html").read_text(encoding="utf-8")[:500].lower()
    adapter = load_file(averaged.path / "adapter/adapter_model.safetensors")
    assert len(adapter) == 6 * 2 * 2, "six layers, q and v, A and B"
    assert all(np.isfinite(array).all() for array in adapter.values())
    assert all(array.any() for array in adapter.values()), "every layer's adapter was trained"
    assert json.loads((averaged.path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"


def test_training_lowers_the_loss(averaged: Run) -> None:
    assert [device.name for device in averaged.summary.devices] == DEVICES
    for device in averaged.summary.devices:
        assert device.perplexity_after < 0.9 * device.perplexity_before


def test_adapters_differ_before_and_agree_after_each_aggregation(averaged: Run) -> None:
    first, second, evaluation = averaged.of_kind(RoundDone)
    for done, following in ((first, second), (second, evaluation)):
        trained = {device.name: device.digest_after for device in done.devices}
        assert list(trained) == DEVICES
        assert all(trained[a] != trained[b] for a, b in combinations(DEVICES, 2)), "before the aggregation"
        going_on = {device.digest_before for device in following.devices}
        assert len(going_on) == 1, "after the aggregation"
        assert not going_on & set(trained.values()), "the average is nobody's own"


def test_without_aggregation_the_devices_part_and_score_differently(
    averaged: Run, federation: Federation, tiny: ModelSource
) -> None:
    apart = federation.run("apart", config_of(tiny.name, "strategy.aggregation=none"))
    first, second, evaluation = apart.of_kind(RoundDone)
    for done, following in ((first, second), (second, evaluation)):
        trained = {device.name: device.digest_after for device in done.devices}
        going_on = {device.name: device.digest_before for device in following.devices}
        assert going_on == trained
        assert len(set(going_on.values())) == 3
    for name in DEVICES:
        assert apart.device(name).perplexity_before == averaged.device(name).perplexity_before
        difference = apart.device(name).perplexity_after / averaged.device(name).perplexity_after - 1
        assert abs(difference) > 1e-4, f"{name} scores the same without aggregation"


def test_bytes_in_the_summary_are_those_on_the_wire(averaged: Run) -> None:
    """Both directions, every device and the host, against what the proxy counted; TCP and IP headers are in neither."""
    total_up = total_down = 0
    for name in DEVICES:
        device = averaged.device(name)
        up = sum(len(link.up) for link in averaged.links[name])
        down = sum(len(link.down) for link in averaged.links[name])
        assert device.bytes_up == pytest.approx(up, rel=0.03), f"{name}, up"
        assert device.bytes_down == pytest.approx(down, rel=0.03), f"{name}, down"
        total_up, total_down = total_up + up, total_down + down
    (host,) = averaged.summary.hosts
    assert host.bytes_down == pytest.approx(total_up, rel=0.03)
    assert host.bytes_up == pytest.approx(total_down, rel=0.03)
