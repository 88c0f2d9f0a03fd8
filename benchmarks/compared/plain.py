"""Plain transformers and peft in one process: what training costs that is not split."""

from __future__ import annotations

import torch

from benchmarks.compared.load import Load, loss_over_all, tokens_of
from benchmarks.compared.workers import Trains
from tests.fleet import forward


def plain(load: Load, threads: int) -> tuple[Trains, None]:
    """Trains one device's batches in the micro-batches of the load's settings."""
    torch.set_num_threads(threads)
    model, batches = load.peft_model(), load.batches()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    optimizer = load.optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])

    def trains(number: int) -> int:
        units = batches[number % len(batches)]
        labels = sum(unit.count for unit in units)
        for unit in units:
            (loss_over_all(forward(model, unit), unit.labels) / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return tokens_of(units)

    return trains, None
