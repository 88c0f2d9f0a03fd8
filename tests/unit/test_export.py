"""A result for other tools: what transformers and peft load must be the run's model."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from edgelam_fl.errors import ConfigError, EnvironmentProblem, ModelError
from edgelam_fl.model.adapter import Span, initial_adapter, read_peft_folder
from edgelam_fl.model.carry import CARRY_B
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, load_stages
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving import export as module
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import open_result
from tests.fleet import plain_model
from tests.recorded import a_run
from tests.results import trained_adapter, with_carry, write_result
from tests.support import byte_tokenizer, run_config, write_tiny_llama

IDS = torch.tensor([[72, 101, 108, 108, 111, 3, 4, 5]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def run_logits(folder: Path, source: ModelSource) -> torch.Tensor:
    """Base and adapter by transformers and peft alone."""
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    config = open_result(folder).config
    return logits(
        plain_model(
            source, config.model_copy(update={"model": config.model.model_copy(update={"base": "fp32"})}), adapter
        )
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("overrides", [(), ("model.base=int8", "lora.rank=3", 'lora.targets=["o_proj", "up_proj"]')])
def test_merged_equals_base_and_adapter(tmp_path: Path, tied: bool, overrides: tuple[str, ...]) -> None:
    source = find_model(str(write_tiny_llama(tmp_path / "model", tied=tied)))
    folder = write_result(tmp_path / "run", source, *overrides)
    made, how = export(open_result(folder), "merged", None)
    assert made == folder / "merged"
    assert f'from_pretrained("{made}")' in how
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.dtype == torch.float32
    expected = run_logits(folder, source)
    assert (logits(model) - expected).abs().max() < 1e-5
    assert (logits(AutoModelForCausalLM.from_pretrained(source.folder)) - expected).abs().max() > 1e-2, "the adapter"
    assert AutoTokenizer.from_pretrained(made)("Hello")["input_ids"]
    assert not list(made.glob("adapter*")), "a plain model"
    assert sorted(each.name for each in folder.iterdir()) == ["adapter", "config.toml", "merged"]


def test_merged_in_bf16(tmp_path: Path, tiny: ModelSource) -> None:
    folder = write_result(tmp_path / "run", tiny)
    made, _ = export(open_result(folder), "merged", tmp_path / "half", "bf16")
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.dtype == torch.bfloat16
    size = sum(file.stat().st_size for file in made.glob("*.safetensors"))
    assert tiny.fp32_bytes / 2 <= size < 0.6 * tiny.fp32_bytes
    expected = run_logits(folder, tiny)
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()


def test_merging_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    """Its files are mapped into memory, and the merge writes to that memory."""
    source = find_model(str(write_tiny_llama(tmp_path / "model")))
    before = (source.folder / "model.safetensors").read_bytes()
    export(open_result(write_result(tmp_path / "run", source)), "merged", None)
    assert (source.folder / "model.safetensors").read_bytes() == before


@pytest.mark.real_model
def test_a_gguf_model_is_merged(tmp_path: Path, smollm: ModelSource) -> None:
    folder = write_result(tmp_path / "run", smollm)
    made, _ = export(open_result(folder), "merged", None)
    got = logits(AutoModelForCausalLM.from_pretrained(made))
    # The run's own model: that it equals from_pretrained(gguf_file=...) is proven elsewhere, and takes that half a minute.
    lora = LoraSettings(8, 16.0, ("q_proj", "v_proj"))
    (stage,) = load_stages(smollm, [Span(0, smollm.num_layers, embed=True, head=True)], "fp32", lora)
    stage.load_adapter(load_file(folder / "adapter/adapter_model.safetensors"))
    expected = logits(stage.model)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_peft_loads_the_copy(tmp_path: Path, tiny: ModelSource) -> None:
    folder = write_result(tmp_path / "run", tiny)
    made, how = export(open_result(folder), "peft", tmp_path / "mine")
    assert f'from_pretrained("{tiny.reference}")' in how
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    beside = {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {file.name for file in made.iterdir()} == weights | beside
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.folder), made)
    assert torch.equal(logits(model), run_logits(folder, tiny))


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_others_may_read_what_the_shells_umask_lets_them(tmp_path: Path, tiny: ModelSource, kind: str) -> None:
    """safetensors' own writer leaves files that their owner alone can read."""
    result = open_result(write_result(tmp_path / "run", tiny))
    before = os.umask(0o027)
    try:
        made, _ = export(result, kind, None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in made.iterdir()} == {0o640}


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_a_card_is_written_with_the_runs_own_events(tmp_path: Path, tiny: ModelSource, kind: str) -> None:
    folder = write_result(tmp_path / "run", tiny)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in a_run()), encoding="utf-8")
    made, _ = export(open_result(folder), kind, None)
    card = ModelCard.load(made / "README.md")
    assert card.data.to_dict()["library_name"] == {"peft": "peft", "merged": "transformers"}[kind]
    assert "| 3 devices, pooled |" in card.text
    assert tiny.files["weights"] in card.text


