from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from edgelam_fl.errors import ModelError
from edgelam_fl.model import bases, speed
from edgelam_fl.model.chip import CPU
from edgelam_fl.model.identity import ModelIdentity
from edgelam_fl.model.source import ModelSource, find_model
from tests.support import write_tiny_llama

PAIRS = ["fp32/fp32", "bf16/bf16", "int8/fp32", "int8/bf16", "nf4/fp32", "nf4/bf16"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_pair_is_measured_once_for_a_model(tiny: ModelSource, cache: Path, tmp_path: Path) -> None:
    first = speed.measure_bases(tiny)
    assert list(first) == PAIRS
    assert all(0 < seconds < 10 for seconds in first.values())
    assert len(list(cache.glob("speed/*.json"))) == 1

    runs: list[str] = []

    def measure(shapes: speed.Shapes, base: str, dtype: torch.dtype, chip: torch.device) -> float:
        runs.append(base)
        return 1.0

    assert speed.measure_bases(tiny, measure=measure) == first
    assert runs == []
    other = find_model(str(write_tiny_llama(tmp_path / "other", layers=2, seed=5)))
    speed.measure_bases(other, measure=measure)
    assert runs == ["fp32", "bf16", "int8", "int8", "nf4", "nf4"]


def test_other_threads_and_other_bases_are_measured_anew(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = partial(speed.measure_bases, tiny, measure=lambda *_: float(torch.get_num_threads()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert set(measured().values()) == {1.0}
        torch.set_num_threads(2)
        assert set(measured().values()) == {2.0}
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(speed, "usable_bases", lambda chip: bases.BASES[:3])
    assert list(measured()) == PAIRS[:4]


def test_a_half_written_note_is_measured_anew(tiny: ModelSource, cache: Path) -> None:
    first = speed.measure_bases(tiny)
    (note,) = cache.glob("speed/*.json")
    note.write_text("{")
    assert list(speed.measure_bases(tiny)) == list(first)


def test_the_layers_own_sizes_decide(tiny: ModelSource) -> None:
    shapes: list[speed.Shapes] = []

    def measure(own: speed.Shapes, *_: object) -> float:
        shapes.append(own)
        return 1.0

    speed.measure_bases(tiny, measure=measure)
    # queries and output, keys and values of 2 of 4 heads, and the three of the feed-forward part
    assert sorted(shapes[0]) == sorted([(64, 64)] * 2 + [(32, 64)] * 2 + [(128, 64)] * 2 + [(64, 128)])


def test_a_larger_layer_takes_longer() -> None:
    large_s, small_s = (speed.layers_s([(size, size)], "fp32", torch.float32, CPU) for size in (1024, 16))
    assert large_s > small_s


def test_a_model_without_matrices_in_its_layers(tiny: ModelSource) -> None:
    index = {name: entry for name, entry in tiny.index.items() if ".layers." not in name}
    bare = ModelSource(tiny.name, tiny.folder, index, ModelIdentity(files={}, weights_digest="other"), tiny.reference)
    with pytest.raises(ModelError, match="no matrices in its layer 0"):
        speed.measure_bases(bare)
