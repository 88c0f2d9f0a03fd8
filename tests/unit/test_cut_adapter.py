"""The result of a run with low-rank gradients: what its folder holds, who answers with it, and who says that it cannot."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import Adapter, initial_cut, read_peft_folder
from edgelam_fl.model.cut import CUT_A, CUT_B, is_cut
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.export import export
from edgelam_fl.serving.generate import LocalSpeaker
from edgelam_fl.serving.results import Result, open_result
from tests.fleet import plain_base, same_bits
from tests.results import trained_adapter, write_result
from tests.support import run_config

LOWRANK = ("wire.gradients=lowrank", "lora.train=back")
IDS = [5, 77, 130, 9]


@pytest.fixture
def adapter(tiny: ModelSource) -> Adapter:
    cut = RunSpec(run_config(tiny.name, *LOWRANK), tiny).cut
    assert cut is not None
    drawn = initial_cut(tiny, cut, 1)
    learned = np.random.default_rng(3)
    tensors = {n: a if n.endswith(CUT_B) else learned.normal(0, 0.3, a.shape).astype("f") for n, a in drawn.items()}
    return trained_adapter(tiny) | tensors


@pytest.fixture
def result(tiny: ModelSource, tmp_path: Path, adapter: Adapter) -> Result:
    return open_result(write_result(tmp_path / "run", tiny, *LOWRANK, adapter=adapter))


def test_the_cut_adapter_starts_without_effect_and_is_drawn_from_the_seed(tiny: ModelSource) -> None:
    cut = RunSpec(run_config(tiny.name, *LOWRANK, "split.back=1", "lora.rank=4"), tiny).cut
    assert cut is not None
    assert (cut.layer, cut.rank, cut.scale) == (4, 4, 4.0)
    one, again, other = (initial_cut(tiny, cut, seed) for seed in (1, 1, 2))
    assert {name[-len(CUT_A) :]: array.shape for name, array in one.items()} == {CUT_A: (4, 64), CUT_B: (64, 4)}
    assert same_bits(one, again)
    b = next(name for name in one if name.endswith(CUT_B))
    assert not np.array_equal(one[b], other[b])
    assert not any(array.any() for name, array in one.items() if name.endswith(CUT_A))


def test_a_folder_gives_the_cut_adapter_back(result: Result, adapter: Adapter) -> None:
    assert same_bits(read_peft_folder(result.adapter), adapter)


def test_chat_answers_with_the_cut_adapter_and_without_it(tiny: ModelSource, result: Result, adapter: Adapter) -> None:
    def logits(speaker: LocalSpeaker, tuned: bool) -> torch.Tensor:
        with torch.no_grad(), speaker.opened(tuned) as step:
            return step(IDS, 0)

    plain = LocalSpeaker(result.config.model, result.config.task)
    base, speaker = logits(plain, True), LocalSpeaker(result.config.model, result.config.task)
    speaker.put_on(result.adapter)
    parts = {name[-len(CUT_A) :]: torch.from_numpy(array) for name, array in adapter.items() if is_cut(name)}
    with pytest.warns(UserWarning, match="cut_adapter"):  # peft says that it leaves something out
        reference = PeftModel.from_pretrained(plain_base(tiny.folder, None, "fp32"), str(result.adapter))
    layer = reference.get_base_model().model.layers[3]
    layer.register_forward_hook(lambda _m, _i, h: h + 2.0 * (h @ parts[CUT_A].T) @ parts[CUT_B].T)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([IDS])).logits[0, -1]
    plain_base.cache_clear()  # the reference changed it
    torch.testing.assert_close(logits(speaker, True), expected)
    assert torch.equal(logits(speaker, False), base)
    assert not torch.allclose(logits(speaker, True), base, atol=0.05)


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_an_export_is_refused(result: Result, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"its cut adapter is no LoRA of a module.*`edgelam chat .*` answers with it"):
        export(result, kind, None)
    assert not (result.folder / kind).exists()


def test_an_ordinary_result_has_no_cut_adapter(tiny: ModelSource, tmp_path: Path) -> None:
    plain = open_result(write_result(tmp_path / "plain", tiny))
    assert "cut_adapter" not in (plain.adapter / "adapter_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(map(is_cut, read_peft_folder(plain.adapter)))
