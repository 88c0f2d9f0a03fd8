"""A result's model card, and what it says of the base: numbers of the run, in the hub's own format, and no names of nodes."""

from __future__ import annotations

import errno
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from edgelam_fl.config import RunConfig
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.serving.model_card import model_card
from edgelam_fl.serving.trained_on import TrainedOn, trained_on
from tests.gguf_files import byte_vocabulary, keys_of, tensors_of, write_gguf
from tests.recorded import DEVICES, a_classification, a_failed_run, a_run, a_run_failed_at_once, as_events, of_privacy
from tests.support import run_config, write_tiny_llama
from tests.unit.conftest import MakeFederation

PLAIN = TrainedOn(name="org/base", is_public=True, file="", quantized="", digest="12ab", licence="mit")
ROUNDED = TrainedOn(
    name="org/base", is_public=True, file="base.Q4_1.gguf", quantized="Q4_1", digest="12ab", licence="mit"
)


def card_of(events: list[dict[str, Any]], base: TrainedOn = PLAIN, form: str = "peft", *overrides: str) -> ModelCard:
    return ModelCard(model_card(run_config("smollm2-135m", *overrides), base, as_events(events), form))


def test_it_says_how_the_run_went() -> None:
    card = card_of(a_run(), PLAIN, "peft", "lora.rank=4", "federation.rounds=6")
    told = card.data.to_dict()
    assert (told["base_model"], told["base_model_relation"], told["license"]) == ("org/base", "adapter", "mit")
    assert (told["library_name"], told["pipeline_tag"]) == ("peft", "text-generation")
    assert f"{len(DEVICES)} devices with 1,536 examples to learn, 512 to 512 on each" in card.text
    found = re.search(r"\| 3 devices, pooled \| ([\d.]+) \| ([\d.]+) \|", card.text)
    assert found
    assert 85 <= float(found[1]) <= 91
    assert 15 <= float(found[2]) <= 21
    assert "rank 4, alpha 16, on q_proj, v_proj" in card.text
    assert "edgelam-fl 0.1.0" in card.text
    assert "No differential privacy" in card.text
    assert 'base = AutoModelForCausalLM.from_pretrained("org/base")' in card.text


@pytest.mark.parametrize("make", [a_run, a_classification, a_failed_run, lambda: a_run(lost=True)], ids=range(4))
def test_it_names_no_node(make: Any) -> None:
    """Names of nodes may be those of people, and a card is made to be published."""
    names = {event["node"] for event in make() if event["event"] == "node_joined"}
    text = card_of(make()).content
    assert names
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]


def test_a_privacy_promise_is_said() -> None:
    text = card_of([*a_run()[:-1], *of_privacy(), a_run()[-1]]).text
    assert "epsilon 3.9 of 4 spent, at delta 1e-05" in text
    assert "protects one device, against strangers" in text
    assert "No differential privacy" not in text


def test_a_classification() -> None:
    config = ("model.name=minilm-l6", "task.kind=classification", 'task.classes=["noun", "verb"]')
    card = card_of(a_classification(), PLAIN, "peft", *config)
    assert card.data.to_dict()["pipeline_tag"] == "text-classification"
    assert re.search(r"\| held-out accuracy \| before \| after \|", card.text)
    assert 'from_pretrained("org/base", num_labels=2)' in card.text
    assert "The classes, in the order of the outputs: noun, verb." in card.text


def test_a_run_that_did_not_end_says_what_was_measured() -> None:
    until = next(n for n, event in enumerate(a_run()) if event["event"] == "round_done" and event["round"] == 2)
    assert "The run did not end, so the adapter is one round newer" in card_of(a_run()[: until + 1]).text
    assert "did not end" not in card_of(a_run()).text
    assert "Not measured" in card_of([]).text
    assert "Not measured" in card_of(a_run_failed_at_once()).text


def test_the_best_adapter_is_said_with_its_own_measure() -> None:
    """What round 2 made was measured when round 3 began; the run went on."""
    events = a_run()
    taken = {"event": "best_taken", "round": 2, "loss": 2.5, "last_round": 5}
    best, last = (card_of(each).text for each in ([*events, taken], events))
    assert "The adapter is the one after round 2 of 5" in best
    measured = [re.search(r"pooled \| ([\d.]+) \| ([\d.]+) \|", text).groups() for text in (best, last)]
    assert measured[0][0] == measured[1][0]
    assert float(measured[0][1]) > float(measured[1][1])


@pytest.mark.parametrize("base", ["fp32", "int8", "auto"])
def test_weights_that_were_rounded_for_the_run_are_said(base: str) -> None:
    text = card_of(a_run(), PLAIN, "merged", f"model.base={base}").text
    assert (f"Measured with frozen weights kept in {base};" in text) == (base != "fp32")


def test_kinds_of_lora_are_said() -> None:
    text = card_of(a_run(), PLAIN, "peft", "lora.use_rslora=true", 'lora.modules_to_save=["norm"]').text
    assert "use_rslora = True, modules_to_save = ('norm',)" in text
    assert "use_dora" not in text


def test_a_rounded_base_is_named_with_its_digest() -> None:
    text = card_of(a_run(), ROUNDED).text
    assert (
        "base.Q4_1.gguf (stored as Q4_1), a rounded copy of org/base, unpacked to plain numbers; SHA-256 12ab" in text
    )
    assert "The weights at org/base are not rounded" in text
    assert "rounded" not in card_of(a_run(), PLAIN).text


