"""Loads the tokenizer of a model's folder. Imports no torch, and transformers only when it is called; knows no weights.

transformers 5 makes some tokenizers anew from their tokens and merges alone, by the model's type or by the class that
tokenizer_config.json names. Another way to cut texts into words, which tokenizer.json holds, is then lost in silence, and tokens
of that class are added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Lower case, and judged from its middle on: tokenizer_config.json may rightly change cases and the space before a text.
_PROBE = "the device keeps the data, and the other 12345 of 6789 words don't leave it:\n\nthey're here!\nso it is 2024"


def load_tokenizer(folder: Path) -> Any:
    """Returns transformers' tokenizer of a folder, as tokenizer.json has it if transformers' class for it is another one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if type(made) is PreTrainedTokenizerFast or not (folder / "tokenizer.json").is_file():
        return made
    stored = PreTrainedTokenizerFast.from_pretrained(folder)
    added = made.get_vocab().keys() - stored.get_vocab().keys()
    return stored if added or _second_half(made) != _second_half(stored) else made


def _second_half(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return ids[len(ids) // 2 :]
