"""A device's part in a round: evaluation, optimizer steps, and the word to its hosts that it is done.

Knows batches, labels and the optimizer; `split.step` takes the micro-batches over the route.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.reading import unit_positions
from edgelam_fl.split.answers import greedy_answers
from edgelam_fl.split.ends import Ends
from edgelam_fl.split.judging import norm_of
from edgelam_fl.split.route import Route
from edgelam_fl.split.snapshot import ENDS, NO_KEEPER, Keeper, SourceState
from edgelam_fl.split.step import DeviceStep, LeftOut
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.split.trainee import Trainee, judge
from edgelam_fl.tasks.base import Example, Task, Unit
from edgelam_fl.tasks.data import batch_indices
from edgelam_fl.telemetry.events import EmitInJob, Evaluated, NodeProgress, StepDone
from edgelam_fl.telemetry.events.progress import ANSWERING, CONNECTING, MEASURING, TRAINING
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters


@dataclass
class Measured:
    """A device's measurements of a round, for its report."""

    eval_loss_sum: float = 0.0
    eval_labels: int = 0
    eval_sums: dict[str, float] = field(default_factory=dict)  # of the task's other metrics, by name
    eval_seconds: float = 0.0
    train_seconds: float = 0.0
    compute_seconds: float = 0.0
    tokens_trained: int = 0
    labels_trained: int = 0
    steps: list[pb.StepReport] = field(default_factory=list)


