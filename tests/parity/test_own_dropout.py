"""The model's own dropout: transformers' training mode with our masks, and the same bits however the layers are split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
)

from edgelam_fl.errors import ModelError
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter
from edgelam_fl.model.modules import UnitDropout, UnitSeed
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages

SEED, SHARE, LAYERS, LENGTHS = 11, 0.3, 3, [7, 4, 1]
SIZES: dict[str, Any] = dict(
    vocab_size=40, num_hidden_layers=LAYERS, hidden_size=16, num_attention_heads=2, intermediate_size=24
)
WHOLE = [Span(0, LAYERS, embed=True, head=True)]
SLICES = [Span(0, 1, embed=True), Span(1, 2), Span(2, LAYERS, head=True)]


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]  # the config
    attention: str  # the name of a layer's attention, without the layer's number
    targets: tuple[str, ...]
    classes: int = 0


CASES = {
    "gpt2": Case(
        lambda: GPT2Config(
            vocab_size=40, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=32, embd_pdrop=SHARE, resid_pdrop=SHARE,
            attn_pdrop=SHARE, initializer_range=0.2,
        ),
        "transformer.h.{}.attn", ("c_attn",),
    ),
    "bert": Case(
        lambda: BertConfig(
            **SIZES, hidden_dropout_prob=SHARE, attention_probs_dropout_prob=SHARE, initializer_range=0.2, max_position_embeddings=32,
        ),
        "bert.encoder.layer.{}.attention.self", ("query", "value"), 3,
    ),
    "llama": Case(
        lambda: LlamaConfig(**SIZES, num_key_value_heads=1, attention_dropout=SHARE, initializer_range=0.2),
        "model.layers.{}.self_attn", ("q_proj", "v_proj"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    case: Case
    source: ModelSource
    adapter: Adapter

    def stages(self, spans: list[Span], *, own: bool = True) -> list[Stage]:
        lora = LoraSettings(4, 8.0, self.case.targets, own_dropout=own)
        stages = load_stages(self.source, spans, "fp32", lora, classes=self.case.classes)
        for stage in stages:
            stage.load_adapter(self.adapter)
        return stages


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = case.make()
    (BertModel(config) if case.classes else AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    source = find_model(str(folder))
    adapter = initial_adapter(source, case.targets, 4, 1, classes=case.classes)
    drawn = np.random.default_rng(0)
    return Built(case, source, {n: drawn.normal(0, 0.3, a.shape).astype(np.float32) for n, a in adapter.items()})


def ids() -> torch.Tensor:
    return torch.randint(2, 40, (len(LENGTHS), LENGTHS[0]), generator=torch.Generator().manual_seed(1))


def learned(stages: list[Stage], seed: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the output, and the gradients of all adapters' tensors for a loss that is a fixed mixture of it."""
    output = ids()
    for stage in stages:
        output = stage(output, LENGTHS, unit_seed=seed)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    if len(LENGTHS) < output.dim() + 1:  # of a language model: padding has no loss
        weights *= (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None])[..., None]
    named = {name: parameter for stage in stages for name, parameter in stage.adapter_parameters.items()}
    gradients = torch.autograd.grad((output * weights).sum(), list(named.values()))
    return output.detach(), dict(zip(named, gradients, strict=True))


def test_slices_drop_what_the_whole_model_drops_to_the_bit(built: Built) -> None:
    whole, slices, again = built.stages(WHOLE), built.stages(SLICES), built.stages(SLICES)
    for stage in again:
        stage.set_checkpointing(True)
    expected, gradients = learned(whole, SEED)
    for stages in (slices, again):
        output, found = learned(stages, SEED)
        assert torch.equal(output, expected)
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in found)
    assert not torch.allclose(learned(slices, SEED + 1)[0], expected, atol=1e-2)


def test_what_is_measured_has_no_dropout(built: Built) -> None:
    assert torch.equal(learned(built.stages(SLICES), None)[0], learned(built.stages(SLICES, own=False), None)[0])


def test_it_is_transformers_training_mode_with_our_masks(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = built.stages(WHOLE)
    expected, _ = learned([stage], SEED)
    auto: Any = AutoModelForSequenceClassification if built.case.classes else AutoModelForCausalLM
    options = {"num_labels": built.case.classes} if built.case.classes else {}
    model: Any = auto.from_pretrained(built.source.folder, attn_implementation="eager", **options)
    scale = 8.0 / 4
    prefix = "base_model.model."
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in built.adapter.items():
            module = name.removeprefix(prefix)
            if ".lora_A." in name:
                a, b = (torch.from_numpy(built.adapter[name.replace("lora_A", end)]) for end in ("lora_A", "lora_B"))
                weight = weights[module.replace("lora_A.", "")]
                weight += scale * ((b @ a).T if weight.shape != (len(b), a.shape[1]) else b @ a)
            elif "lora_" not in name:
                weights[module].copy_(torch.from_numpy(array))
    seed, called = UnitSeed(), iter(built.case.attention.format(n) for n in range(LAYERS))
    dropouts = [(name, one) for name, one in model.named_modules() if isinstance(one, torch.nn.Dropout)]
    for name, one in dropouts:
        monkeypatch.setattr(one, "forward", UnitDropout(one.p, name, seed).forward)
    monkeypatch.setattr(
        torch.nn.functional, "dropout", lambda x, p, training: UnitDropout(p, f"{next(called)}.weights", seed)(x)
    )
    mask = (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]).long()
    with seed.set_to(SEED), torch.no_grad():
        output = model.train()(input_ids=ids(), attention_mask=mask).logits
    assert next(called, None) is None, "every layer's attention dropped weights"
    real = mask.bool() if output.dim() == 3 else slice(None)
    torch.testing.assert_close(expected[real], output[real], atol=2e-5, rtol=1e-4)


def test_an_attention_without_masks_of_its_own_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, attention_dropout=SHARE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    lora = LoraSettings(4, 8.0, ("q_proj",), own_dropout=True)
    with pytest.raises(ModelError, match=r"model\.dropout = 'own': gemma2 drops 0.3 .* allowed: 'off'"):
        load_stages(find_model(str(tmp_path)), WHOLE, "fp32", lora)
