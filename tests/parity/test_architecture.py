"""docs/architecture.md names the files on the way of an activation: one is followed over real gRPC, file by file."""

from __future__ import annotations

import re
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.service import StageHost
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import Frame
from tests.fleet import Fleet, check_done
from tests.support import run_config

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
LIBRARY = str(ROOT / "edgelam_fl") + "/"
MOST_FILES = 8
NEEDLE_ELEMENTS = 16  # the last of an activation: they depend on the whole text


class Follower:
    """A profile function that notes which files of the library get the first activation that a link is given.

    A file gets it if one of its functions is called with the activation as an argument: as a tensor, in a frame, or as
    bytes. The file that called `Link.send` comes first; `Host._forward` is the end.
    """

    def __init__(self) -> None:
        self.files: list[str] = []
        self.arrived = threading.Event()
        self._needle: torch.Tensor | None = None
        self._bytes = b""
        self._lock = threading.RLock()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or self.arrived.is_set() or not code.co_filename.startswith(LIBRARY):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = [frame.f_locals[name] for name in names if name != "self"]
        with self._lock:
            if self._needle is None and code.co_name == "send" and code.co_filename.endswith("wire/link.py"):
                self._begin(frame, arguments)
            if self._needle is not None and any(self._carries(argument) for argument in arguments):
                self._note(frame)
                if code.co_qualname == "Host._forward":
                    self.arrived.set()

    def _begin(self, frame: FrameType, arguments: list[Any]) -> None:
        header, tensor = arguments
        if header.kind == pb.ACT:
            self._needle = tensor.detach().flatten()[-NEEDLE_ELEMENTS:].clone()
            self._bytes = struct.pack(f"<{NEEDLE_ELEMENTS}f", *self._needle.tolist())
            assert frame.f_back is not None
            self._note(frame.f_back)

    def _note(self, frame: FrameType) -> None:
        file = str(Path(frame.f_code.co_filename).relative_to(ROOT))
        if file not in self.files:
            self.files.append(file)

    def _carries(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            end = value.detach().flatten()[-NEEDLE_ELEMENTS:]
            return end.dtype == torch.float32 and torch.equal(end, self._needle)
        if isinstance(value, Frame):
            return value.tensor is not None and self._carries(value.tensor)
        if isinstance(value, bytes | bytearray | memoryview):
            return self._bytes in bytes(value)
        return isinstance(value, list | tuple) and any(self._carries(item) for item in value)


@contextmanager
def followed() -> Iterator[Follower]:
    """Follows in this thread and in all that start inside the block."""
    follower = Follower()
    before = sys.getprofile(), threading.getprofile()
    threading.setprofile(follower)
    sys.setprofile(follower)
    try:
        yield follower
    finally:
        sys.setprofile(before[0])
        threading.setprofile(before[1])


def named_files(section: str) -> list[str]:
    """Returns the files of a section's numbered list, in order."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", text, re.MULTILINE)


def test_an_activation_passes_the_files_that_the_page_names(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name, "federation.batch_size=1", "split.micro_batches=1")
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, config.run.seed)
    with followed() as follower:
        host = StageHost("edge-1", dial, lambda event: None)
        device = StageHost("device-1", dial, lambda event: None, examples=DeviceExamples(data_files[0]))
        door = DataPlaneServer("127.0.0.1", 0, host.admit)
        fleet = Fleet(tiny, config, {"device-1": device}, {"edge-1": (host, f"127.0.0.1:{door.port}")})
        try:
            check_done(fleet.run(start, 1))
        finally:
            door.stop()
    assert follower.arrived.is_set()
    assert follower.files == named_files("The way of an activation")
    assert len(follower.files) <= MOST_FILES


@pytest.mark.parametrize("section", ["The way of an activation", "A round"])
def test_the_page_names_files_that_exist(section: str) -> None:
    files = named_files(section)
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_page_has_a_row_for_each_package() -> None:
    rows = re.findall(r"^\| `(\w+)/?` ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    packages = {path.parent.name for path in (ROOT / "edgelam_fl").glob("*/__init__.py")}
    assert packages <= set(rows)
    assert {row for row in rows if not any((ROOT / folder / row).is_dir() for folder in (".", "edgelam_fl"))} == set()
