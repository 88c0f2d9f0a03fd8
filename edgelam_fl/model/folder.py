"""Decides which files of a model's folder are the model, and reads their headers. Imports no torch; knows no architecture.

As in transformers, `model.safetensors` alone is the model, else the files that `model.safetensors.index.json` names. Other
files beside them (copies, adapters, states of optimizers, `consolidated.safetensors`) never count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgelam_fl.errors import ModelError
from edgelam_fl.model.index import TensorEntry, safetensors_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHOSEN = "transformers_weights"  # key of config.json that names another file or index
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_FORMATS = (*_PICKLED, ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_SHOWN = 5  # of a list of names in a message


class FilesMissing(ModelError):
    """A folder that lacks weights which it should have."""


def read_json(file: Path) -> dict[str, Any]:
    """Reads a file of a model that holds one JSON object. Raises ModelError with its path for anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}. Fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold one JSON object and holds a {type(value).__name__}. Fetch the file again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json. Raises ModelError with the way out for a folder that has none."""
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json) and no model: it has no config.json. Set model.name to its base model "
            f"({base}), or merge the two with peft (merge_and_unload) and save the result"
        )
    names = [entry.name for entry in folder.iterdir()]
    way_out = ". It is a hub's cache: set model.name to a folder below snapshots" if "snapshots" in names else ""
    raise ModelError(
        f"model folder {folder} must hold config.json and {WEIGHTS} (or {INDEX} and its files); it has no config.json and holds "
        f"{listed(names)}{way_out}"
    )


def stored_tensors(folder: Path, config: Mapping[str, Any]) -> tuple[list[Path], dict[str, TensorEntry]]:
    """Returns the files that are the model's weights, and each tensor in them by its stored name.

    Raises ModelError for a file that is named and not here or not whole, and for tensors that are not where the index says.
    """
    chosen = _chosen_file(folder, config)
    if chosen.name.endswith(".json"):
        return _sharded(folder, chosen)
    return [chosen], dict(_tensors(chosen))


def _chosen_file(folder: Path, config: Mapping[str, Any]) -> Path:
    """Returns the file with all weights, or the index of several, by transformers' order."""
    named = config.get(_CHOSEN)
    if named is not None:
        file = folder / str(named)
        if file.parent != folder or not file.name.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(
                f"config.json of {folder} has {_CHOSEN} = {named!r}; allowed: a *.safetensors file or a *.safetensors.index.json of this folder"
            )
        if not file.is_file():
            raise ModelError(f"{file.name} is named by {_CHOSEN} of config.json and is not in {folder}. Fetch it")
        return file
    for file in (folder / WEIGHTS, folder / INDEX):
        if file.is_file():
            return file
    raise FilesMissing(_without_weights(folder))


def _without_weights(folder: Path) -> str:
    """Says what a folder without a usable set of weights holds instead, and the way out."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.exists())
    lacks = f"model folder {folder} must hold {WEIGHTS} or {INDEX} beside config.json and has neither"
    if (folder / WEIGHTS).is_symlink():
        return f"{lacks}: {WEIGHTS} is a link to a file that is gone, {(folder / WEIGHTS).readlink()}. Fetch the folder again"
    tensors = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names and all(name.startswith("adapter_") for name in tensors):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"{lacks}: it holds an adapter (adapter_config.json) without its base model. Set model.name to the base ({base}), or "
            f"merge the two with peft (merge_and_unload) and save the result"
        )
    shards = [name for name in tensors if "-of-" in name]
    if shards:
        return (
            f"{lacks}, but parts of a set ({listed(shards)}). Fetch {INDEX} too: it says which file holds which tensor"
        )
    if tensors:
        return f"{lacks}, but {listed(tensors)}, which transformers would not load either. If one of them is the whole model, rename it to {WEIGHTS}"
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return (
            f"{lacks}, but {listed(pickled)}: pickled files can run code when they are read, and are not. Save the model as "
            f"safetensors: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    others = [name for name in names if name.endswith(_OTHER_FORMATS)]
    if others:
        return f"{lacks}, but {listed(others)}. Fetch the safetensors files, or set model.name to a .gguf file itself"
    return f"{lacks}; it holds {listed(names)}"


def _sharded(folder: Path, index: Path) -> tuple[list[Path], dict[str, TensorEntry]]:
    weight_map = _weight_map(index)
    files = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FilesMissing(
            f"{listed(absent)}: named by {index.name} and not in {folder} ({len(files) - len(absent)} of {len(files)} files are here). "
            f"Fetch what is missing"
        )
    stored: dict[str, TensorEntry] = {}
    for file in files:
        for tensor, entry in _tensors(file):
            if weight_map.get(tensor, file.name) != file.name or tensor in stored:
                other = weight_map.get(tensor) or Path(stored[tensor].file).name
                raise ModelError(
                    f"{tensor} is in {file.name}, and {index.name} of {folder} or another file says {other}: the files are of two sets. "
                    f"Fetch the folder again"
                )
            stored[tensor] = entry
    missing = sorted(weight_map.keys() - stored.keys())
    if missing:
        raise ModelError(
            f"{index.name} of {folder} says that {weight_map[missing[0]]} holds {missing[0]}, which it does not ({len(missing)} such "
            f"tensors). Fetch the folder again"
        )
    return files, stored


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map, which says which file holds which tensor. Fetch the file again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index} puts {tensor} into {file!r}; allowed: a *.safetensors file of the same folder. Fetch the file again"
            )
    return weight_map


def _tensors(file: Path) -> Iterator[tuple[str, TensorEntry]]:
    header = {tensor: info for tensor, info in safetensors_header(file).items() if tensor != "__metadata__"}
    begin = file.stat().st_size - max((info["data_offsets"][1] for info in header.values()), default=0)
    for tensor, info in header.items():
        first, last = info["data_offsets"]
        yield tensor, TensorEntry(tuple(info["shape"]), str(file), tensor, info["dtype"], begin + first, last - first)


def listed(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return f"{', '.join(every[:_SHOWN]) or 'nothing'}{more}"
