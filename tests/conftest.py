"""Fixtures for all folders: a tiny random Llama with a byte tokenizer, and data files."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from edgelam_fl.model.source import ModelSource, find_model
from tests.support import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 layers in Hugging Face's layout, with a byte-level tokenizer and a chat template."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> ModelSource:
    return find_model(str(tiny_folder))


@pytest.fixture(scope="session")
def smollm() -> ModelSource:
    """The real model; its GGUF is unpacked into the user's cache once."""
    return find_model("smollm2-135m")


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three devices' data: different words, different answer lengths, so that label counts are unequal."""
    folder = tmp_path_factory.mktemp("data")
    files = []
    for device in range(3):
        lines = [
            {"question": f"What is {device}.{n}?", "answer": f"It is {'word ' * (device * 3 + n % 4 + 1)}number {n}."}
            for n in range(24 + 7 * device)
        ]
        file = folder / f"device-{device + 1}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        files.append(file)
    return files
