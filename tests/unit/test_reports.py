from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgelam_fl.tasks.points import sums_at
from edgelam_fl.telemetry.events import StepLeftOut, TimelineInterval
from edgelam_fl.telemetry.summary import pooled
from edgelam_fl.wire import edgelam_pb2 as pb
from server.events_of_round import describe_round, describe_timeline
from server.replies import Reply


def device_report(**other: Any) -> pb.JobReport:
    fields = {
        "role": pb.DEVICE, "examples": 9, "labels_trained": 3 + 17, "eval_loss_sum": 6.0, "eval_labels": 4, "adapter_digest": "after",
        "steps": [
            pb.StepReport(step=0, loss_sum=6.0, labels=3, counted=True),
            pb.StepReport(step=1, loss_sum=100.0, labels=5, reason="later than 2 s"),
            pb.StepReport(step=2, loss_sum=17.0, labels=17, counted=True),
        ],
        "bytes": [
            pb.KindBytes(link="entry e", direction="sent", kind="ACT", payload_bytes=100, framing_bytes=7),
            pb.KindBytes(link="entry e", direction="received", kind="GRAD", payload_bytes=50, framing_bytes=3),
            pb.KindBytes(link="exit e", direction="received", kind="ACT", payload_bytes=30, framing_bytes=2),
        ],
    }  # fmt: skip
    return pb.JobReport(**{**fields, **other})


def test_a_device() -> None:
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float32)}
    report = device_report(contributions=[pb.Contribution(scope="ends", source="d", weight=20)])
    (device,), hosts, by_kind = describe_round({"d": 40}, {"d": "before"}, {"d": Reply(report, (tensors,))})
    assert hosts == ()
    assert device.loss == (6 + 17) / (3 + 17)  # of the counted steps; sums, never a mean of means
    assert device.perplexity == math.exp(6 / 4)
    assert device.step_losses == (6 / 3, 100 / 5, 17 / 17)
    assert device.left_out == (StepLeftOut(step=1, reason="later than 2 s"),)
    assert (device.bytes_up, device.bytes_down) == (100 + 7, 50 + 3 + 30 + 2)
    assert (device.adapter_bytes_up, device.adapter_bytes_down) == (4 * (6 + 5), 40)
    assert (device.digest_before, device.digest_after) == ("before", "after")
    assert by_kind == {"ACT": 107 + 32, "GRAD": 53}


def host_part(received_bytes: int) -> pb.HostPart:
    received = pb.KindBytes(direction="received", kind="ACT", payload_bytes=received_bytes, framing_bytes=7)
    return pb.HostPart(first_layer=2, last_layer=4, compute_seconds=1.5, bytes=[received])


def test_a_host_and_its_bytes_are_not_counted_twice() -> None:
    edge = pb.JobReport(role=pb.EDGE, host=host_part(100))
    devices, (host,), by_kind = describe_round({}, {}, {"e": Reply(edge)})
    assert (host.name, host.layers, host.bytes_down, host.adapter_bytes_down) == ("e", (2, 4), 107, 0)
    assert (devices, by_kind) == ((), {})


def test_a_device_that_hosts_is_in_both_lists_and_its_bytes_once() -> None:
    parts = [pb.Contribution(scope="site", source="d"), pb.Contribution(scope="ends", source="d")]
    tensors = ({"m": np.zeros(5, np.float32)}, {"e": np.zeros(3, np.float32)})
    report = device_report(host=host_part(900), contributions=parts, compute_seconds=0.5)
    (device,), (host,), by_kind = describe_round({"d": 40}, {}, {"d": Reply(report, tensors)})
    assert (device.bytes_down, host.bytes_down) == (50 + 3 + 30 + 2, 900 + 7)
    assert (device.adapter_bytes_up, host.adapter_bytes_up) == (4 * 3, 4 * 5)
    assert (device.adapter_bytes_down, host.adapter_bytes_down) == (40, 0)
    assert (device.compute_seconds, host.compute_seconds) == (0.5, 1.5)
    assert by_kind == {"ACT": 107 + 32, "GRAD": 53}, "counted at the devices' own links"


def test_a_nodes_heat_is_in_its_result_if_it_tells_it() -> None:
    hot = device_report(celsius=84.36, slowed="it is throttled")
    (device, cool), _, _ = describe_round({}, {}, {"d": Reply(hot), "e": Reply(device_report())})
    assert (device.celsius, device.slowed) == (84.4, "it is throttled")
    assert (cool.celsius, cool.slowed) == (None, "")


def test_metrics_are_shares_of_the_held_out_labels() -> None:
    (device,), _, _ = describe_round({}, {}, {"d": Reply(device_report(eval_sums={"correct": 3}))})
    assert device.metrics == {"accuracy": 3 / 4}
    (device,), _, _ = describe_round({}, {}, {"d": Reply(device_report())})
    assert device.metrics == {}


def test_a_measure_at_places_is_a_mean_over_all_of_them_and_has_no_perplexity() -> None:
    sums = [sums_at(10, {"": 30.0, "RZF": 28.0}, 2), sums_at(-5, {"": 1.0, "RZF": math.inf}, 1)]
    strange = {"at/ten/count": 1.0, "at/0/sum/RZF": 3.0, "at/0/count": 0.0, "at/inf/count": 1.0, "at/inf/sum/": 1.0}
    report = device_report(eval_sums={**sums[0], **sums[1], **strange})
    (device,), _, _ = describe_round({}, {}, {"d": Reply(report)}, "sum rate")
    assert device.points == (("", -5, 1.0, 1), ("", 10, 15.0, 2), ("RZF", -5, None, 1), ("RZF", 10, 14.0, 2))
    assert (device.metrics, device.perplexity) == ({"sum rate": 31 / 3}, None)
    twice = [device, replace(device, points=device.points[:1])]
    assert pooled(twice) == {"sum rate": (31 + 1) / (3 + 1)}


def test_a_timeline_by_node() -> None:
    interval = pb.Interval(
        kind="forward", role="host", start_s=0.25, seconds=math.nan, step=3, micro_batch=1, peer="device-2"
    )
    found = describe_timeline({"e": Reply(pb.JobReport(timeline=[interval])), "d": Reply(pb.JobReport())})
    assert found == {"e": (TimelineInterval("forward", "host", 0.25, None, 3, 1, "device-2"),)}


def test_an_evaluation_alone_has_no_loss() -> None:
    (device,), _, _ = describe_round({}, {}, {"d": Reply(device_report(steps=[], labels_trained=0))})
    assert (device.loss, device.step_losses, device.left_out) == (None, (), ())


def test_nodes_come_by_name() -> None:
    devices, _, _ = describe_round({}, {}, {name: Reply(device_report()) for name in ("c", "a", "b")})
    assert [device.name for device in devices] == ["a", "b", "c"]


@pytest.mark.parametrize("loss_sum", [4 * 1000.0, math.inf, math.nan])
def test_a_diverged_model_is_reported_and_not_a_crash(loss_sum: float) -> None:
    (device,), _, _ = describe_round({}, {}, {"d": Reply(device_report(eval_loss_sum=loss_sum))})
    assert device.perplexity is None
