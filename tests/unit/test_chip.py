from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edgelam_fl.cli.main import app, exit_code
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.machine import check_chip, memory_free_bytes
from edgelam_fl.model import bases
from edgelam_fl.model.chip import CPU, chip_free_bytes, chips_here, find_chip, has_own_memory, off, onto
from tests.pretended_chip import CHIP

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("asked", ["auto", "cpu", "cuda", "cuda:3", "mps", "xpu", "xpu:1"])
def test_words_that_name_a_chip(asked: str) -> None:
    check_chip(asked)


@pytest.mark.parametrize("asked", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "auto:1", "mps:0", "meta"])
def test_other_words_are_refused_with_those_that_do(asked: str) -> None:
    with pytest.raises(ConfigError, match=f"--device '{asked}' is no chip.*allowed: auto, cpu, cuda"):
        check_chip(asked)


@pytest.mark.parametrize("asked", ["cuda:7", "mps", "xpu"])
def test_a_chip_that_is_not_here_is_refused_with_those_that_are(asked: str) -> None:
    if torch.device(asked).type in {chip.type for chip in chips_here()} and asked != "cuda:7":
        pytest.skip(f"{asked} is here")
    with pytest.raises(EnvironmentProblem, match=f"--device {asked}: there is none.*Here are: cpu") as refused:
        find_chip(asked)
    assert refused.value.for_others() == f"its --device {asked} is not there"


@pytest.mark.parametrize("command", [["client"], ["chat", "run"], ["doctor"]], ids=" ".join)
def test_commands_refuse_other_words_before_anything_starts(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(app, "edgelam", [*command, "--device", "gpu"]) == 2
    assert "--device 'gpu' is no chip" in " ".join(capsys.readouterr().err.split())


def test_the_cpu_needs_no_words() -> None:
    assert bases.working_chip("cpu") == (CPU, "")


@pytest.fixture
def broken_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is found, and for which this torch has no kernels."""
    monkeypatch.setattr(bases, "find_chip", lambda asked: GPU)
    monkeypatch.setattr(bases, "chip_name", lambda chip: "a GPU")
    monkeypatch.setattr(bases, "base_problem", lambda base, chip: "its kernel does not run (no kernel image)")


@pytest.mark.usefixtures("broken_gpu")
def test_a_chip_that_is_found_and_does_not_compute() -> None:
    """Asked for by name, it is refused at once; left to the node, the node takes its CPU and says why."""
    with pytest.raises(
        EnvironmentProblem, match=r"--device cuda:0 \(a GPU\): PyTorch .* cannot compute on it: .*no kernel image"
    ):
        bases.working_chip("cuda")
    chip, words = bases.working_chip("auto")
    assert chip == CPU
    assert words.startswith("computes on its CPU. --device cuda:0")


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch, *, integrated: bool) -> None:
    figures: dict[str, Any] = {
        "get_device_properties": lambda chip: SimpleNamespace(is_integrated=int(integrated)),
        "mem_get_info": lambda chip: (1000, 9000), "memory_reserved": lambda chip: 300, "memory_allocated": lambda chip: 100,
    }  # fmt: skip
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, figure)


def test_a_gpus_own_memory_counts_with_what_torch_keeps_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_cuda(monkeypatch, integrated=False)
    assert has_own_memory(GPU)
    assert chip_free_bytes(GPU) == 1000 + 300 - 100


def test_memory_that_gpu_and_cpu_share_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson's driver calls its GPU integrated; what it has free is the machine's, which the system knows better."""
    _pretend_cuda(monkeypatch, integrated=True)
    assert not has_own_memory(GPU)
    assert chip_free_bytes(GPU) == pytest.approx(memory_free_bytes(), rel=0.5)


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.zeros(2, requires_grad=True)
    assert onto(tensor, CPU) is tensor
    assert off(tensor) is tensor


def test_gradients_come_back_to_where_the_tensor_was() -> None:
    here = torch.ones(2, requires_grad=True)
    there = onto(here, CHIP)
    assert there.device == CHIP
    back = off(there * 3)
    assert back.device == CPU
    back.sum().backward()
    assert here.grad is not None
    assert (here.grad.device, here.grad.tolist()) == (CPU, [3.0, 3.0])


def test_the_pretended_chip_finds_a_tensor_that_was_left_behind() -> None:
    there, here = onto(torch.ones(2), CHIP), torch.ones(2)
    with pytest.raises(RuntimeError, match="not brought to lazy:0"):
        there + here
    with pytest.raises(RuntimeError, match="not brought to lazy:0"):
        there[torch.tensor([0])]
    with pytest.raises(RuntimeError, match="not supported"):
        there.numpy()
    assert off(there + torch.tensor(1.0)).tolist() == [2.0, 2.0], "a number without dimensions may be anywhere"
