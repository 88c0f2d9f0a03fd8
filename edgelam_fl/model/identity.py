"""Says which files a model consists of and what they are together: the weights, config, tokenizer, template and ends of answers.

What depends on the whole model goes by `ModelIdentity.digest`: plans, slices in memory, token ids. What depends on the numbers
alone goes by `weights_digest`: converted weights, speeds, hidden states. Imports no torch; knows no architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgelam_fl.files import FileState, cache_folder, is_settled, state_of, write_atomically
from edgelam_fl.model.folder import INDEX, WEIGHTS
from edgelam_fl.model.generation import GENERATION

CONFIG = "config.json"
ALL_WEIGHTS = "weights"  # stands for all files with tensors
_READER = "GGUF reader"  # stands for config and tokenizer of a GGUF file: what its reader makes of it
_TOKENS = (  # what turns a text into ids; a model has some of them
    "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_TEXT = (*_TOKENS, "tokenizer_config.json", "chat_template.jinja", "chat_template.json", GENERATION)
MORE_TEMPLATES = "additional_chat_templates"  # a folder: transformers takes tool_use.jinja if a chat has tools


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What a model is: the SHA-256 of each of its files, by name."""

    files: Mapping[str, str]
    """By the file's name in its folder; all tensors are one entry, "weights". A GGUF file is that entry, and one for its reader."""
    weights_digest: str
    """SHA-256 of the weights and config.json, in the form that older versions gave to a whole model."""
    watched: tuple[Path, ...] = ()
    """The files behind it, also those that could be there and are not; none for a model whose files are elsewhere."""
    state: tuple[FileState, ...] = field(default=(), compare=False)
    """The state of each watched file before it was read."""
    settled: bool = field(default=True, compare=False)
    """Whether every later write changes the state."""

    @property
    def digest(self) -> str:
        """The identity as one SHA-256."""
        return digest_of(self.files)

    @property
    def leakage_key(self) -> str:
        """What a measurement of leakage is kept under: the weights, and the tokenizer if it has files of its own."""
        return leakage_key(self.weights_digest, self.files)

    def unpacked(self) -> ModelIdentity:
        """Returns the identity of a model whose tensors are unpacked when they are read.

        Under the plain digest, caches here and on nodes may hold what versions made that took packed numbers as they are.
        """
        unpacked = hashlib.sha256(f"unpacked {self.weights_digest}".encode()).hexdigest()
        return replace(self, weights_digest=unpacked)

    def may_have_changed(self) -> bool:
        """Returns whether some file may differ from what was read; looks at names, sizes, times and inodes alone."""
        return not self.settled or self.state != tuple(map(state_of, self.watched))


def digest_of(files: Mapping[str, str]) -> str:
    """Returns the identity of a model with these files."""
    return hashlib.sha256("".join(f"{name}\0{sha}\n" for name, sha in sorted(files.items())).encode()).hexdigest()


def leakage_key(weights_digest: str, files: Mapping[str, str]) -> str:
    """Returns what leakage is measured for: WEIGHTS or WEIGHTS:TOKENIZER, as SHA-256 each."""
    tokens = "".join(f"{name}\0{files[name]}\n" for name in _TOKENS if name in files)
    return f"{weights_digest}:{hashlib.sha256(tokens.encode()).hexdigest()}" if tokens else weights_digest


def difference(here: Mapping[str, str], right: Mapping[str, str]) -> str:
    """Says which files of a model here are not the right ones, as a half-sentence; "" if all are."""
    found = {
        "not the same": [name for name in here.keys() & right.keys() if here[name] != right[name]],
        "missing here": right.keys() - here.keys(),
        "here alone": here.keys() - right.keys(),
    }
    return ", ".join(
        f"{_listed(sorted(names))} {'is' if len(names) == 1 else 'are'} {what}"
        for what, names in found.items()
        if names
    )


def of_gguf(path: Path, reader: int) -> ModelIdentity:
    """Returns the identity of a GGUF file, which holds config and tokenizer too, as this version of the reader sees it."""
    state = (state_of(path),)
    settled, digest = all(map(is_settled, state)), file_digest(path)
    files = {ALL_WEIGHTS: digest, _READER: hashlib.sha256(str(reader).encode()).hexdigest()}
    return ModelIdentity(files=files, weights_digest=digest, watched=(path,), state=state, settled=settled)


def of_folder(folder: Path, weights: Sequence[Path]) -> ModelIdentity:
    """Returns the identity of a model folder, whose tensors are in the files `weights`."""
    known = [folder / name for name in (WEIGHTS, INDEX, CONFIG, *_TEXT, MORE_TEMPLATES)]
    watched = tuple(dict.fromkeys([*weights, *known]))
    state = tuple(map(state_of, watched))
    settled = all(map(is_settled, state))
    shards = [file_digest(file) for file in weights]
    with_config = hashlib.sha256((folder / CONFIG).read_bytes())
    for shard in shards:
        with_config.update(shard.encode())
    files = {name: file_digest(folder / name) for name in (CONFIG, *text_files(folder))}
    files[ALL_WEIGHTS] = shards[0] if len(shards) == 1 else hashlib.sha256("".join(shards).encode()).hexdigest()
    return ModelIdentity(
        files=files, weights_digest=with_config.hexdigest(), watched=watched, state=state, settled=settled
    )


def text_files(folder: Path) -> list[str]:
    """Lists the files of a model that say how text becomes ids and where an answer ends, by their names below the folder."""
    names = [name for name in _TEXT if (folder / name).is_file()]
    return names + [f"{MORE_TEMPLATES}/{file.name}" for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]


def listed_files(identity: Mapping[str, str]) -> set[str]:
    """Returns the names of the small files that an identity is made of; none for a GGUF file, which has none."""
    return set() if _READER in identity else identity.keys() - {ALL_WEIGHTS}


def is_text_file(name: str) -> bool:
    """Returns whether a file of this name would count among `text_files`."""
    where, _, last = name.rpartition("/")
    return name in _TEXT or (where == MORE_TEMPLATES and last.endswith(".jinja") and not last.startswith("."))


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, cached by its path and state: hashing gigabytes at every start takes long.

    A file that was written moments ago is not cached, as it may be written again without another time.
    """
    before = state_of(path)
    key = hashlib.sha256(f"{path}\0{before}".encode()).hexdigest()[:24]
    note = cache_folder() / "digests" / key
    if is_settled(before) and note.is_file():
        return note.read_text(encoding="ascii")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if is_settled(before) and state_of(path) == before:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, digest)
    return digest


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