CLASSES = ("animal", "plant", "person")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("bert")
    byte_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(**sizes, vocab_size=260, max_position_embeddings=64)).save_pretrained(folder)
    return find_model(str(folder))


def test_a_classification_is_exported_with_its_head_and_classes(tmp_path: Path, bert: ModelSource) -> None:
    start = initial_adapter(bert, ("query", "dense"), 4, 1, classes=len(CLASSES))
    moved = {name: array + np.float32(0.1) for name, array in start.items()}
    settings = (
        "task.kind=classification",
        f"task.classes={json.dumps(CLASSES)}",
        'lora.targets=["query", "dense"]',
        "lora.rank=4",
    )
    folder = write_result(tmp_path / "run", bert, *settings, adapter=moved)
    small, how = export(open_result(folder), "peft", None)
    assert f'base = AutoModelForSequenceClassification.from_pretrained("{bert.reference}", num_labels=3)' in how
    merged, how = export(open_result(folder), "merged", None)
    assert how.startswith("model = AutoModelForSequenceClassification.from_pretrained(")
    whole = AutoModelForSequenceClassification.from_pretrained(merged)
    assert whole.config.id2label == dict(enumerate(CLASSES))
    base = AutoModelForSequenceClassification.from_pretrained(bert.folder, num_labels=3)
    tuned = PeftModel.from_pretrained(base, small)
    assert (logits(whole) - logits(tuned)).abs().max() < 1e-5
    assert len(set(logits(whole)[0].tolist())) == 3, "of a head that is not zero"


OWN_SCALES = ["lora.alpha=11.0", "lora.use_rslora=true", "lora.alpha_pattern={ v_proj = 5.0 }"]


@pytest.mark.parametrize("overrides", [["lora.alpha=16.0"], ["lora.alpha=11.0"], OWN_SCALES])
def test_carry_factors_are_exported_with_the_adapter(tmp_path: Path, tiny: ModelSource, overrides: list[str]) -> None:
    """Layers 0 to 2, 4 and 5 of rank 8 + 5, layer 3 of rank 8: one LoRA each, elsewhere as in the run."""
    adapter = with_carry(trained_adapter(tiny), 5)
    folder = write_result(tmp_path / "run", tiny, *overrides, adapter=adapter)
    config = run_config(tiny.name, *overrides)
    lora = LoraSettings(8, config.lora.alpha, ("q_proj", "v_proj"), kind=RunSpec(config, tiny).kind)
    (stage,) = load_stages(tiny, [Span(0, 6, embed=True, head=True)], "fp32", lora)
    stage.load_adapter(adapter)
    expected = logits(stage.model)
    made, _ = export(open_result(folder), "peft", tmp_path / "mine")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.folder), made)
    assert (logits(tuned) - expected).norm() < 1e-5 * expected.norm()
    merged, _ = export(open_result(folder), "merged", None)
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - expected).norm() < 1e-5 * expected.norm()
    back = read_peft_folder(made)
    assert set(back) == set(adapter)
    for name, array in adapter.items():
        if name.endswith(CARRY_B):
            np.testing.assert_allclose(back[name], array, rtol=3e-7)
        else:
            assert np.array_equal(back[name], array), name


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda tensors: tensors.pop(next(iter(tensors))), "1 tensors are missing and 0 too many"),
        (lambda tensors: tensors.update({next(iter(tensors)): next(iter(tensors.values()))[:3].copy()}), "cannot be put on"),
    ],
    ids=["missing", "shape"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, tiny: ModelSource, spoil: Any, says: str, kind: str
) -> None:
    folder = write_result(tmp_path / "run", tiny)
    file = folder / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=says):
        export(open_result(folder), kind, None)
    assert not (folder / kind).exists()


