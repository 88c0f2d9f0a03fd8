"""Model folders as people have them: each feature is read as transformers reads it, or refused by name where the model is looked up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgelam_fl.errors import ModelError
from edgelam_fl.model.folder import INDEX, WEIGHTS
from edgelam_fl.model.source import find_model
from edgelam_fl.model.whole import load_whole
from tests.support import write_tiny_llama

Change = Callable[[Path], None]
IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("plain"), layers=2, tied=False)


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(plain, tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(str(folder))
    return str(caught.value)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def ours(folder: Path) -> torch.Tensor:
    return logits(load_whole(find_model(str(folder)), "fp32"))


def transformers_own(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


# ---------------------------------------------------------------- which files are the model


def shard(folder: Path, parts: int = 2) -> list[Path]:
    """Cuts model.safetensors into files with an index, as save_pretrained does with large models."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{number + 1:05}-of-{parts:05}.safetensors" for number in range(parts)]
    weight_map = {tensor: names[number % parts] for number, tensor in enumerate(sorted(tensors))}
    for name in names:
        own = {tensor: tensors[tensor] for tensor, file in weight_map.items() if file == name}
        save_file(own, folder / name, metadata={"format": "pt"})
    write_index(folder, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return [folder / name for name in names]


def write_index(folder: Path, index: Any) -> None:
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def edit_map(folder: Path, **changed: Any) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] |= changed
    write_index(folder, index)


def with_noise(folder: Path, name: str, prefix: str = "") -> None:
    """Writes a file with random weights of the same names."""
    noise = {prefix + tensor: torch.randn_like(values) for tensor, values in load_file(folder / WEIGHTS).items()}
    save_file(noise, folder / name, metadata={"format": "pt"})


def sharded_with_a_backup(folder: Path) -> None:
    with_noise(folder, "pretrained_backup.safetensors")
    shard(folder)


def one_file_with_strays(folder: Path) -> None:
    for name in ("consolidated.safetensors", "optimizer.safetensors", "model.fp16.safetensors", "z.safetensors"):
        with_noise(folder, name)
    with_noise(folder, "adapter_model.safetensors", "base_model.")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    (folder / "optimizer.pt").write_bytes(b"not looked at")
    (folder / "training_args.bin").write_bytes(b"not looked at")
    shutil.copytree(folder, folder / "checkpoint-20")


def two_sets(folder: Path) -> None:
    """transformers takes the single file."""
    with_noise(folder, "whole.safetensors")
    shard(folder)
    (folder / "whole.safetensors").rename(folder / WEIGHTS)


def a_file_that_config_names(folder: Path) -> None:
    with_noise(folder, "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")


def edit_config(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changed
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


READ_LAYOUTS: list[Change] = [sharded_with_a_backup, one_file_with_strays, two_sets, a_file_that_config_names]


@pytest.mark.parametrize("change", READ_LAYOUTS, ids=lambda change: change.__name__)
def test_a_layout_that_is_read(folder: Path, change: Change) -> None:
    change(folder)
    assert torch.equal(ours(folder), transformers_own(folder))


def lost_shard(folder: Path) -> None:
    shard(folder, 4)[1].unlink()


def tensor_in_another_file(folder: Path) -> None:
    shard(folder)
    edit_map(folder, **{"lm_head.weight": "model-00002-of-00002.safetensors"})


def tensor_in_no_file(folder: Path) -> None:
    shard(folder)
    edit_map(folder, **{"model.layers.9.mlp.up_proj.weight": "model-00002-of-00002.safetensors"})


def file_outside(folder: Path) -> None:
    shard(folder)
    edit_map(folder, **{"lm_head.weight": "../model-00001-of-00002.safetensors"})


def index_without_map(folder: Path) -> None:
    shard(folder)
    write_index(folder, {"metadata": {}})


def index_cut_short(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).write_text('{"metadata": {"total_size": 1}, "weight_map": {"lm_head', encoding="utf-8")


def index_that_is_a_list(folder: Path) -> None:
    shard(folder)
    write_index(folder, ["model-00001-of-00002.safetensors"])


def shards_without_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()


def download_cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8"
    )


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def only_an_adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}', encoding="utf-8")


def only_another_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")


def config_cut_short(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla', encoding="utf-8")


REFUSED_LAYOUTS: list[tuple[Change, tuple[str, ...]]] = [
    (lost_shard, ("model-00002-of-00004.safetensors", "3 of 4 files are here")),
    (tensor_in_another_file, ("lm_head.weight", "model-00001-of-00002", "model-00002-of-00002", "Fetch the folder")),
    (tensor_in_no_file, ("model.layers.9.mlp.up_proj.weight", "model-00002-of-00002.safetensors")),
    (file_outside, (INDEX, "'../model-00001-of-00002.safetensors'")),
    (index_without_map, (INDEX, "weight_map")),
    (index_cut_short, (INDEX, "cannot be read as JSON")),
    (index_that_is_a_list, (INDEX, "one JSON object")),
    (shards_without_index, ("model-00001-of-00002.safetensors", f"Fetch {INDEX}")),
    (download_cut_short, (WEIGHTS, "not a whole safetensors file", "Fetch it again")),
    (lfs_pointer, (WEIGHTS, "git lfs pull")),
    (only_pickles, ("pytorch_model.bin", "save_pretrained")),
    (only_an_adapter, ("adapter_config.json", "org/base", "merge_and_unload")),
    (only_another_name, ("consolidated.safetensors", f"rename it to {WEIGHTS}")),
    (config_cut_short, ("config.json", "cannot be read as JSON")),
]


@pytest.mark.parametrize(("change", "words"), REFUSED_LAYOUTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_layout_that_is_refused(folder: Path, change: Change, words: tuple[str, ...]) -> None:
    change(folder)
    text = refusal(folder)
    assert all(word in text for word in words), text
