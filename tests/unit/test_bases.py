from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from edgelam_fl.errors import EnvironmentProblem, ModelError
from edgelam_fl.model import bases
from edgelam_fl.model.quantized import Nf4Linear
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Span, load_stages


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What one test finds out about the machine must not reach the next."""
    bases.base_problem.cache_clear()
    yield
    bases.base_problem.cache_clear()


def test_every_base_runs_where_the_tests_do() -> None:
    assert bases.usable_bases() == ("fp32", "bf16", "int8", "nf4")


@pytest.mark.parametrize(
    ("base", "compute", "dtype"),
    [
        ("fp32", "", torch.float32),
        ("bf16", "", torch.bfloat16),
        ("int8", "", torch.float32),
        ("nf4", "", torch.float32),
        ("int8", "bfloat16", torch.bfloat16),
        ("nf4", "float32", torch.float32),
    ],
)
def test_what_is_computed_in(base: str, compute: str, dtype: torch.dtype) -> None:
    assert bases.compute_dtype(base, compute) == dtype


@pytest.mark.parametrize(
    ("base", "compute", "says"),
    [
        ("fp32", "bfloat16", "base fp32 cannot be computed in 'bfloat16', only in float32"),
        ("int8", "fp16", "base int8 cannot be computed in 'fp16', only in float32 or bfloat16"),
        ("int4", "", "base 'int4' is unknown; model.base takes fp32, bf16, int8, nf4"),
    ],
)
def test_a_pair_that_there_is_not(base: str, compute: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        bases.compute_dtype(base, compute)


def missing(*_: Any) -> Any:
    raise ImportError("No module named 'bitsandbytes'")


def not_built(*_: Any) -> Any:
    raise RuntimeError("no kernel image")


def wrong(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return x @ torch.ones(shape).t().to(x.dtype)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (missing, "a package is missing"),
        (not_built, "its kernel does not run"),
        (wrong, "its kernel for float32 gives wrong numbers"),
    ],
)
def test_a_base_whose_kernel_fails_is_not_offered(
    tiny: ModelSource, monkeypatch: pytest.MonkeyPatch, kernel: Any, reason: str
) -> None:
    monkeypatch.setattr(Nf4Linear, "product", staticmethod(kernel))
    assert bases.usable_bases() == ("fp32", "bf16", "int8")
    with pytest.raises(EnvironmentProblem, match=rf"base nf4 .*{reason}.*fp32, bf16, int8; `edgelam doctor`"):
        load_stages(tiny, [Span(0, 1)], "nf4", None)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_slices_quantized_weights_are_the_whole_models(tiny: ModelSource, base: str, compute: str) -> None:
    lora = LoraSettings(8, 16.0, ("all-linear",))
    (whole,) = load_stages(tiny, [Span(0, 6, embed=True, head=True)], base, lora, compute)
    (part,) = load_stages(tiny, [Span(2, 4)], base, lora, compute)
    assert part.dtype == bases.DTYPE[compute]
    of_whole = {name: tensor for name, tensor in whole.model.state_dict().items() if "lora_" not in name}
    of_part = {name: tensor for name, tensor in part.model.state_dict().items() if "lora_" not in name}
    assert len(of_part) == 2 * (7 * 2 + 2)  # layers; matrices with their scales, norms
    assert all(torch.equal(tensor, of_whole[name]) for name, tensor in of_part.items())
    assert {p.dtype for p in part.adapter_parameters.values()} == {torch.float32}
