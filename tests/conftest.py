"""Fixtures for all folders (a tiny random Llama with a byte tokenizer, data files), and how two workers share the tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process: federations and workers side by side fill the cores

import pytest

from edgelam_fl.model.source import ModelSource, find_model
from tests.support import run_folder, write_data_files, write_tiny_llama

run_folder()  # made before the workers start, which inherit its name


def _of_integration(*names: str) -> list[str]:
    return [f"tests/integration/test_{name}.py" for name in names]


_BENCHMARKS = "tests/integration/test_benchmarks.py"


def _smokes(*names: str) -> list[str]:
    return [f"{_BENCHMARKS}::test_smoke[{name}]" for name in names]


# What `make test` gives to one worker, because its tests share something that is slow to make: a process of transformers and peft
# alone; a federation, and the run that many of its tests look at; the template from which processes are forked, for whole runs of
# this machine and for stage hosts. Of benchmarks each test is a unit; else each file is one.
_SHARED = {
    "federation": _of_integration(
        "one_run",
        "privacy_tap",
        "strangers",
        "flwr_by_hand",
        "chat_route",
        "slices",
        "report_browser",
        "relay",
        "resume",  # restarts its server
        "lost_device",
        "two_runs",
        "benchmark_links",
        "chaos",
    ),
    "elsewhere": [  # a process of transformers and peft alone
        *_of_integration("smollm2", "exported_kinds"),
        *_smokes("lora_kinds"),
    ],
    "runs": [
        *_of_integration("commands", "beam_demo", "examples", "values_run", "no_foreign_code"),
        *_smokes("classification", "lowrank", "slices"),
    ],
    "stage hosts": [
        "tests/parity/test_grpc_processes.py",
        "tests/parity/test_small_buffers.py",
        "tests/unit/test_template.py",
        *_smokes(
            "commits", "compute", "encryption", "exactness", "flapping", "floods", "fuzz", "memory", "paced", "pacing",
            "refusals", "scale", "side_by_side", "soak",
        ),
    ],
}  # fmt: skip
_FIRST = [
    *_SHARED["elsewhere"],
    *_SHARED["federation"],
    *_SHARED["runs"],
    *_SHARED["stage hosts"],
    "tests/integration/",
    "tests/parity/",
]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects no garbage while tests are imported, and never looks at what that made: a million objects, which all stay, and
    each full collection would take half a second for them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that no worker is left alone with one at the end."""
    items.sort(
        key=lambda item: next((n for n, begin in enumerate(_FIRST) if item.nodeid.startswith(begin)), len(_FIRST))
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class BySharedParts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            own = nodeid if file == _BENCHMARKS else file
            return next((name for name, members in _SHARED.items() if own in members), own)

    config.option.loadscopereorder = False
    return BySharedParts(config, log)


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
    return write_data_files(tmp_path_factory.mktemp("data"))
