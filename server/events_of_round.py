"""What the nodes' reports of a round say, as the fields of the events `round_done` and `timeline`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from edgelam_fl.telemetry.timeline import covered
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BY_RELAY
from server.replies import Reply

_INTERVALS = 1000  # of a node and round; it sends a few hundred


def describe_round(
    sent_bytes: Mapping[str, int], started_from: Mapping[str, str], replies: Mapping[str, Reply]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
    """(devices, hosts, bytes by kind) as telemetry.events documents them; a device that is a host is in both.

    `sent_bytes`: of the adapters sent to each node. `started_from`: the digest of the adapter in each node's plan.
    """
    devices, hosts, by_kind = [], [], Counter[str]()
    for name, reply in sorted(replies.items()):
        report, received = reply.report, sent_bytes.get(name, 0)
        common = {
            "name": name,
            "peak_rss_bytes": report.peak_rss_bytes,
            "moments": report.moments,
            "digest_before": started_from.get(name, ""),
            "digest_after": report.adapter_digest,
        }
        if report.role == pb.DEVICE:
            traffic = _traffic(report.bytes, reply.bytes_of("ends"), received)
            devices.append(
                {**common, **traffic, "compute_seconds": round(report.compute_seconds, 3), **_learning(report)}
            )
            for count in report.bytes:
                by_kind[count.kind] += count.payload_bytes + count.framing_bytes
            received = 0  # one message for both parts: told once
        if report.HasField("host"):
            host = report.host
            traffic = _traffic(host.bytes, reply.bytes_of("site"), received)
            layers = [host.first_layer, host.last_layer]
            hosts.append({**common, **traffic, "compute_seconds": round(host.compute_seconds, 3), "layers": layers})
    return devices, hosts, dict(by_kind)


def describe_timeline(replies: Mapping[str, Reply]) -> dict[str, list[list[Any]]]:
    """Who did what, when, by node; without those that say nothing."""
    return {
        name: [
            [i.kind, i.role, _finite(round(i.start_s, 6)), _finite(round(i.seconds, 6)), i.step, i.micro_batch, i.peer]
            for i in reply.report.timeline[-_INTERVALS:]
        ]
        for name, reply in sorted(replies.items())
        if reply.report.timeline
    }


def send_rate_bps(report: pb.JobReport) -> float | None:
    """How fast a device's tensors left it, while any did; None where none is known."""
    sends = [i for i in report.timeline if i.kind == "send" and i.role == "device"]
    seconds = covered((i.start_s, i.start_s + i.seconds) for i in sends)
    if not (math.isfinite(seconds) and seconds > 0):
        return None
    return 8 * sum(i.tensor_bytes for i in sends) / seconds or None


def _learning(report: pb.JobReport) -> dict[str, Any]:
    counted = [step for step in report.steps if step.counted]
    labels = sum(step.labels for step in counted)
    return {
        "examples": report.examples,
        "labels": report.labels_trained,
        "loss": _finite(sum(step.loss_sum for step in counted) / labels) if labels else None,
        "perplexity": _perplexity(report.eval_loss_sum / report.eval_labels) if report.eval_labels else None,
        "metrics": _metrics(report),
        "tokens": report.tokens_trained,
        "train_seconds": round(report.train_seconds, 3),
        "eval_seconds": round(report.eval_seconds, 3),
        "step_losses": [
            _finite(round(step.loss_sum / step.labels, 5)) if step.labels else None for step in report.steps
        ],
        "left_out": [{"step": step.step, "reason": step.reason} for step in report.steps if not step.counted],
    }


def _metrics(report: pb.JobReport) -> dict[str, float | None]:
    if "correct" not in report.eval_sums or not report.eval_labels:
        return {}
    return {"accuracy": _finite(report.eval_sums["correct"] / report.eval_labels)}


def _traffic(counts: Iterable[pb.KindBytes], sent_bytes: int, received_bytes: int) -> dict[str, int]:
    total = Counter[str]()
    for count in counts:
        total[count.direction] += count.payload_bytes + count.framing_bytes
        if count.link.endswith(BY_RELAY):
            total["relayed"] += count.payload_bytes + count.framing_bytes
    return {
        "bytes_up": total["sent"],
        "bytes_down": total["received"],
        "bytes_relayed": total["relayed"],
        "adapter_bytes_up": sent_bytes,
        "adapter_bytes_down": received_bytes,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: a diverged number is null."""
    return value if math.isfinite(value) else None


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None
