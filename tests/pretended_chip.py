"""A chip that nobody has: its tensors compute on the CPU, and meet no tensor that was not brought to them.

It finds what a machine without an accelerator would hide: a tensor that was left behind, one that was made in the wrong place, one that
is read without being brought back. Its rules are a GPU's, and one more: an index must be on the chip too. Whoever names `CHIP` has it,
on any thread. PyTorch's device for compilers, "lazy", lends its name, since nothing else here uses it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

CHIP = torch.device("lazy", 0)
_COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)  # what may see tensors of both chips


class OnChip(torch.Tensor):
    """A tensor on the chip. `lent` is what computes in its place."""

    lent: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, lent: torch.Tensor) -> OnChip:
        made: OnChip = torch.Tensor._make_wrapper_subclass(
            cls, lent.shape, strides=lent.stride(), storage_offset=lent.storage_offset(), dtype=lent.dtype, device=CHIP
        )
        made.lent = lent
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        _check(op, tree_leaves((args, kwargs)))
        goes_to = kwargs.get("device") or CHIP
        result = op(*tree_map(_lent, args), **tree_map(_lent, kwargs))
        if op._schema.is_mutable:  # with `out` or in place: the tensor that was given
            return args[0] if isinstance(args[0], torch.Tensor) else kwargs.get("out", result)
        return tree_map(_on_chip, result) if goes_to.type == CHIP.type else result


def _check(op: Any, given: list[Any]) -> None:
    """Raises RuntimeError if tensors of both chips meet. A number in a tensor without dimensions may be anywhere."""
    elsewhere = [one for one in given if isinstance(one, torch.Tensor) and not isinstance(one, OnChip) and one.dim()]
    if elsewhere and op.overloadpacket not in _COPIES:
        raise RuntimeError(f"{op}: a tensor {list(elsewhere[0].shape)} was not brought to {CHIP}")


def _lent(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.lent if isinstance(value, OnChip) else value


def _on_chip(value: Any) -> Any:
    return OnChip(value) if isinstance(value, torch.Tensor) else value


def _empty(size: Any, *_: Any, dtype: Any = None, **__: Any) -> torch.Tensor:
    return OnChip(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return OnChip(torch.empty_strided(size, stride, dtype=dtype))


def _eye(size: int, *_: Any, dtype: Any = None, **__: Any) -> torch.Tensor:
    return OnChip(torch.eye(size, dtype=dtype))


def _copy_from(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _lent(to).copy_(_lent(source))
    return to


_KERNELS = torch.library.Library("aten", "IMPL")  # kept: the kernels go with it
_KERNELS.impl("empty.memory_format", _empty, "Lazy")
_KERNELS.impl("empty_strided", _empty_strided, "Lazy")
_KERNELS.impl("eye", _eye, "Lazy")
_KERNELS.impl("_copy_from", _copy_from, "Lazy")
vars(torch)["lazy"] = SimpleNamespace()  # torch's checkpointing looks for the module of the chip's kind
