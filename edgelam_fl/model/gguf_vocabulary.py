"""Writes a tokenizer of transformers as the tokenizer.* keys of a GGUF file: `gguf_tokenizer` the other way round.

A GGUF file names how text is cut into words (tokenizer.ggml.pre) instead of saying it. The name is found by trying: the keys are
read again, as llama.cpp reads them, and must give the ids of the original for texts that tell all known ways apart. Knows no
weights and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.gguf_tokenizer import CONTROL, CUTS, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary

_UNUSED, _BYTE = 5, 6  # values of tokenizer.ggml.token_type
_ROLES = {
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "unk_token_id": "unknown_token_id", "pad_token_id": "padding_token_id",
}  # fmt: skip
_MORE_ENDS = ("eot_token_id", "eom_token_id")
# Tells apart all ways to cut words that `gguf_tokenizer` knows: cases, digits in rows, contractions, runs of spaces and line ends,
# signs, other scripts.
_PROBES = (
    "Hello world, it's 3 o'clock: WE'RE 12345 and 1234567.89 strong!\n\n\n  def f(x):\n\treturn x**2  # ok\r\n",
    "camelCaseWords HTTPServer naïve Ĥello ÀÉÎ über\u00a0straße   \n  end  ",
    "这是一个测试 2024年 日本語のテキスト 한국어 Привет мир مرحبا 123 नमस्ते",
    "😀👍🏽 e-mail: a.b@c.de/f?g=1&h=2 -> [x]{y}<z> 'quoted' \"double\" ... ___ --- === $100 50% #tag",
    "I'll they'd I'M YOU'LL can't 'tis   three   spaces \t tabs\t\tend\n",
    " leading and trailing ",
    "",
)


def vocabulary_keys(tokenizer: Any, architecture: str, rows: int, ends: Collection[int], name: str) -> dict[str, Any]:
    """Returns the keys of a tokenizer of transformers.

    architecture: llama.cpp's name; rows: of the table of tokens, which may have more than the tokenizer; ends: ids of the tokens
    that end an answer; name: the model's, for messages. Raises ConfigError for a tokenizer that llama.cpp has no name for.
    """
    for keys in _candidates(tokenizer, rows, ends, name):
        if _reads_the_same(tokenizer, keys, architecture, name):
            return keys
    raise ConfigError(
        f"the tokenizer of {name} cuts text in a way that GGUF files have no name for here, so llama.cpp would make other tokens of it. "
        f"`--to merged` writes a folder for transformers; llama.cpp's convert_hf_to_gguf.py may know the tokenizer"
    )


def _candidates(tokenizer: Any, rows: int, ends: Collection[int], name: str) -> Iterator[dict[str, Any]]:
    """Yields the keys that the tokenizer could have, each with another way to cut words or to begin a text."""
    model = _model(tokenizer, name)
    common = {**_tokens(tokenizer, rows), **_special(tokenizer, ends), **_templates(tokenizer)}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    if not merges:
        raise ConfigError(f"the tokenizer of {name} has no merges, without which llama.cpp reads no vocabulary")
    if model.get("byte_fallback"):
        scores = _scores(merges, common["tokenizer.ggml.tokens"])
        spaced = {
            **common,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
        }
        for prefix in (True, False):
            yield {**spaced, "tokenizer.ggml.add_space_prefix": prefix}
        return
    tried = []
    for pre, cut in CUTS.items():
        if cut not in tried and cut.ignore_merges == bool(model.get("ignore_merges")):
            tried.append(cut)
            yield {**common, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def _model(tokenizer: Any, name: str) -> Mapping[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model: Mapping[str, Any] = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE":
        raise ConfigError(
            f"the tokenizer of {name} is of the kind {model.get('type')!r}; a GGUF file is written of byte pair encodings alone. "
            f"`--to merged` writes a folder for transformers"
        )
    return model


def _tokens(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Returns all tokens with their types; rows of the table that no token has get one that never comes."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    count = max(rows, max(by_id) + 1)
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(count)]
    types = [NORMAL if number in by_id else _UNUSED for number in range(count)]
    for number, token in by_id.items():
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = _BYTE
    for number, added in tokenizer.added_tokens_decoder.items():
        types[number] = CONTROL if added.special else USER_DEFINED
    if tokenizer.unk_token_id is not None and types[tokenizer.unk_token_id] == NORMAL:
        types[tokenizer.unk_token_id] = UNKNOWN
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}


def _special(tokenizer: Any, ends: Collection[int]) -> dict[str, Any]:
    found = {f"tokenizer.ggml.{key}": getattr(tokenizer, role) for role, key in _ROLES.items()}
    own = tokenizer.eos_token_id
    more = zip(_MORE_ENDS, sorted(set(ends) - {own}), strict=False)
    found |= {f"tokenizer.ggml.{key}": number for key, number in more}
    plain, marked = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    found["tokenizer.ggml.add_bos_token"] = len(marked) > len(plain) and marked[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = len(marked) > len(plain) and marked[-1] == own
    return {key: value for key, value in found.items() if value is not None}


def _templates(tokenizer: Any) -> dict[str, Any]:
    template = tokenizer.chat_template
    if not isinstance(template, Mapping):
        return {"tokenizer.chat_template": template} if template else {}
    named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
    found = {"tokenizer.chat_template": template["default"]} if "default" in template else {}
    return {**found, **named, **({"tokenizer.chat_templates": sorted(template.keys() - {"default"})} if named else {})}


def _scores(merges: list[str], tokens: list[str]) -> list[float]:
    """Returns scores in the order of the merges, earlier ones higher: SentencePiece puts together what gives the highest."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank[token] + 1) if token in rank else 0.0 for token in tokens]


def _reads_the_same(tokenizer: Any, keys: Mapping[str, Any], architecture: str, name: str) -> bool:
    try:
        back = Vocabulary(keys, architecture, name).tokenizer()
    except ModelError as error:
        raise ConfigError(f"the tokenizer of {name} has no place in a GGUF file: {error}") from error
    texts = [*_PROBES, *_with_special(tokenizer)]
    if keys["tokenizer.ggml.model"] == "gpt2" and any(
        _words(tokenizer, text) != _words(back, text) for text in _PROBES
    ):
        return False  # whatever its own merges make of that
    return all(
        back(text, add_special_tokens=marked)["input_ids"] == tokenizer(text, add_special_tokens=marked)["input_ids"]
        for text in texts
        for marked in (False, True)
    )


def _words(tokenizer: Any, text: str) -> list[str]:
    """Returns the words that a tokenizer cuts a text into before it merges."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    cut = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer is not None else [(text, None)]
    return [word for word, _ in cut]


def _with_special(tokenizer: Any) -> list[str]:
    """Returns texts with tokens that match whole, as templates write them."""
    added = [each.content for each in tokenizer.added_tokens_decoder.values()]
    return [f"{token}user\nHello there{token}" for token in added[:8]]
