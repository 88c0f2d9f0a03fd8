"""A stage whose tensors came from the hub equals one loaded from the whole model, to the bit, in every base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.fetch import open_model
from edgelam_fl.hub.slices import offered
from edgelam_fl.model.adapter import Span, initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages

TARGETS = ("q_proj", "v_proj")


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8", "nf4"])
def test_a_stage_of_a_served_slice_trains_like_one_of_the_whole_model(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    server = HubServer("127.0.0.1", 0, tmp_path / "hub")
    try:
        with offered(tiny, tmp_path / "hub") as token:
            served = open_model("elsewhere/tiny", tiny.digest, f"127.0.0.1:{server.port}", token=token)
            stages = [stages_of(source, base) for source in (tiny, served)]
    finally:
        server.stop()
    results = [trained(front, back, tiny) for front, back in stages]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(value.abs().sum() > 0 for name, value in results[0].items() if "lora_B" in name)


def stages_of(source: ModelSource, base: str) -> list[Stage]:
    """Both ends of the model: the embedding, layers, and the head that is tied to the embedding."""
    return load_stages(source, [Span(0, 2, embed=True), Span(2, 6, head=True)], base, LoraSettings(4, 8.0, TARGETS))


def trained(front: Stage, back: Stage, tiny: ModelSource) -> dict[str, torch.Tensor]:
    """Returns logits, and the gradient of every factor."""
    ids_BT = torch.arange(24).view(2, 12)
    gradients = {}
    for stage in (front, back):
        stage.load_adapter(initial_adapter(tiny, TARGETS, 4, 1))
        stage.set_trainable(lambda layer: True)
    logits_BTV = back(front(ids_BT, [12, 9]), [12, 9])
    logits_BTV.float().square().sum().backward()
    for stage in (front, back):
        for name, parameter in stage.adapter_parameters.items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad
    return {"logits": logits_BTV.detach(), **gradients}