def test_a_torn_adapter_is_refused(tmp_path: Path, tiny: ModelSource) -> None:
    folder = write_result(tmp_path / "run", tiny)
    file = folder / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be put on"):
        export(open_result(folder), "peft", None)


@pytest.mark.parametrize(
    ("kind", "dtype", "says"),
    [
        ("onnx", "", "--to 'onnx' must be 'peft'"),
        ("peft", "bf16", "--dtype belongs to --to merged and --to gguf"),
        ("merged", "fp8", "--dtype 'fp8' must be fp32 or bf16 with --to merged"),
        ("merged", "fp16", "--dtype 'fp16' must be fp32 or bf16 with --to merged"),
        ("gguf", "q4", "--dtype 'q4' must be fp32 or fp16 or bf16 with --to gguf"),
    ],
)
def test_wrong_options(tmp_path: Path, tiny: ModelSource, kind: str, dtype: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        export(open_result(write_result(tmp_path / "run", tiny)), kind, None, dtype)


def test_a_private_front_comes_from_its_device(tmp_path: Path, tiny: ModelSource) -> None:
    folder = write_result(tmp_path / "run", tiny, "privacy.private_front=true")
    whole = load_file(folder / "adapter/adapter_model.safetensors")
    own = {name: array + np.float32(1.0) for name, array in whole.items() if ".layers.0." in name}
    save_file(own, tmp_path / "front.safetensors")
    with pytest.raises(ConfigError, match=r"lacks the front's adapter: .* export with --front FILE"):
        export(open_result(folder), "peft", None)
    made, _ = export(open_result(folder), "peft", None, front=tmp_path / "front.safetensors")
    exported = load_file(made / "adapter_model.safetensors")
    assert exported.keys() == whole.keys()
    assert all(np.array_equal(exported[name], own.get(name, whole[name])) for name in whole)
    save_file({"else": np.zeros(3, np.float32)}, tmp_path / "front.safetensors")
    with pytest.raises(ConfigError, match=r"does not belong to the adapter of .*: else is no tensor of it"):
        export(open_result(folder), "merged", None, front=tmp_path / "front.safetensors")
    plain = write_result(tmp_path / "plain", tiny)
    with pytest.raises(ConfigError, match=r"--front belongs to runs with privacy.private_front = true"):
        export(open_result(plain), "peft", None, front=tmp_path / "front.safetensors")


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_a_folder_that_exists_is_kept(tmp_path: Path, tiny: ModelSource, kind: str) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine exists; choose another with --out"):
        export(open_result(write_result(tmp_path / "run", tiny)), kind, tmp_path / "mine")


@pytest.mark.parametrize("which", ["memory", "disk"])
def test_too_little_room_is_said_before_anything_is_read(
    tmp_path: Path, tiny: ModelSource, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setattr(module, f"{which}_free_bytes", lambda *_: tiny.fp32_bytes // 2 - 1)
    with pytest.raises(EnvironmentProblem, match=f"{tiny.fp32_bytes / 1e9:.2f} GB"):
        export(open_result(write_result(tmp_path / "run", tiny)), "merged", None, "fp32")


def test_a_run_without_a_finished_round(tmp_path: Path, tiny: ModelSource) -> None:
    folder = write_result(tmp_path / "run", tiny)
    (folder / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no adapter: the run has not finished a round"):
        open_result(folder)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run's folder: it has no config\.toml"):
        open_result(tmp_path)
