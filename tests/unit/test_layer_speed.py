from __future__ import annotations

from pathlib import Path

import pytest

from edgelam_fl.model import layer_speed
from edgelam_fl.model.source import ModelSource


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_real_layer_is_measured_once_for_each_pair_and_size(
    tiny: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = layer_speed.measure_layers(tiny, said.append)
    assert list(first) == list(layer_speed.TOKENS)
    assert [list(pairs) for pairs in first.values()] == [[text.rpartition(" ")[2] for text in said]] * len(first)
    assert all(0 < seconds < 10 for pairs in first.values() for seconds in pairs.values())
    assert {"fp32/fp32", "bf16/bf16", "int8/fp32", "int8/bf16"} <= set(first[128])

    said.clear()
    assert layer_speed.measure_layers(tiny, said.append) == first
    assert said == []


def test_a_slow_layer_is_measured_with_few_tokens_alone(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        layer_speed, "_seconds", lambda stage, source, tokens: 1.0 if stage.dtype.itemsize == 4 else 0.1
    )
    few, many = layer_speed.measure_layers(tiny).values()
    assert {"fp32/fp32", "int8/fp32"} <= set(few) - set(many)
    assert {"bf16/bf16", "int8/bf16"} <= set(many)


def test_the_layer_has_attention_and_lora(tiny: ModelSource) -> None:
    stage = layer_speed.random_layer(tiny, "fp32", "float32")
    modules = [name for name in tiny.linear_modules() if ".layers.0." in name]
    assert len(stage.trainable()) == 2 * len(modules), "an A and a B for each matrix"
