"""Says which weights a result was trained on, for people who load it elsewhere. Reads no weights; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.model.gguf_header import read_header
from edgelam_fl.model.identity import ALL_WEIGHTS
from edgelam_fl.model.source import BUILT_IN, ModelSource

CARD = "README.md"  # of a model's folder: its card, whose first lines may name the licence
_PLAIN = {"F64", "F32", "F16", "BF16"}  # element types of GGUF that are numbers as they are
_HEAD = re.compile(r"---\r?\n(.*?)\n---", re.DOTALL)  # of a card: YAML
_NAMED = re.compile(r"^(license|license_name):[ \t]*(?:\r?\n[ \t]*-[ \t]*)?[\"']?([\w.+-]+)", re.MULTILINE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


@dataclass(frozen=True)
class TrainedOn:
    """The base model of a result as it lay on the machine of the run."""

    name: str
    """What others call it: its name on the model hub, else that of its folder or file, without the path to it."""
    is_public: bool
    """Whether `name` is one on the model hub."""
    file: str
    """Name of its GGUF file; "": it is a folder."""
    quantized: str
    """What its weights are stored as, such as "Q4_1" or "fp8"; "": they are no rounded copy."""
    digest: str
    """SHA-256 of the weights, as in base_model.json of the run."""
    licence: str
    """As the model's own files name it, such as "apache-2.0"; "": they name none."""

    @property
    def is_rounded_copy(self) -> bool:
        """Returns whether the weights that `name` stands for elsewhere are others than those that were trained on."""
        return self.is_public and bool(self.file and self.quantized)

    @property
    def in_words(self) -> str:
        """Names the weights in half a sentence."""
        stored = f" (stored as {self.quantized})" if self.quantized else ""
        copy = f", a rounded copy of {self.name}" if self.is_rounded_copy else ""
        unpacked = ", unpacked to plain numbers" if self.quantized else ""
        return f"the weights of {self.file or self.name}{stored}{copy}{unpacked}; SHA-256 {self.digest}"

    def as_json(self) -> dict[str, str]:
        """Returns the same for adapter_config.json, without what is empty."""
        told = {"model": self.name, "file": self.file, "stored_as": self.quantized, "sha256": self.digest}
        return {key: value for key, value in told.items() if value}


def trained_on(source: ModelSource) -> TrainedOn:
    """Returns what others need to know about a model that was found here."""
    is_path = source.reference.startswith("/")
    return TrainedOn(
        name=Path(source.reference).name if is_path else source.reference,
        is_public=not (is_path or source.is_network) and _HUB_NAME.fullmatch(source.reference) is not None,
        file=source.gguf.name if source.gguf is not None else "",
        quantized=_quantized(source),
        digest=source.files[ALL_WEIGHTS],
        licence=_licence(source),
    )


def _quantized(source: ModelSource) -> str:
    stored = [part for entry in source.index.values() for part in entry.stored]
    if source.gguf is not None:
        kinds = {part.stored_type for part in stored} - _PLAIN
    else:
        kinds = {part.packing.kind for part in stored if part.packing is not None}
    return ", ".join(sorted(kinds))


def _licence(source: ModelSource) -> str:
    """Returns the licence that the model's card or GGUF file names, else that of a built-in model's publisher."""
    if source.gguf is not None:
        named = str(read_header(source.gguf).keys.get("general.license") or "")
    else:
        named = _of_card(source)
    return named or (BUILT_IN[source.name].licence if source.name in BUILT_IN else "")


def _of_card(source: ModelSource) -> str:
    try:
        text = (source.folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    head = _HEAD.match(text)
    named = dict(_NAMED.findall(head[1])) if head else {}
    return named.get("license_name", "other") if named.get("license") == "other" else named.get("license", "")
