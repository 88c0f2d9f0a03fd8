"""The chip that a node computes on, its CPU or an accelerator: which ones are here, their memory, and the way to them and back.

Whatever arrives in frames or goes into them is a tensor in the CPU's memory. `onto` and `off` bring tensors to the chip and back;
on the CPU both return the tensor itself. Knows no layers and no plans. Neighbour: `model.bases` tries a chip's kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.machine import CHIPS, check_chip, memory_free_bytes, peak_rss_bytes

CPU = torch.device("cpu")


# ---------------------------------------------------------------- which


def find_chip(asked: str) -> torch.device:
    """Returns the chip that `asked` names, as --device does: "cpu", "cuda", "cuda:1", "mps" or "xpu"; "auto" is accelerate's choice.

    Raises ConfigError for another word, EnvironmentProblem, with the chips that are here, for one that is not.
    """
    check_chip(asked)
    if asked == "auto":
        return _default()
    chip = torch.device(asked)
    here = chips_here()
    if chip.type != "cpu" and chip.index is None:
        chip = torch.device(chip.type, 0)
    if chip not in here:
        names = ", ".join(f"{one} ({chip_name(one)})" for one in here)
        raise EnvironmentProblem(
            f"--device {asked}: there is none that PyTorch {torch.__version__} can use. Here are: {names}. `edgelam doctor` says what is missing",
            f"its --device {asked} is not there",
        )
    return chip


def _default() -> torch.device:
    from accelerate import PartialState

    found = PartialState().default_device
    chip = torch.device(found.type, 0)
    return chip if chip in chips_here() else CPU


def chips_here() -> list[torch.device]:
    """Lists the chips that PyTorch finds on this machine, the CPU first."""
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
    }
    assert {"auto", "cpu", *counts} == set(CHIPS)
    return [CPU, *(torch.device(kind, number) for kind, count in counts.items() for number in range(count))]


def chip_name(chip: torch.device) -> str:
    """Returns what the chip's driver calls it; for the CPU its kind of machine."""
    match chip.type:
        case "cuda":
            return torch.cuda.get_device_name(chip)
        case "xpu":
            return str(torch.xpu.get_device_name(chip))
        case "mps":
            return "Apple GPU"
    return os.uname().machine


# ---------------------------------------------------------------- there and back


def onto(tensor: torch.Tensor, chip: torch.device) -> torch.Tensor:
    """Returns the tensor on the chip: itself if it is there. Its gradient comes back to where the tensor was."""
    return tensor if tensor.device == chip else _Carried.apply(tensor, chip)


def off(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in the CPU's memory: itself if it is there. The gradient that it gets goes to the tensor's own chip."""
    return onto(tensor, CPU)


class _Carried(torch.autograd.Function):
    """A copy on another chip."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, chip: torch.device) -> torch.Tensor:
        ctx.home = tensor.device
        return _copied(tensor, chip)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return _copied(grad, ctx.home), None


def _copied(tensor: torch.Tensor, chip: torch.device) -> torch.Tensor:
    if chip.type == "cuda":
        return _to_cuda(tensor, chip)
    return _from_cuda(tensor) if tensor.device.type == "cuda" else tensor.to(chip)


def _to_cuda(tensor: torch.Tensor, chip: torch.device) -> torch.Tensor:
    """Copies to the chip by pinned memory, on a stream of its own; what computes next waits for it there, and this thread does not.

    torch keeps pinned blocks for the next copies, and reuses one only after the copy out of it is over.
    """
    computing, copying = torch.cuda.current_stream(chip), _copies(chip)
    pinned = tensor.pin_memory()
    with torch.cuda.stream(copying):
        arrived = pinned.to(chip, non_blocking=True)
    computing.wait_stream(copying)
    arrived.record_stream(computing)
    return arrived


def _from_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """Copies to pinned memory, on a stream of its own, and waits for this copy alone."""
    chip = tensor.device
    computing, copying = torch.cuda.current_stream(chip), _copies(chip)
    arrived = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copying.wait_stream(computing)
    with torch.cuda.stream(copying):
        arrived.copy_(tensor, non_blocking=True)
        over = copying.record_event()
    tensor.record_stream(copying)
    over.synchronize()
    return arrived


@cache
def _copies(chip: torch.device) -> torch.cuda.Stream:
    """Returns the stream of all copies to and from a chip."""
    return torch.cuda.Stream(chip)


def finish(chip: torch.device) -> None:
    """Waits until the chip has computed all that it was given; a clock that is read before says nothing."""
    if chip.type != "cpu":
        torch.accelerator.synchronize(chip)


# ---------------------------------------------------------------- memory


def chip_free_bytes(chip: torch.device) -> int:
    """Returns how much memory weights and activations can take.

    Of a chip that has memory of its own, that memory, with what torch keeps there for reuse. Of a chip that computes in the machine's
    memory, as a Jetson's or Apple's does, what the machine and the control groups leave: the chip's own figure is about the same
    bytes, and on a Jetson leaves out pages that the system would give back.
    """
    if not has_own_memory(chip):
        return memory_free_bytes()
    kind = torch.get_device_module(chip)
    kept = kind.memory_reserved(chip) - kind.memory_allocated(chip)
    return int(kind.mem_get_info(chip)[0] + kept)


def has_own_memory(chip: torch.device) -> bool:
    """Returns whether the chip has memory beside the machine's, by what its driver says of it."""
    match chip.type:
        case "cuda":
            return not torch.cuda.get_device_properties(chip).is_integrated
        case "xpu":
            return not getattr(torch.xpu.get_device_properties(chip), "is_integrated_gpu", False)
    return False


def peak_bytes(chip: torch.device) -> int:
    """Returns the most memory that this process has held so far: resident, and on a chip what torch took there.

    What CUDA or XPU take is not resident memory of the process, even where it is the machine's.
    """
    if chip.type not in ("cuda", "xpu"):
        return peak_rss_bytes()
    return peak_rss_bytes() + int(torch.get_device_module(chip).max_memory_reserved(chip))


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Computes with kernels that give the same bits each time while the block runs; slower, for tests of exactness.

    On CUDA the first such block has to begin before anything is computed there: cuBLAS reads its setting once. A kernel that has no
    such form raises RuntimeError.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    cuda.enable_flash_sdp(False)  # attention step by step: its fused backward passes add in no fixed order
    cuda.enable_mem_efficient_sdp(False)
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_flash_sdp(fused[0])
        cuda.enable_mem_efficient_sdp(fused[1])
        cuda.enable_cudnn_sdp(fused[2])
        torch.use_deterministic_algorithms(strict)
