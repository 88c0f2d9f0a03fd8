"""What ends an answer: all tokens that any of a model's files names, in chat, over the hub and in what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.errors import ModelError
from edgelam_fl.model.generation import stop_ids
from edgelam_fl.model.source import find_model
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import open_result
from tests.results import write_result
from tests.support import write_tiny_llama


def folder_of(folder: Path, **files: Any) -> Path:
    """Writes a folder of JSON files without a model; config.json is `config`, and so on."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def words(*tokens: str) -> dict[str, Any]:
    """Returns the part of a tokenizer.json that says which special token has which number."""
    return {"added_tokens": [{"id": number, "content": token} for number, token in enumerate(tokens)]}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"generation_config": {"eos_token_id": [1, 3]}, "config": {"eos_token_id": 1}}, {1, 3}),
        ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": [1, 2]}}, {1, 2, 3}),
        ({"generation_config": {"eos_token_id": None}, "config": {}}, set()),
        ({"config": {"eos_token_id": 7}}, {7}),
        ({"tokenizer": words("<s>", "</s>"), "tokenizer_config": {"eos_token": "</s>"}}, {1}),
        ({"tokenizer": words("<s>", "</s>"), "tokenizer_config": {"eos_token": {"content": "</s>"}}}, {1}),
        ({"tokenizer": words("<s>", "</s>"), "tokenizer_config": {"eos_token": None}}, set()),
        (
            {
                "tokenizer": words("<s>", "</s>"),
                "tokenizer_config": {"x": 1},
                "special_tokens_map": {"eos_token": "</s>"},
            },
            {1},
        ),
        (
            {
                "tokenizer": words("a", "b", "c"),
                "tokenizer_config": {"eos_token": "c"},
                "generation_config": {"eos_token_id": [1]},
            },
            {1, 2},
        ),
    ],
)
def test_every_file_is_asked(tmp_path: Path, files: dict[str, Any], wanted: set[int]) -> None:
    assert stop_ids(folder_of(tmp_path, **files)) == wanted


def test_an_end_that_only_the_tokenizers_class_knows(tmp_path: Path) -> None:
    """GPT-2's tokenizer_config.json names no end; its class does."""
    folder_of(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}, vocab={"a": 0, "<|endoftext|>": 1})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert stop_ids(tmp_path) == {1}


@pytest.mark.parametrize("ends", ["</s>", [1, "2"], True, 1.5])
def test_an_end_that_is_no_number(tmp_path: Path, ends: Any) -> None:
    folder_of(tmp_path, generation_config={"eos_token_id": ends})
    with pytest.raises(
        ModelError, match=r"generation_config\.json: eos_token_id = .* must be a whole number or a list"
    ):
        stop_ids(tmp_path)


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1')
    with pytest.raises(ModelError, match=r"generation_config\.json is not JSON"):
        stop_ids(tmp_path)


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}


def test_a_merged_model_keeps_its_settings_and_all_its_ends(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", layers=4)
    folder_of(folder, generation_config={**SAMPLING, "eos_token_id": [3, 5]})
    source = find_model(str(folder))
    assert source.stop_ids == {1, 3, 5}
    made, _ = export(open_result(write_result(tmp_path / "run", source)), "merged", None)
    written = json.loads((made / "generation_config.json").read_text())
    assert written == {**SAMPLING, "eos_token_id": [3, 5, 1]}, "the tokenizer's own end too: answers end with it here"
    assert find_model(str(made)).stop_ids == source.stop_ids
