"""The words of `split.host_mode` and `split.labels`, each as one object with all that follows from it.

The one home of these words: planning, training and the server look an object up where a plan or a run file comes in, and
ask it. Nothing else compares the words. Knows no links and no tensors.

    joint        one adapter per site; one step for all devices' batches together
    sequential   one adapter per site; one step for each device's batch, in an order drawn from the run's seed
    copies       one adapter per device; its steps are those of its device alone

    device       labels, head and loss stay on the device
    last-stage   the last host of a route holds the head and receives the labels
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgelam_fl.errors import Mismatch
from edgelam_fl.wire import edgelam_pb2 as pb

T = TypeVar("T")
ALL_DEVICES = 0  # the device index in frames about a turn that belongs to all devices


@dataclass(frozen=True)
class Turn:
    """One optimizer step of one adapter: the step's number in the phase, and the devices whose gradients it sums."""

    step: int
    members: tuple[int, ...]  # device indices
    labels: int  # what each member divides its loss by

    def has(self, index: int, step: int) -> bool:
        """Returns whether the turn takes the gradient of a device's batch of `step`."""
        return step == self.step and index in self.members


@dataclass(frozen=True, kw_only=True)
class HostMode:
    """A way for hosts to train their layers for several devices."""

    word: str
    has_copies: bool = False  # each device has an adapter of its own at every host
    steps_in_turn: bool = False  # the devices' batches of a step are applied one after the other

    @property
    def steps_together(self) -> bool:
        """Whether a turn belongs to all devices of a host."""
        return not (self.has_copies or self.steps_in_turn)

    @property
    def waits_for_others(self) -> bool:
        """Whether a device can hold the others' steps up, so that turns need a deadline and a least number of devices."""
        return not self.has_copies

    # ---------------------------------------------------------------- adapters

    def lanes(self, members: Sequence[T]) -> list[list[T]]:
        """Groups the devices of a host by the adapter that they train."""
        return [[member] for member in members] if self.has_copies else [list(members)]

    def sources(self, site: str, devices: Sequence[str]) -> list[str]:
        """Names the sources of a host's contributions, in the order of `lanes`: the site, or each device."""
        return list(devices) if self.has_copies else [site]

    def is_shared(self, scope: str) -> bool:
        """Returns whether contributions of this scope come from an adapter that several devices trained."""
        return scope == "site" and not self.has_copies

    def steps_of_source(self, scope: str, devices: int) -> int:
        """Counts the optimizer steps of a source per step of the plan, with `devices` routes over its host."""
        return devices if scope == "site" and self.steps_in_turn else 1

    def workers(self, devices: int, in_flight: int, threads: int) -> int:
        """Returns how many micro-batches a host computes at once, so that all its threads are used and no worker waits long.

        Two threads that share the matrices of one micro-batch gain less than two that have one each; but with fewer than two
        micro-batches per worker on their way, a pipeline would wait for a slow pass. `devices`: of the host. `in_flight`: the
        micro-batches of each that are on their way at once. `threads`: of the host.
        """
        most = (1 if self.steps_in_turn else devices) * in_flight // 2
        return max(count for count in range(1, threads + 1) if count == 1 or (threads % count == 0 and count <= most))

    # ---------------------------------------------------------------- turns

    def turns(
        self, totals: Sequence[pb.StepTotal], labels_of: Callable[[int, int], int], seed: int, first_step: int
    ) -> list[Turn]:
        """Orders the turns of a lane.

        `totals`: labels and members of each step of the phase. `labels_of(device index, step)`: a device's own labels.
        `first_step`: the run's number of the phase's first step, which the drawn order depends on.
        """
        if not self.steps_in_turn:
            return [
                Turn(step, tuple(total.members), total.labels) for step, total in enumerate(totals) if total.members
            ]
        turns = []
        for step, total in enumerate(totals):
            order = sorted(total.members)
            random.Random(f"{seed}/order/{first_step + step}").shuffle(order)
            turns += [Turn(step, (index,), labels_of(index, step)) for index in order]
        return turns

    def turn_index(self, device_index: int) -> int:
        """Returns the device index that names a device's turn of a step: its own, or ALL_DEVICES."""
        return ALL_DEVICES if self.steps_together else device_index

    def divisor(self, union_labels: int, own_labels: int) -> int:
        """Returns what a device divides the loss of a step by: the labels of all devices in its turn."""
        return union_labels if self.steps_together else own_labels

    def patience_s(self, deadlines: pb.Deadlines) -> float:
        """Returns how long a device waits for a word from its hosts, in seconds.

        A coordinator gives the others of a joint step `step_s`. Turns of others come one after the other.
        """
        return 2 * deadlines.step_s if self.steps_together else deadlines.round_s


@dataclass(frozen=True, kw_only=True)
class LabelPlace:
    """The place of a route's labels, head and loss."""

    word: str
    on_device: bool  # else at the route's last host


JOINT = HostMode(word="joint")
SEQUENTIAL = HostMode(word="sequential", steps_in_turn=True)
COPIES = HostMode(word="copies", has_copies=True)
HOST_MODES: Mapping[str, HostMode] = {mode.word: mode for mode in (JOINT, SEQUENTIAL, COPIES)}

AT_DEVICE = LabelPlace(word="device", on_device=True)
AT_LAST_STAGE = LabelPlace(word="last-stage", on_device=False)
LABEL_PLACES: Mapping[str, LabelPlace] = {place.word: place for place in (AT_DEVICE, AT_LAST_STAGE)}


def host_mode(word: str) -> HostMode:
    """Looks up a word of `split.host_mode`. Raises Mismatch for an unknown word."""
    return _known("host_mode", word, HOST_MODES)


def label_place(word: str) -> LabelPlace:
    """Looks up a word of `split.labels`. Raises Mismatch for an unknown word."""
    return _known("labels", word, LABEL_PLACES)


def _known(key: str, word: str, table: Mapping[str, T]) -> T:
    if word not in table:
        raise Mismatch(f"split.{key} = {word!r} is not known here; known: {', '.join(table)}")
    return table[word]
