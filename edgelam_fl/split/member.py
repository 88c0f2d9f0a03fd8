"""One device of a host's group: what the host keeps for it in a round.

Knows nothing about layers and sends nothing; `split.host` computes, `split.group` sends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import Any, NamedTuple

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.stage import Stage
from edgelam_fl.split.judging import NO_SIZE, Course, Size
from edgelam_fl.split.passes import Crossing
from edgelam_fl.split.snapshot import Damaged
from edgelam_fl.split.workers import Work
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link

UnitId = tuple[int, int, int]  # phase, step, micro-batch


class Open(NamedTuple):
    """A micro-batch between its two passes."""

    crossing: Crossing
    output: torch.Tensor  # that the gradient to come is of
    view: Stage | None  # that has to compute its backward pass; None: any


@dataclass
class Member:
    """One device of the group, as its host sees it."""

    route: pb.Route
    hop: pb.Hop  # this host on the route
    previous: Link | None = None  # to the host before, or to the device's front
    next: Link | None = None  # to the host after, or to the device's back
    window: int = 0  # micro-batches that the next link admits; 0: that link is not open yet
    table: list[pb.StepRow] | None = None  # label counts per step; None: not here yet
    forwards: deque[Frame] = field(default_factory=deque)  # activations whose forward pass is due
    labels: dict[UnitId, torch.Tensor] = field(default_factory=dict)  # at a last stage that holds the head
    saved: dict[UnitId, Open] = field(default_factory=dict)  # micro-batches whose gradient is still to come
    forward_work: deque[Work] = field(default_factory=deque)  # that workers compute, or that wait for one before them
    backward_work: deque[Work] = field(default_factory=deque)
    caches: dict[int, Any] = field(default_factory=dict)  # by generation session
    gradients: list[torch.Tensor | None] | None = None  # sums over the micro-batches of the open step
    lacked: set[UnitId] = field(
        default_factory=set
    )  # those of which the host has asked for states that it had not kept
    begun: set[UnitId] = field(default_factory=set)  # training micro-batches whose forward pass has run
    backwards_done: int = 0  # micro-batches of the open step
    size: Size | None = None  # of its newest complete gradient
    largest: Size = NO_SIZE  # of its gradients in the round that were not too large, in each measure
    course: Course = field(default_factory=Course)  # of its gradients so far
    opposes: str = ""  # how it was found to work against the others; empty: it was not
    problem: str = ""  # why the open step cannot count this device
    strikes: int = 0  # steps in a row in which the device had a problem
    missed_steps: int = 0  # steps of the round that did not count this device, or not its norm
    missed_for: str = ""  # the reason in the last of these steps
    labels_trained: int = 0  # in the steps that counted this device
    leaving: str = ""  # why no forward pass is due any more; the coordinator may still count earlier ones
    gone: str = ""  # why this device is out of the round
    done: bool = False

    @property
    def index(self) -> int:
        """The device's number on the wire, and its place in the order of sums."""
        return self.route.device_index

    @property
    def present(self) -> bool:
        """Whether both links are open and the device is in the round."""
        return self.previous is not None and self.next is not None and not self.gone

    @property
    def active(self) -> bool:
        """Whether the device is present and still has something to send."""
        return self.present and not self.done

    @property
    def is_computed_for(self) -> bool:
        """Whether a worker computes something for the device, the result of which is still to come."""
        return bool(self.forward_work or self.backward_work)

    @property
    def in_flight(self) -> int:
        """The micro-batches that the host has memory in use for."""
        return len(self.forwards) + len(self.forward_work) + len(self.saved)

    @property
    def layers(self) -> tuple[int, int]:
        """The layers [first, last) that the route computes here."""
        return self.hop.first, self.hop.last

    def crosses(self, name: str) -> bool:
        """Returns whether the route computes the layer of a tensor; always for tensors outside the layers."""
        return crosses(self.layers, name)

    def state(self) -> dict[str, Any]:
        """Returns what a later attempt of the round needs to know of the device, between two steps."""
        return {
            "layers": self.layers, "labels_trained": self.labels_trained, "strikes": self.strikes,
            "missed_steps": self.missed_steps, "missed_for": self.missed_for,
            "size": None if self.size is None else [self.size.added, self.size.per_unit],
            "largest": [self.largest.added, self.largest.per_unit],
            "opposes": self.opposes,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned in an earlier attempt. Raises Damaged if the route crosses other layers now."""
        if tuple(state["layers"]) != self.layers:
            raise Damaged(f"the route of {self.route.device} crossed layers {state['layers']}, and now {self.layers}")
        self.labels_trained, self.strikes = state["labels_trained"], state["strikes"]
        self.missed_steps, self.missed_for = state["missed_steps"], state["missed_for"]
        self.size = None if state["size"] is None else Size(*state["size"])
        self.largest = Size(*state["largest"])
        self.opposes = state["opposes"]

    def units_of(self, step: int) -> int:
        """Counts the device's micro-batches in a step."""
        return len(self.table[step].rows) if self.table else 0

    def labels_of(self, step: int) -> int:
        """Counts the device's labels in a step."""
        return self.table[step].labels if self.table else 0

    def accumulate(self, gradients: list[torch.Tensor | None]) -> None:
        """Adds the gradients of one micro-batch. Per device, so that the order of arrivals does not change a sum."""
        if self.gradients is None:
            self.gradients = gradients
            return
        for number, new in enumerate(gradients):
            old = self.gradients[number]
            if new is not None:
                self.gradients[number] = new if old is None else old.add_(new)

    def forget(self, step: int) -> None:
        """Drops what is left of a closed step."""
        self.gradients, self.backwards_done, self.problem = None, 0, ""
        self.begun = {unit for unit in self.begun if unit[:2] != (pb.TRAIN, step)}
        self.lacked = {unit for unit in self.lacked if unit[:2] != (pb.TRAIN, step)}
        self.saved = {unit: kept for unit, kept in self.saved.items() if unit[:2] != (pb.TRAIN, step)}
        self.labels = {unit: kept for unit, kept in self.labels.items() if unit[:2] != (pb.TRAIN, step)}
        self.forwards = deque(f for f in self.forwards if (f.header.phase, f.header.step) != (pb.TRAIN, step))


def crosses(layers: tuple[int, int], name: str) -> bool:
    """Returns whether a route over the layers [first, last) computes that of a tensor; always for one outside the layers."""
    layer = layer_number(name)
    return layer is None or layers[0] <= layer < layers[1]


def unit_id(header: pb.Header) -> UnitId:
    """Returns the name of the micro-batch that a frame belongs to."""
    return header.phase, header.step, header.micro_batch


def checked_table(table: pb.Table, member: Member, plan: pb.Plan) -> list[pb.StepRow]:
    """Returns the rows of a TABLE. Raises ProtocolError if they do not fit the plan."""
    if len(table.steps) != plan.steps or member.table is not None:
        raise ProtocolError(f"a TABLE of {len(table.steps)} steps; the plan has {plan.steps}, once")
    for row in table.steps:
        least = 1 if row.labels else 0  # a step without labels is one without micro-batches
        if not least <= len(row.rows) <= plan.micro_batches * least or sum(row.rows) > plan.batch_size:
            raise ProtocolError(f"a TABLE row of {len(row.rows)} micro-batches with {sum(row.rows)} rows")
        if len(row.tokens) != len(row.rows) or not all(0 < tokens <= plan.task.max_tokens for tokens in row.tokens):
            raise ProtocolError(f"a TABLE row of {len(row.rows)} micro-batches with {list(row.tokens)[:8]} tokens")
        if not all(row.rows) or row.labels > sum(map(mul, row.rows, row.tokens)):
            raise ProtocolError(f"a TABLE row of {row.labels} labels, more than the batch has tokens")
    return list(table.steps)


def check_unit(header: pb.Header, shape: Sequence[int], member: Member) -> None:
    """Raises ProtocolError if a training micro-batch is not the one that the device announced, or came before.

    `shape`: of its hidden states, [rows, tokens, hidden].
    """
    row = member.table[header.step] if member.table else pb.StepRow()
    if header.micro_batch >= len(row.rows) or unit_id(header) in member.begun:
        raise ProtocolError(f"micro-batch {header.micro_batch} of step {header.step} came twice, or was not announced")
    announced = (row.rows[header.micro_batch], row.tokens[header.micro_batch])
    if announced != tuple(shape[:2]):
        raise ProtocolError(
            f"micro-batch {header.micro_batch} of step {header.step} has {shape[0]} rows of {shape[1]} tokens; announced "
            f"were {announced[0]} of {announced[1]}"
        )
