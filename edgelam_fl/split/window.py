"""The window of a host: the micro-batches per device that it has memory for.

Granted at READY for all routes at once or not at all (protocol section 4), so that an admitted micro-batch never waits for
memory. Knows sizes; knows no links.
"""

from __future__ import annotations

from edgelam_fl.model.memory import loss_bytes, unit_bytes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.chain_memory import UNITS_SHARE
from edgelam_fl.plan.footprint import LEARNING_BYTES
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.reading import unit_rows
from edgelam_fl.wire import edgelam_pb2 as pb


def affordable_window(plan: pb.Plan, source: ModelSource, itemsize: int, adapter_size: int, free_bytes: int) -> int:
    """Returns how many micro-batches per route fit into `free_bytes`, at most the plan's window; 0: not even one.

    `itemsize`: bytes per element computed with. `adapter_size`: elements of the hosted adapter.
    """
    span, rows, tokens = plan.hosted, unit_rows(plan), plan.task.max_tokens
    unit = unit_bytes(
        source.config, span.last - span.first, rows, tokens, itemsize, checkpointing=plan.checkpointing,
        all_linear=list(plan.lora.targets) == ["all-linear"],
    )  # fmt: skip
    routes = len(plan.serves)
    kept = adapter_size * LEARNING_BYTES * routes
    if not label_place(plan.labels).on_device:
        kept += loss_bytes(source.config, rows * tokens, itemsize)  # of one unit at a time
    return max(0, min(plan.window, int((free_bytes * UNITS_SHARE - kept) // (unit * routes))))
