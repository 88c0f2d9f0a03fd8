"""The formats that frozen weights are kept in and computed in, and which of them this machine can use.

fp32 and bf16 weights are computed as they are kept. int8 and nf4 are for the matrices inside the layers and are computed in fp32
or bf16; embedding, norms, biases and head are kept in the format that is computed in.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from edgelam_fl.errors import EnvironmentProblem, ModelError
from edgelam_fl.model.base_names import BASES, COMPUTES
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


def usable_bases() -> tuple[str, ...]:
    """Lists the bases that this machine can compute with, after a run of the kernels of each."""
    return tuple(base for base in BASES if not base_problem(base))


def require_base(base: str) -> None:
    """Raises EnvironmentProblem if this machine cannot compute with a base."""
    problem = base_problem(base)
    if problem:
        raise EnvironmentProblem(
            f"base {base} cannot be used on this machine: {problem}. Here model.base can be "
            f"{', '.join(usable_bases())}; `edgelam doctor` tests each one and suggests fixes",
            f"base {base} cannot be used on this machine; `edgelam doctor` there says why",
        )


@cache
def base_problem(base: str) -> str:
    """Says why the base cannot be used here; empty if forward and backward of a small matrix are right."""
    try:
        for compute in COMPUTES[base]:
            if not _computes(base, DTYPE[compute]):
                return f"its kernel for {compute} gives wrong numbers"
    except ImportError as error:
        return f"a package is missing ({error})"
    except (RuntimeError, OSError, AttributeError) as error:  # a kernel that was not built for this machine
        return f"its kernel does not run ({error})"
    return ""


@torch.enable_grad()  # even if the first caller only evaluates
def _computes(base: str, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(1)
    plain = nn.Linear(96, 40, bias=False, dtype=torch.float32).requires_grad_(False)
    plain.weight.copy_(torch.randn(40, 96, generator=generator))
    tried: nn.Module = QUANTIZED[base].from_weight(plain.weight) if base in QUANTIZED else nn.Linear(96, 40, bias=False)
    if base not in QUANTIZED:
        tried.load_state_dict(plain.state_dict())
        tried.to(dtype).requires_grad_(False)
    x = torch.randn(3, 96, generator=generator)
    inputs = [x.clone().requires_grad_(), x.to(dtype).requires_grad_()]
    outputs = [plain(inputs[0]), tried(inputs[1])]
    for output in outputs:
        output.backward(torch.ones_like(output))
    pairs = [[output.detach() for output in outputs], [each.grad for each in inputs]]
    # nf4 is the coarsest: a relative error of 0.09. A wrong kernel is off by more than the numbers themselves.
    return all(float((got.float() - want).norm()) < 0.2 * float(want.norm()) for want, got in pairs)