def test_a_base_without_a_public_name_is_no_link() -> None:
    base = TrainedOn(name="mine", is_public=False, file="", quantized="", digest="12ab", licence="")
    card = card_of(a_run(), base)
    assert "base_model" not in card.data.to_dict()
    assert "A LoRA adapter for `mine`" in card.text
    assert 'from_pretrained("YOUR COPY OF mine")' in card.text
    assert "Licence of the base model: not named in its files" in card.text


def test_a_part_that_is_not_here_is_said() -> None:
    def text(*overrides: str, whole: bool = False) -> str:
        return model_card(run_config("smollm2-135m", *overrides), PLAIN, as_events(a_run()), "peft", whole=whole)

    assert "The front's adapter is not here" in text("privacy.private_front=true")
    assert "A cut adapter belongs to it" in text("wire.gradients=lowrank", "lora.train=back")
    assert "is not here" not in text("privacy.private_front=true", whole=True)


# ---------------------------------------------------------------- the base


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("license: mit", "mit"), ("license: other\nlicense_name: tiny-1.0", "tiny-1.0"), ("license:\n- apache-2.0", "apache-2.0"),
        ("tags:\n- x", ""), ("license: 'llama3.2'", "llama3.2"), (": [", ""),
    ],
)  # fmt: skip
def test_the_licence_is_the_one_of_the_models_card(tmp_path: Path, head: str, licence: str) -> None:
    folder = write_tiny_llama(tmp_path / "model", layers=1)
    assert trained_on(find_model(str(folder))).licence == ""
    (folder / "README.md").write_text(f"---\n{head}\n---\n# Model\nlicense: none\n")
    assert trained_on(find_model(str(folder))).licence == licence


def test_a_gguf_file_names_its_format_and_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    vocabulary = byte_vocabulary()
    config = LlamaConfig(
        vocab_size=len(vocabulary["tokenizer.ggml.tokens"]), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    keys = {**keys_of(config, "llama"), **vocabulary, "general.license": "apache-2.0"}
    file = write_gguf(tmp_path / "m.gguf", keys, tensors_of(LlamaForCausalLM(config), "llama"), quantization="Q4_1")
    source = find_model(str(file))
    base = trained_on(source)
    assert (base.name, base.is_public, base.file) == ("m.gguf", False, "m.gguf")
    assert (base.quantized, base.licence, base.digest) == ("Q4_1", "apache-2.0", source.files["weights"])
    assert not base.is_rounded_copy, "nobody else has other weights of this name"
    assert base.as_json() == {"model": "m.gguf", "file": "m.gguf", "stored_as": "Q4_1", "sha256": base.digest}


@pytest.mark.real_model
def test_the_built_in_model_is_said_to_be_a_rounded_copy(smollm: ModelSource) -> None:
    base = trained_on(smollm)
    assert (base.name, base.is_public, base.is_rounded_copy) == ("HuggingFaceTB/SmolLM2-135M-Instruct", True, True)
    assert (base.file, base.licence) == ("SmolLM2-135M-Instruct.Q4_1.gguf", "apache-2.0")
    assert "Q4_1" in base.quantized


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_an_adapter_that_others_can_use(federation: MakeFederation, tiny: ModelSource) -> None:
    run = federation("ab", "e", "federation.rounds=1")
    run.run()
    adapter = run.folder.path / "adapter"
    run.folder.path.chmod(0o700)
    run.folder.finish()
    card = ModelCard((adapter / "README.md").read_text(encoding="utf-8"))
    assert "1 of 1, 10 steps each" in card.text
    assert "Its 2 devices kept their data and computed the first and last layers" in card.text
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["auto_mapping"]["trained_on"]["sha256"] == tiny.files["weights"]
    own, base = (AutoTokenizer.from_pretrained(folder) for folder in (adapter, tiny.folder))
    chat = [{"role": "user", "content": "Hello"}]
    assert own.apply_chat_template(chat, tokenize=False) == base.apply_chat_template(chat, tokenize=False)
    assert own("Hello 12")["input_ids"] == base("Hello 12")["input_ids"]
    assert json.loads((adapter / "generation_config.json").read_text())["eos_token_id"] == 1
    assert stat.S_IMODE(adapter.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in adapter.iterdir()} == {0o644}
    assert stat.S_IMODE(run.folder.path.stat().st_mode) == 0o700, "its owner decides who gets there"


def test_a_run_that_fails_leaves_a_card_if_it_leaves_an_adapter(federation: MakeFederation) -> None:
    run = federation("ab", "e", "federation.rounds=1")
    run.folder.fail("nobody came")
    assert not (run.folder.path / "adapter").exists()
    run.run()
    run.folder.fail("the end")
    assert (run.folder.path / "adapter" / "README.md").is_file()


def test_a_card_that_cannot_be_written_fails_no_run(
    federation: MakeFederation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = federation("ab", "e", "federation.rounds=1")
    run.run()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("server.run_folder.add_card", full)
    run.folder.finish()
    assert "adapter has no model card ([Errno 28] No space left on device); `edgelam export" in capsys.readouterr().out
    assert run.events("run_done")


def test_a_card_is_of_the_run_file(tiny: ModelSource) -> None:
    config: RunConfig = run_config(tiny.name, "strategy.aggregation=krum", "model.base=int8")
    text = model_card(config, PLAIN, [], "merged")
    assert "| combined by | krum |" in text
    assert "| frozen weights kept in | int8 |" in text
    assert ModelCard(text).data.to_dict()["base_model_relation"] == "finetune"
