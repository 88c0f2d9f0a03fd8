"""The window of a host: the micro-batches per device that it has memory for.

Granted at READY for all routes at once or not at all (protocol section 4), so that an admitted micro-batch never waits for
memory. Knows sizes; knows no links.
"""

from __future__ import annotations

from edgelam_fl.model.memory import DoraBytes, loss_bytes, unit_bytes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.chain_memory import UNITS_SHARE
from edgelam_fl.plan.footprint import LEARNING_BYTES
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.reading import end_spans, kind_of, unit_rows
from edgelam_fl.split.workers import workers_of
from edgelam_fl.wire import edgelam_pb2 as pb


def affordable_window(plan: pb.Plan, source: ModelSource, itemsize: int, adapter_size: int, free_bytes: int) -> int:
    """Returns how many micro-batches per route fit into `free_bytes`, at most the plan's window; 0: not even one.

    `itemsize`: bytes per element computed with. `adapter_size`: elements of the hosted adapter.
    """
    unit = _unit_bytes(plan, source, plan.hosted.last - plan.hosted.first, itemsize)
    routes = len(plan.serves)
    kept = adapter_size * LEARNING_BYTES * routes + _hosted_loss_bytes(plan, source, itemsize)
    return max(0, min(plan.window, int((free_bytes * UNITS_SHARE - kept) // (unit * routes))))


def units_bytes(plan: pb.Plan, source: ModelSource, itemsize: int) -> int:
    """Returns the bytes of all micro-batches that a node may have under way, on its own route and for the routes that it serves."""
    needed = 0
    if plan.serves:
        unit = _unit_bytes(plan, source, plan.hosted.last - plan.hosted.first, itemsize)
        needed += len(plan.serves) * plan.window * unit + _hosted_loss_bytes(plan, source, itemsize)
    for span in end_spans(plan):
        units = plan.window if span.embed and not span.head else 1  # the rest of a route keeps one
        needed += units * _unit_bytes(plan, source, span.last - span.first, itemsize, head=span.head)
    return needed


def _unit_bytes(plan: pb.Plan, source: ModelSource, layers: int, itemsize: int, *, head: bool = False) -> int:
    if source.is_network:
        return 0  # what a network of our own keeps is small beside its process
    return unit_bytes(
        source.config, layers, unit_rows(plan), plan.task.max_tokens, itemsize, checkpointing=plan.checkpointing, head=head,
        all_linear=list(plan.lora.targets) == ["all-linear"],
        dora_bytes=DoraBytes.of(source, plan.lora.targets, kind_of(plan), itemsize).kept,
    )  # fmt: skip


def _hosted_loss_bytes(plan: pb.Plan, source: ModelSource, itemsize: int) -> int:
    """Returns what head and loss take at a host that has them, of one micro-batch per worker at a time."""
    if label_place(plan.labels).on_device:
        return 0
    return workers_of(plan, plan.window) * loss_bytes(source.config, unit_rows(plan) * plan.task.max_tokens, itemsize)
