"""What the nodes' reports of a round say, as the fields of the `round_done` event."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from edgelam_fl.model.adapter import Adapter
from edgelam_fl.wire import edgelam_pb2 as pb


def describe_round(
    sent_bytes: Mapping[str, int],
    started_from: Mapping[str, str],
    reports: Mapping[str, tuple[pb.JobReport, Adapter]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
    """(devices, hosts, bytes by kind) as telemetry.events documents them.

    `sent_bytes`: of the adapters sent to each node. `started_from`: the digest of the adapter in each node's plan.
    """
    devices, hosts, by_kind = [], [], Counter[str]()
    for name, (report, tensors) in sorted(reports.items()):
        common = {
            "name": name,
            "bytes_up": _bytes(report, "sent"),
            "bytes_down": _bytes(report, "received"),
            "adapter_bytes_up": sum(array.nbytes for array in tensors.values()),
            "adapter_bytes_down": sent_bytes.get(name, 0),
            "compute_seconds": round(report.compute_seconds, 3),
            "peak_rss_bytes": report.peak_rss_bytes,
            "moments": report.moments,
            "digest_before": started_from.get(name, ""),
            "digest_after": report.adapter_digest,
        }
        if report.role == pb.EDGE:
            hosts.append({**common, "layers": [report.first_layer, report.last_layer]})
            continue
        devices.append({**common, **_learning(report)})
        for count in report.bytes:
            by_kind[count.kind] += count.payload_bytes + count.framing_bytes
    return devices, hosts, dict(by_kind)


def _learning(report: pb.JobReport) -> dict[str, Any]:
    counted = [step for step in report.steps if step.counted]
    labels = sum(step.labels for step in counted)
    return {
        "examples": report.examples,
        "labels": report.labels_trained,
        "loss": _finite(sum(step.loss_sum for step in counted) / labels) if labels else None,
        "perplexity": _perplexity(report.eval_loss_sum / report.eval_labels) if report.eval_labels else None,
        "tokens": report.tokens_trained,
        "train_seconds": round(report.train_seconds, 3),
        "eval_seconds": round(report.eval_seconds, 3),
        "step_losses": [
            _finite(round(step.loss_sum / step.labels, 5)) if step.labels else None for step in report.steps
        ],
        "left_out": [{"step": step.step, "reason": step.reason} for step in report.steps if not step.counted],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: a diverged number is null."""
    return value if math.isfinite(value) else None


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None


def _bytes(report: pb.JobReport, direction: str) -> int:
    return sum(c.payload_bytes + c.framing_bytes for c in report.bytes if c.direction == direction)
