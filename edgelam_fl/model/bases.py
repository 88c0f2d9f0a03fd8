"""The formats that frozen weights are kept in and computed in, and which of them a chip of this machine can use.

fp32 and bf16 weights are computed as they are kept. int8 and nf4 are for the matrices inside the layers and are computed in fp32
or bf16; embedding, norms, biases and head are kept in the format that is computed in.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from edgelam_fl.errors import EnvironmentProblem, ModelError
from edgelam_fl.model.base_names import BASES, COMPUTES
from edgelam_fl.model.chip import CPU, chip_name, find_chip
from edgelam_fl.model.quantized import QUANTIZED

DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(base: str, compute: str = "") -> torch.dtype:
    """Returns the dtype that a base is computed in: `compute`, or the base's first one. Raises ModelError for a wrong pair."""
    if base not in COMPUTES:
        raise ModelError(f"base {base!r} is unknown; model.base takes {', '.join(BASES)}")
    if (compute or COMPUTES[base][0]) not in COMPUTES[base]:
        raise ModelError(
            f"base {base} cannot be computed in {compute!r}, only in {' or '.join(COMPUTES[base])}: set model.base or "
            "model.compute"
        )
    return DTYPE[compute or COMPUTES[base][0]]


def usable_bases(chip: torch.device = CPU) -> tuple[str, ...]:
    """Lists the bases that a chip of this machine can compute with, after a run of the kernels of each."""
    return tuple(base for base in BASES if not base_problem(base, chip))


def require_base(base: str, chip: torch.device = CPU) -> None:
    """Raises EnvironmentProblem if a chip of this machine cannot compute with a base."""
    problem = base_problem(base, chip)
    if problem:
        where = "this machine" if chip == CPU else f"{chip} of this machine"
        raise EnvironmentProblem(
            f"base {base} cannot be used on {where}: {problem}. Here model.base can be "
            f"{', '.join(usable_bases(chip))}; `edgelam doctor` tests each one and suggests fixes",
            f"base {base} cannot be used on this machine; `edgelam doctor` there says why",
        )


def require_kernels(chip: torch.device) -> None:
    """Raises EnvironmentProblem if not even a plain matrix can be computed on a chip, forward and backward.

    Builds of torch that were made for other chips are imported, find the chip, and fail here.
    """
    problem = base_problem("fp32", chip)
    if problem:
        raise EnvironmentProblem(
            f"--device {chip} ({chip_name(chip)}): PyTorch {torch.__version__} finds it and cannot compute on it: {problem}. Install a "
            f"build of torch for this chip, or start with --device cpu",
            f"its --device {chip.type} is there and does not compute",
        )


def working_chip(asked: str) -> tuple[torch.device, str]:
    """Returns the chip that `asked` names, as --device does, after a run of its kernels, and what is to be said of it.

    "": it is the CPU. Of "auto", an accelerator whose kernels do not run is left alone, and the words say why. Raises
    EnvironmentProblem for a chip that was asked for by name and is not here, or does not compute.
    """
    chip = find_chip(asked)
    if chip == CPU:
        return CPU, ""
    try:
        require_kernels(chip)
    except EnvironmentProblem as error:
        if asked != "auto":
            raise
        return CPU, f"computes on its CPU. {error}"
    return chip, f"computes on {chip}, {chip_name(chip)}"


@cache
def base_problem(base: str, chip: torch.device = CPU) -> str:
    """Says why the base cannot be used on a chip; empty if forward and backward of a small matrix are right."""
    try:
        for compute in COMPUTES[base]:
            if not _computes(base, DTYPE[compute], chip):
                return f"its kernel for {compute} gives wrong numbers"
    except ImportError as error:
        return f"a package is missing ({error})"
    except (RuntimeError, OSError, AttributeError) as error:  # a kernel that was not built for this machine
        return f"its kernel does not run ({' '.join(str(error).split())[:300]})"
    return ""


@torch.enable_grad()  # even if the first caller only evaluates
def _computes(base: str, dtype: torch.dtype, chip: torch.device) -> bool:
    generator = torch.Generator().manual_seed(1)
    plain = nn.Linear(96, 40, bias=False, dtype=torch.float32).requires_grad_(False)
    plain.weight.copy_(torch.randn(40, 96, generator=generator))
    tried: nn.Module = QUANTIZED[base].from_weight(plain.weight) if base in QUANTIZED else nn.Linear(96, 40, bias=False)
    if base not in QUANTIZED:
        tried.load_state_dict(plain.state_dict())
        tried.to(dtype).requires_grad_(False)
    tried.to(chip)
    x = torch.randn(3, 96, generator=generator)
    inputs = [x.clone().requires_grad_(), x.to(chip, dtype).requires_grad_()]
    outputs = [plain(inputs[0]), tried(inputs[1])]
    for output in outputs:
        output.backward(torch.ones_like(output))
    pairs = [[output.detach() for output in outputs], [each.grad for each in inputs]]
    # nf4 is the coarsest: a relative error of 0.09. A wrong kernel is off by more than the numbers themselves.
    return all(float((got.cpu().float() - want).norm()) < 0.2 * float(want.norm()) for want, got in pairs)
