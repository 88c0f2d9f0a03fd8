from __future__ import annotations

import pytest
import torch

from edgelam_fl.model.modules import NoPositions, TaskHead, UnitDropout, UnitSeed

ONES = torch.ones(40, 50)


def dropped(name: str, value: int | None, share: float = 0.3) -> torch.Tensor:
    seed = UnitSeed()
    with seed.set_to(value):
        return UnitDropout(share, name, seed)(ONES)


def test_a_mask_is_a_function_of_seed_and_name() -> None:
    mask = dropped("layers.1.q_proj", 5)
    torch.manual_seed(0)  # the process's own generator plays no part
    assert torch.equal(dropped("layers.1.q_proj", 5), mask)
    assert not torch.equal(dropped("layers.1.v_proj", 5), mask)
    assert not torch.equal(dropped("layers.1.q_proj", 6), mask)
    assert torch.equal(dropped("layers.1.q_proj", None), ONES)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_what_stays_is_scaled_so_that_the_mean_stays(share: float) -> None:
    mask = dropped("x", 1, share)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - share)).item()}
    deviation = (share * (1 - share) / ONES.numel()) ** 0.5
    assert abs((mask == 0).float().mean().item() - share) < 4 * deviation


def test_the_seed_is_as_before_after_an_error() -> None:
    seed = UnitSeed()
    with seed.set_to(1):
        with pytest.raises(ValueError, match="inside"), seed.set_to(2):
            raise ValueError("inside")
        assert seed.value == 1
    assert seed.value is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_positions_change_neither_values_nor_dtype(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 3, 4).to(dtype)
    with_positions = hidden + NoPositions()(torch.arange(3))
    assert with_positions.dtype == dtype
    assert torch.equal(with_positions, hidden)


def test_a_task_head_computes_in_its_own_dtype() -> None:
    head = TaskHead(4, 3)
    logits = head(torch.ones(2, 4, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(torch.ones(2, 4)))
