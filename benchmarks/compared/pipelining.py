"""torch.distributed.pipelining over gloo: two stages in a process each, one forward and one backward in turn (Schedule1F1B)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.compared.load import Load, loss_over_all, tokens_of
from benchmarks.compared.workers import Trains
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.stage import Stage

ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo"}  # read when the group is made


def pipelining(load: Load, rank: int, meeting: Path, cut: int) -> tuple[Trains, None]:
    """Trains layers [0, cut) as rank 0 and the rest with the head as rank 1, on one thread. `meeting`: a file by which they find each other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    layers, batches = load.source.num_layers, load.batches()
    (stage,) = load.stages(Span(0, cut, embed=True) if rank == 0 else Span(cut, layers, head=True))
    pieces, part = len(batches[0]), _Part(stage)
    rows, tokens = batches[0][0].shape
    hidden = torch.zeros(rows, tokens, load.source.hidden_size, dtype=stage.dtype, requires_grad=True)
    example = torch.zeros(rows, tokens, dtype=torch.long) if rank == 0 else hidden
    made = part(example).detach().requires_grad_(True)  # outputs that need no gradient would get none back
    device = torch.device("cpu")
    pipe = PipelineStage(part, rank, 2, device, input_args=(example,), output_args=(made,))
    labels = 1  # of the batch that is trained

    def loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        return loss_over_all(logits_BTV, labels_BT) / labels

    schedule = Schedule1F1B(pipe, pieces, loss_fn=loss, scale_grads=False)
    optimizer = load.optimizer([parameter for parameter in part.parameters() if parameter.requires_grad])

    def trains(number: int) -> int:
        nonlocal labels
        units = batches[number % len(batches)]
        labels = sum(unit.count for unit in units)
        if rank == 0:
            schedule.step(torch.cat([unit.inputs for unit in units]))
        else:
            schedule.step(target=torch.cat([unit.labels for unit in units]), losses=[])
        optimizer.step()
        optimizer.zero_grad()
        return tokens_of(units)

    return trains, None


class _Part(torch.nn.Module):
    """A stage whose rows are all full."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.stage(inputs, [inputs.shape[1]] * inputs.shape[0])
