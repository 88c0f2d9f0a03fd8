"""One device of a host's group: what the host keeps of it in a round, and the checks of what it sends.

Nothing here computes or sends; `split.host` does. Shapes: rows, tokens, hidden.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link

Gradients = list[torch.Tensor | None]


@dataclass
class Member:
    """One device of the group, as its host sees it."""

    route: pb.Route
    upstream: Link | None = None  # to the device's front, or to the host before
    downstream: Link | None = None  # to the device's back, or to the host after
    table: list[pb.StepRow] | None = None
    forwards: deque[Frame] = field(default_factory=deque)
    saved: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )  # unit: input, output
    gradients: Gradients | None = None  # accumulated over the open step's micro-batches
    backwards_done: int = 0
    problem: str = ""  # why the open step cannot count this device
    late_steps: int = 0
    leaving: str = ""  # why nothing more comes from it; the coordinator may still count what came before
    gone: str = ""  # why this device is out of the round
    done: bool = False

    @property
    def index(self) -> int:
        return self.route.device_index

    @property
    def present(self) -> bool:
        return self.upstream is not None and self.downstream is not None and not self.gone

    @property
    def active(self) -> bool:
        return self.present and not self.done


def unit_rows(plan: pb.Plan) -> int:
    """The most rows that a micro-batch of the plan has."""
    return -(-plan.batch_size // plan.micro_batches)


def checked_table(table: pb.Table, member: Member, plan: pb.Plan) -> list[pb.StepRow]:
    """The rows of a TABLE. Raises ProtocolError where they do not fit the plan."""
    if len(table.steps) != plan.steps or member.table is not None:
        raise ProtocolError(f"a TABLE of {len(table.steps)} steps; the plan has {plan.steps}, once")
    for row in table.steps:
        if not 1 <= len(row.rows) <= plan.micro_batches or sum(row.rows) > plan.batch_size:
            raise ProtocolError(f"a TABLE row of {len(row.rows)} micro-batches with {sum(row.rows)} rows")
        if row.labels > plan.batch_size * plan.task.max_tokens:
            raise ProtocolError(f"a TABLE row of {row.labels} labels, more than the batch has tokens")
    return list(table.steps)


def check_activation(frame: Frame, member: Member, plan: pb.Plan, hidden_size: int, dtype: torch.dtype) -> None:
    """Raises ProtocolError where hidden states do not fit the model, the plan or the member's window."""
    header, tensor = frame.header, frame.tensor
    if tensor is None or tensor.dim() != 3 or tensor.shape[2] != hidden_size or tensor.dtype != dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ProtocolError(f"hidden states must be {dtype} [rows, tokens, {hidden_size}], got {got}")
    rows, tokens, _ = tensor.shape
    if not (1 <= rows <= unit_rows(plan) and 1 <= tokens <= plan.task.max_tokens):
        raise ProtocolError(
            f"hidden states of {rows} rows of {tokens} tokens; the plan allows 1 to {unit_rows(plan)} rows of 1 to "
            f"{plan.task.max_tokens}"
        )
    if len(header.row_lengths) != rows or not all(1 <= length <= tokens for length in header.row_lengths):
        raise ProtocolError(f"row lengths {list(header.row_lengths)[:8]} do not fit {rows} rows of {tokens} tokens")
    if len(member.forwards) + len(member.saved) >= plan.window:
        raise ProtocolError(f"more than {plan.window} micro-batches in flight (split.window)")


def gradient_problem(grad: torch.Tensor | None, output: torch.Tensor) -> str:
    """Why a gradient cannot be used; empty if it can."""
    if grad is None or grad.shape != output.shape or grad.dtype != output.dtype:
        return "a gradient of another shape or dtype than the activation"
    if not torch.isfinite(grad).all():
        return "a gradient that is not finite"
    return ""
