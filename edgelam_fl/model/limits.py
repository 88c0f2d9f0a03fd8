"""Holds a run file against the sizes of a model: its positions, and the rows of its table of tokens. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ModelError
from edgelam_fl.files import cache_folder, write_atomically
from edgelam_fl.model.folder import read_json
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.model.understood import rope_kinds, rope_parameters

_TABLES = ("wpe.weight", "position_embeddings.weight")  # ends of the names of learned tables of positions
_ORIGINAL = "original_max_position_embeddings"
_PHI3 = 4096  # what transformers takes for a Phi-3 that does not say it
_SETTINGS = "tokenizer_config.json"
_READER = 2  # raised when the same files get another answer
_NO_TEXT = ("image_token", "audio_token", "video_token")  # in it: they stand for no text, and need no row


@dataclass(frozen=True)
class Positions:
    """How long a text may be for a model, and what limits it."""

    most: int
    why: str
    way_out: str = ""  # beside a shorter text


def positions_of(source: ModelSource) -> Positions | None:
    """Returns the longest text of a model, in tokens; None if its config.json does not say."""
    config = source.config
    for name, entry in source.index.items():
        if name.endswith(_TABLES):
            return Positions(entry.shape[0], f"its table of positions, which was learned, has {entry.shape[0]} rows")
    if "longrope" in rope_kinds(config):
        given = [each.get(_ORIGINAL) for each in (config, *rope_parameters(config))]
        default = _PHI3 if config.get("model_type") == "phi3" else config.get("max_position_embeddings")
        original = next((each for each in given if each), default)
        if original:
            return Positions(
                int(original),
                f"its rotary positions (longrope, {_ORIGINAL} = {original}) are other numbers for longer texts, "
                f"so the rows of a batch would change each other",
            )
    most = config.get("max_position_embeddings")
    if not isinstance(most, int):
        return None
    way_out = "a model that was made for longer texts, or config.json with rope_parameters (linear, yarn, llama3) and more positions"
    return Positions(most, f"it was made for {most} positions (max_position_embeddings in config.json)", way_out)


def check_limits(config: RunConfig, source: ModelSource) -> None:
    """Raises ModelError if texts of a run, or tokens of the tokenizer, go beyond what the model has numbers for.

    `check_tokens` is a part of it that needs no run file. A network of our own has neither.
    """
    if source.is_network:
        return
    asked, positions = config.task.max_tokens, positions_of(source)
    if positions is not None and asked > positions.most:
        way_out = f"; or {positions.way_out}" if positions.way_out else ""
        raise ModelError(
            f"task.max_tokens = {asked} is more than {source.name} can take: {positions.why}. Allowed: task.max_tokens of at most "
            f"{positions.most}{way_out}"
        )
    check_tokens(source)


def check_tokens(source: ModelSource) -> None:
    """Raises ModelError if the tokenizer, or a file of the model, names tokens for which the model has no numbers."""
    rows = source.index[f"{source.family.body}.{source.family.embed}.weight"].shape[0]
    for file, key, number in _named_ids(source.folder):
        if number >= rows:
            raise ModelError(
                f"{key} = {number} in {source.folder / file} is outside the model's table of tokens, which has {rows} rows (ids 0 to "
                f"{rows - 1}). Set the id of a token that the model has"
            )
    token, number = last_token(source)
    if number >= rows:
        raise ModelError(
            f"the tokenizer of {source.name} gives {token!r} the id {number}, and the model's table of tokens has {rows} rows (ids 0 to "
            f"{rows - 1}). Use the tokenizer that belongs to the model, or enlarge the table in transformers "
            f"(model.resize_token_embeddings(len(tokenizer))) and save both"
        )


def _named_ids(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yields file, key and id of the tokens that begin, end and pad a text by config.json and generation_config.json."""
    for file in ("config.json", "generation_config.json"):
        values = _json(folder / file)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = values.get(key)
            for number in given if isinstance(given, list) else [given]:
                if type(number) is int:
                    yield file, key, number


def last_token(source: ModelSource) -> tuple[str, int]:
    """Returns the token with the highest id, and the id. Raises ModelError for a tokenizer that transformers cannot load.

    The answer is kept in the cache folder by the model's digest, since transformers takes seconds.
    """
    key = hashlib.sha256(f"{_READER} {version('transformers')} {source.digest}".encode()).hexdigest()
    note = cache_folder() / "tokenizers" / f"{key[:32]}.json"
    try:
        token, number = json.loads(note.read_text(encoding="utf-8"))
        return str(token), int(number)
    except (OSError, ValueError, TypeError):  # absent, or cut off by a power failure
        last = _last_token(source.folder)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(last))
    return last


def _last_token(folder: Path) -> tuple[str, int]:
    settings = _json(folder / _SETTINGS)
    try:
        vocabulary = load_tokenizer(folder).get_vocab()
    except Exception as error:
        own = settings.get("auto_map")
        what = f"it brings code of its own, which is not run (auto_map in {_SETTINGS})" if own else _said(error)
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded: {what}. Fetch its files again, or save them as transformers does "
            f"(AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER), which writes tokenizer.json)"
        ) from error
    places = [place for place in (settings, settings.get("extra_special_tokens")) if isinstance(place, dict)]
    idle = {_content(place.get(key)) for place in places for key in _NO_TEXT}
    known = ((token, number) for token, number in vocabulary.items() if token not in idle)
    return max(known, key=lambda pair: pair[1], default=("", -1))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _content(token: Any) -> str:
    """Returns a token as text; config files write it as text or as an object."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _json(file: Path) -> dict[str, Any]:
    """Returns what a file holds, empty if it is absent."""
    return read_json(file) if file.is_file() else {}
