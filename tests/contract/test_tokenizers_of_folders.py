"""The tokenizer of a folder is the one in its tokenizer.json, also if transformers makes another of its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from edgelam_fl.model.tokenizer import load_tokenizer
from tests.support import byte_tokenizer

TEXT = "the device keeps the data of 1234 users"


def spaces() -> Tokenizer:
    """Makes one whose tokens contain spaces, as SentencePiece has them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.train_from_iterator(
        [TEXT] * 9, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return tokenizer


def digits_by_threes() -> Tokenizer:
    """Makes one that cuts numbers as Llama 3's does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["</s>", *letters, "12", "123"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("12", "3")]))
    words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def written(folder: Path, tokenizer: Tokenizer, model_type: str, **settings: object) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("make", "model_type", "settings"),
    [
        (spaces, "qwen2", {}),
        (spaces, "gpt2", {"tokenizer_class": None}),
        (spaces, "gemma3_text", {"tokenizer_class": "GemmaTokenizer"}),
        (digits_by_threes, "qwen2", {}),
        (digits_by_threes, "qwen3", {"tokenizer_class": "Qwen2Tokenizer"}),
    ],
)
def test_ids_are_those_of_tokenizer_json(
    tmp_path: Path, make: Callable[[], Tokenizer], model_type: str, settings: dict[str, object]
) -> None:
    folder = written(tmp_path, make(), model_type, **settings)
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != wanted, "transformers has mended it"
    assert load_tokenizer(folder)(TEXT)["input_ids"] == wanted


def test_no_token_is_added_that_no_file_names(tmp_path: Path) -> None:
    """transformers' class of Qwen 2 adds <|endoftext|>, for which a table of just these tokens has no row."""
    tokenizer = byte_tokenizer()
    folder = written(tmp_path, tokenizer.backend_tokenizer, "qwen2")
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer) + 1
    assert len(load_tokenizer(folder)) == len(tokenizer)


def test_what_tokenizer_config_changes_is_kept(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "the": 5}))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    made = AutoTokenizer.from_pretrained(tmp_path)("The the")["input_ids"]
    assert load_tokenizer(tmp_path)("The the")["input_ids"] == made
