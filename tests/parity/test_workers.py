"""A host whose workers compute several micro-batches at once equals one that computes them one by one, to the bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.plan.making import RoundPrivacy
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import check_done, memory_fleet
from tests.support import WAIT_S, run_config

STEPS = 2
_COMPANY_S = 5.0, 0.02  # that a pass waits for another to begin beside it: until one has, and then


class Order:
    """Has the passes that are computed at once end in a chosen order, and counts how often it did."""

    def __init__(self, *, reversed_order: bool) -> None:
        self.chosen = 0
        self._reversed = reversed_order
        self._changed = threading.Condition()
        self._began = 0
        self._running = set[int]()

    @contextmanager
    def __call__(self, _: pb.Header) -> Iterator[None]:
        with self._changed:
            own = self._began = self._began + 1
            self._running.add(own)
            self._changed.notify_all()
        yield
        with self._changed:
            has_company = self._changed.wait_for(lambda: len(self._running) > 1, _COMPANY_S[self.chosen > 0])
            self.chosen += has_company
            first = {other for other in self._running - {own} if (other > own) == self._reversed}
            self._changed.wait_for(lambda: not first & self._running, WAIT_S)
            self._running.discard(own)
            self._changed.notify_all()


def learned(report: pb.JobReport) -> pb.JobReport:
    """All of a report that does not depend on the clock."""
    kept = pb.JobReport(
        adapter_digest=report.adapter_digest, contributions=report.contributions, steps=report.steps,
        eval_loss_sum=report.eval_loss_sum, eval_sums=report.eval_sums, labels_trained=report.labels_trained,
    )  # fmt: skip
    for step in kept.steps:
        step.ClearField("seconds")
    kept.host.left_out.extend(report.host.left_out)
    return kept


CASES = {
    "joint": ["optimizer.clip=global", "optimizer.max_norm=0.05"],
    "sequential": ["split.host_mode=sequential", "lora.dropout=0.2"],
    "copies": ["split.host_mode=copies", "split.checkpointing=true", "lora.dropout=0.2"],
    "last-stage": ["split.labels=last-stage", "split.back=0", "split.hosts=2"],
    "private": [],
}


@pytest.mark.parametrize("case", CASES)
def test_no_bit_depends_on_how_many_workers_a_host_has_or_which_is_faster(
    tiny: ModelSource, data_files: list[Path], case: str
) -> None:
    config = run_config(tiny.name, "split.front=1", "federation.batch_size=6", "split.micro_batches=3", *CASES[case])
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, config.run.seed)

    def trained(hooks: NodeHooks) -> dict[str, pb.JobReport]:
        hosts = {f"edge-{number + 1}": hooks for number in range(config.split.least_hosts)}
        with memory_fleet(tiny, config, data_files[:2], hosts) as fleet:
            fleet.privacy = RoundPrivacy(clip=0.5, noise=0.0, devices=2) if case == "private" else None
            reports = fleet.run(start, STEPS)
        check_done(reports)
        return {name: learned(report) for name, report in reports.items()}

    alone = trained(NodeHooks(workers=lambda *_: 1))
    assert any(report.contributions for report in alone.values())
    for reversed_order in (False, True) if case == "joint" else (True,):
        order = Order(reversed_order=reversed_order)
        assert trained(NodeHooks(workers=lambda *_: 2, around_pass=order)) == alone
        assert order.chosen, "no two passes were computed at once"
