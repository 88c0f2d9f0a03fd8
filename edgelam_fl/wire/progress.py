"""A node's progress as a beat brings it to the hub, and back. Knows no gRPC, and not where a node is."""

from __future__ import annotations

from edgelam_fl.telemetry.events import NodeProgress
from edgelam_fl.telemetry.progress import credible
from edgelam_fl.wire import edgelam_pb2 as pb


def as_message(progress: NodeProgress) -> pb.NodeProgress:
    """Returns a node's progress as a beat brings it."""
    return pb.NodeProgress(
        doing=progress.doing, step=progress.step, steps=progress.steps, unit=progress.unit, units=progress.units,
        loss=progress.loss, tokens=progress.tokens, bytes=progress.bytes, of_bytes=progress.of_bytes,
    )  # fmt: skip


def of_message(message: pb.NodeProgress) -> NodeProgress:
    """Returns the progress that a node says of itself, without numbers that are none."""
    found = NodeProgress(
        doing=message.doing, step=message.step, steps=message.steps, unit=message.unit, units=message.units,
        loss=message.loss if message.HasField("loss") else None,
        tokens=message.tokens, bytes=message.bytes, of_bytes=message.of_bytes,
    )  # fmt: skip
    return credible(found)