class Driver:
    """The driver of one device in one round."""

    def __init__(
        self,
        plan: pb.Plan,
        ends: Ends,
        trainee: Trainee,
        route: Route,
        task: Task,
        emit: EmitInJob,
        keeper: Keeper = NO_KEEPER,
        counters: ByteCounters | None = None,
    ) -> None:
        """`trainee`: the adapter of the device's own layers. `route`: its links need not be open yet.

        `keeper`: keeps snapshots. `counters`: of the route's bytes; None: nobody counts them.
        """
        self._keeper, self._counters = keeper, counters or ByteCounters()
        self.plan, self.ends, self.trainee, self.route, self.task, self.emit = plan, ends, trainee, route, task, emit
        self.measured = Measured()
        self._doing = CONNECTING
        self._under_way: DeviceStep | None = None  # whose micro-batches are taken now
        self._answered = (0, 0)  # tokens per answer that are over, and the most of one, while questions are answered
        self.timeline = Timeline("device")

    # ---------------------------------------------------------------- phases

    @torch.no_grad()
    def evaluate(self, examples: list[Example]) -> None:
        """Measures loss and metrics on the held-out examples, with the adapter as it is."""
        began, measured = time.monotonic(), self.measured
        batches = evaluation_batches(examples, unit_positions(self.plan, pb.EVAL), self.plan.window)
        step = self._step([unit for batch in batches for unit in self.task.units(batch, 1)], phase=pb.EVAL)
        self._run(step)
        measured.eval_loss_sum, measured.eval_labels, measured.eval_sums = sum(step.losses), step.labels, step.sums
        measured.eval_seconds = time.monotonic() - began
        seconds = round(measured.eval_seconds, 3)
        self.emit(Evaluated(loss_sum=measured.eval_loss_sum, labels=measured.eval_labels, seconds=seconds))

    @torch.no_grad()
    def answers(self, prompts: Sequence[list[int]], most: int, stop_ids: Collection[int]) -> list[list[int]]:
        """Returns greedy answers of at most `most` tokens, with the adapter as it is; together with a prompt, task.max_tokens."""
        began, numbers, positions = time.monotonic(), count(1), unit_positions(self.plan, pb.EVAL)

        def cut(texts: Sequence[Example]) -> list[list[Example]]:
            return evaluation_batches(texts, positions, self.plan.window)

        def ask(units: list[Unit], task: Task) -> None:
            ends, number = self.ends.asking(task), next(numbers)
            self._answered = (number - 1, most)
            self._run(DeviceStep(self.plan, ends, self.route, self.timeline, units, phase=pb.EVAL, number=number))

        longest = self.plan.task.max_tokens
        found = greedy_answers(prompts, most=most, longest=longest, stop_ids=stop_ids, cut=cut, ask=ask)
        self.measured.eval_seconds += time.monotonic() - began
        self._answered = (0, 0)
        return found

    def train(self, examples: list[Example]) -> None:
        """Makes the plan's optimizer steps; sits out those for which this device has no batch."""
        batches = [self._batch(examples, step) for step in range(self.plan.steps)]
        divisors = self._agree_on_labels(batches)
        began = time.monotonic()
        self.timeline.open()
        first = self.plan.first_step
        earlier_s, own = self.measured.train_seconds, [n for n, units in enumerate(batches) if units and n >= first]
        nexts = [*own[1:], self.plan.steps]
        self._keep(first, own[0] if own else self.plan.steps)
        for number, following in zip(own, nexts, strict=False):
            self._train_step(self._step(batches[number], phase=pb.TRAIN, number=number, divisor=divisors[number]))
            self.measured.train_seconds = earlier_s + time.monotonic() - began
            self._keep(number, following)
        self.measured.train_seconds = earlier_s + time.monotonic() - began

    def finish(self) -> None:
        """Sends the hosts word that nothing more comes, and closes the links."""
        for link in (self.route.exit, self.route.entry):
            if link is not None:
                done = pb.Done(
                    loss_sum=sum(s.loss_sum for s in self.measured.steps), labels=self.measured.labels_trained
                )
                link.send(pb.Header(kind=pb.DONE, done=done))
                link.close()

    def progress(self) -> NodeProgress:
        """Returns where the device is in its part; on any thread."""
        step, measured, answered = self._under_way, self.measured, self._answered
        unit, units = (step.units_over, len(step.units)) if step is not None else (0, 0)
        newest = measured.steps[-1] if measured.steps else None
        return NodeProgress(
            doing=ANSWERING if answered[1] else self._doing,
            step=newest.step + 1 if newest is not None else 0,
            steps=self.plan.own_steps,
            unit=answered[0] if answered[1] else unit,
            units=answered[1] or units,
            loss=newest.loss_sum / newest.labels if newest is not None and newest.labels else None,
            tokens=measured.tokens_trained,
        )

    # ---------------------------------------------------------------- snapshots

    def restore(self, state: SourceState) -> None:
        """Goes on after the plan's `first_step`, with what was measured before it. Raises Damaged if it is not of this adapter."""
        self.trainee.restore(state)
        earlier, measured = state.report, self.measured
        measured.eval_loss_sum, measured.eval_labels = earlier.eval_loss_sum, earlier.eval_labels
        measured.eval_sums, measured.eval_seconds = dict(earlier.eval_sums), earlier.eval_seconds
        measured.train_seconds, measured.compute_seconds = earlier.train_seconds, earlier.compute_seconds
        measured.tokens_trained, measured.labels_trained = earlier.tokens_trained, earlier.labels_trained
        measured.steps = list(earlier.steps)
        self._counters.include(earlier.bytes)

    def report(self) -> pb.JobReport:
        """Returns what was measured so far, of a report the device's part."""
        measured = self.measured
        return pb.JobReport(
            eval_loss_sum=measured.eval_loss_sum, eval_labels=measured.eval_labels, eval_sums=measured.eval_sums,
            eval_seconds=measured.eval_seconds, train_seconds=measured.train_seconds,
            compute_seconds=measured.compute_seconds, tokens_trained=measured.tokens_trained,
            labels_trained=measured.labels_trained, steps=measured.steps, bytes=self._counters.report(),
        )  # fmt: skip

    def _keep(self, after: int, until: int) -> None:
        """Keeps a snapshot if one is due at a number of steps above `after` and up to `until`, with no own step between."""
        steps = self._keeper.due(after, until)
        if steps:
            trained = self.trainee.state()
            self._keeper.take(ENDS, steps, SourceState(trained.arrays, trained.numbers, self.report()))

    # ---------------------------------------------------------------- batches

    def _batch(self, examples: list[Example], step: int) -> list[Unit]:
        if step >= self.plan.own_steps:
            return []
        chosen = batch_indices(
            len(examples), self.plan.batch_size, self.plan.cursor + step, self.plan.seed, self.plan.node
        )
        return self.task.units([examples[number] for number in chosen], self.plan.micro_batches)

    def _agree_on_labels(self, batches: Sequence[list[Unit]]) -> list[int]:
        """Returns what the losses of each step are divided by, after an exchange of label counts with the coordinator."""
        own = [sum(unit.count for unit in units) for units in batches]
        if self.route.exit is None:
            return own
        rows = [
            pb.StepRow(labels=n, rows=[len(u.row_lengths) for u in units], tokens=[u.shape[1] for u in units])
            for n, units in zip(own, batches, strict=True)
        ]
        self.route.exit.send(pb.Header(kind=pb.TABLE, phase=pb.TRAIN, table=pb.Table(steps=rows)))
        header = pb.Header()
        while header.kind != pb.TABLE_ALL:
            header = self.route.receive(self.plan.deadlines.round_s, "federation.step_deadline_s").header
        totals = [total.labels for total in header.table_all.steps]
        if len(totals) != len(own) or any(total < n for total, n in zip(totals, own, strict=True)):
            raise ProtocolError(f"TABLE_ALL counts {totals[:3]}... labels per step; this device alone has {own[:3]}...")
        if self.plan.HasField("privacy"):
            return own  # what this device computes must not depend on how many labels others have
        mode = host_mode(self.plan.host_mode)
        return [mode.divisor(total, n) for total, n in zip(totals, own, strict=True)]

    # ---------------------------------------------------------------- a step

    def _step(self, units: list[Unit], **which: Any) -> DeviceStep:
        return DeviceStep(self.plan, self.ends, self.route, self.timeline, units, **which)

    def _run(self, step: DeviceStep) -> None:
        self._doing, self._under_way = TRAINING if step.phase == pb.TRAIN else MEASURING, step
        try:
            step.run()
        finally:
            self._under_way = None
            self.measured.compute_seconds += step.compute_seconds

    def _train_step(self, step: DeviceStep) -> None:
        began = time.monotonic()
        losses: list[float] = []
        reason = ""
        try:
            self._run(step)
            losses = step.losses
            step.await_close()
            self._apply(step)
        except LeftOut as error:
            reason = str(error)
        else:
            self.measured.labels_trained += step.labels
            self.measured.tokens_trained += sum(sum(unit.row_lengths) for unit in step.units)
        self.trainee.clear()
        report = pb.StepReport(
            step=step.number, loss_sum=sum(losses), labels=step.labels, seconds=time.monotonic() - began,
            counted=not reason, reason=reason,
        )  # fmt: skip
        self.measured.steps.append(report)
        loss, seconds = report.loss_sum / step.labels, round(report.seconds, 3)
        self.emit(StepDone(step=step.number, loss=loss, labels=step.labels, seconds=seconds))

    def _apply(self, step: DeviceStep) -> None:
        """Makes the optimizer step of the own layers, which learn from the mean over the device's own labels."""
        own_share = step.divisor / step.labels
        if own_share != 1.0:
            for parameter in self.trainee.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(own_share)
        problem = self._own_problem()
        scale = 1.0
        if self.plan.optimizer.clip == "global":
            verdict = self._agree_on_scale(step, problem)
            if verdict.skip and not problem:
                return
            scale = verdict.scale
        if problem:
            raise LeftOut(problem)
        with self.timeline.interval("step", pb.Header(step=step.number)):
            self.trainee.step(step.number, scale)

    def _own_problem(self) -> str:
        """Returns why the gradient of the own layers must not touch them; empty if it may."""
        norm = norm_of(parameter.grad for parameter in self.trainee.parameters)
        if math.isfinite(norm):
            return ""
        hosts = [hop.node for hop in self.plan.routes[0].hops]
        return "the gradient of its own layers is not finite" + (f", after what {hosts[0]} sent" if hosts else "")

    def _agree_on_scale(self, step: DeviceStep, problem: str) -> pb.StepApply:
        """Returns how the gradients of all stages are scaled (clip = "global")."""
        own = pb.StepReady(finite=False) if problem else self.trainee.squared_norm()
        if self.route.exit is None:
            return judge([own], self.plan.optimizer.max_norm)
        return step.agree_on_scale(own)


def evaluation_batches(examples: Sequence[Example], most: int, window: int) -> list[list[Example]]:
    """Cuts the examples into micro-batches of similar length, each of at most `most` positions or of one example.

    As large as that allows, since small ones compute slowly; but at least two per place in the window, if there are as many
    examples, so that device and hosts do not wait for each other.
    """
    ordered = sorted(examples, key=lambda example: example.length)
    share = sum(example.length for example in ordered) // (2 * window)
    batches: list[list[Example]] = []
    for example in ordered:
        if not batches or (len(batches[-1]) + 1) * example.length > min(most, share):
            batches.append([])
        batches[-1].append(example)
    return batches
